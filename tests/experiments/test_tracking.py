"""wandb: off by default, and offline it writes its files without a network."""

import pytest


def test_wandb_works_offline(tmp_path, tiny_config, run, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional: pip install 'gradmatch[experiments]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small = ["merges={TA: {method: task_arithmetic}}", "compare=[]", "data.tasks=[books]", "sweep=null"]
    where = tmp_path / "results"
    run(tiny_config, *small, "name=tracked", where=where)
    assert not (tmp_path / "wandb").exists()
    _, out = run(tiny_config, *small, "name=tracked", "wandb=true", where=where)  # also where all is cached
    assert "wandb: 4 runs in the group tracked" in out
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 4  # base, books, joint, TA
    assert all(list(one.glob("*.wandb")) for one in runs)
