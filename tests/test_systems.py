"""Where Linux's own calls and a home directory are missing: importing, merging, resuming and saving work all the same."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gradmatch.estimators.files import hold, let_go, replacing, write_atomically

ROOT = Path(__file__).parents[1]
POOR = """
import os, sys, warnings
sys.modules["fcntl"] = None
for name in ("preadv", "posix_fallocate", "fdatasync", "posix_fadvise"):
    delattr(os, name)
os.environ.pop("HOME", None)
os.path.expanduser = lambda path: path
warnings.simplefilter("ignore")
"""
WORK = """
import torch, gradmatch
from pathlib import Path
from safetensors.torch import load_file, save_file
from gradmatch import Task, merge
from gradmatch.estimators import Curvature
for number, name in enumerate(("base", "one")):
    Path(name).mkdir()
    save_file({"w": torch.full((40, 30), float(number)), "b": torch.ones(3)}, f"{name}/model.safetensors")
Curvature.from_dict({"w": torch.ones(40, 30), "b": torch.ones(3)}, 10).save("one.safetensors")
merge("base", [Task("one", "one.safetensors", 0.5)], base_curvature=1.0, out="out")
print(float(load_file("out/model.safetensors")["w"].mean()), sorted(path.name for path in Path(".").iterdir()))
"""


def test_a_merge_on_a_poor_system_is_the_same(tmp_path):
    printed = []
    for folder, code in (("rich", WORK), ("poor", POOR + WORK)):
        (tmp_path / folder).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert "['base', 'one', 'one.safetensors', 'out']" in printed[0]
    merged = [(tmp_path / folder / "out" / "model.safetensors").read_bytes() for folder in ("rich", "poor")]
    assert merged[0] == merged[1]


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "new" / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "a").stat().st_mode) == mode
    (tmp_path / "new" / "a").chmod(0o640)
    write_atomically(tmp_path / "new" / "a", "y")  # what is replaced keeps its own
    assert stat.S_IMODE((tmp_path / "new" / "a").stat().st_mode) == 0o640


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="half"), replacing(tmp_path / "a") as aside:
        raise ValueError(aside.write_text("half") and "half")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]
    with pytest.raises(IsADirectoryError, match="is a folder; name the file"):
        write_atomically(tmp_path, "x")


def test_a_lock_is_held_once_and_goes_with_its_process(tmp_path):
    path = tmp_path / "lock"
    held = hold(path)
    assert held is not None
    assert hold(path) is None
    let_go(held)
    assert not path.exists()
    code = f"from gradmatch.estimators.files import hold; import os, pathlib; hold(pathlib.Path({str(path)!r})); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    again = hold(path)
    assert again is not None
    let_go(again)
