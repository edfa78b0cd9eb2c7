"""wandb: off by default, and offline it writes its files without a network."""

import pytest

from experiments.__main__ import main


def test_wandb_works_offline(tmp_path, tiny_config, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional: pip install 'gradmatch[experiments]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small = [
        "merges={TA: {method: task_arithmetic}}",
        "compare=[]",
        "data.tasks=[books]",
        "sweep=null",
        "name=tracked",
    ]
    assert main(["run", str(tiny_config), *small, "--results", str(tmp_path / "results")]) == 0
    assert not (tmp_path / "wandb").exists()
    assert (
        main(
            [
                "run",
                str(tiny_config),
                *small,
                "delta0=1e-5",
                "wandb=true",
                "--results",
                str(tmp_path / "results"),
            ]
        )
        == 0
    )
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 4  # base, books, joint, TA
    assert all(list(run.glob("*.wandb")) for run in runs)
