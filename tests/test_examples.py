"""Every file of examples/ runs by itself, in seconds and without network."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys, monkeypatch, tmp_path):
    if path.stem == "curvlinops":
        pytest.importorskip("curvlinops")
    monkeypatch.chdir(tmp_path)
    kind = torch.get_default_dtype()
    runpy.run_path(str(path), run_name="__main__")
    torch.set_default_dtype(kind)
    assert capsys.readouterr().out.strip()
