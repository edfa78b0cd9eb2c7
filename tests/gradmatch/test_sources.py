"""What makes two runs the same merge: everything that stands in a file they read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from gradmatch import Task
from gradmatch.merging import prepare
from gradmatch.output.identity import identity

VALUES = {"m.weight": torch.ones(4, 3), "n.weight": torch.ones(2)}


@pytest.fixture
def models(tmp_path):
    """base/ with a tokenizer, one/ fine-tuned from it, and adapter/, a LoRA of it."""
    for name in ("base", "one"):
        (tmp_path / name).mkdir()
        save_file(VALUES, tmp_path / name / "model.safetensors")
        (tmp_path / name / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", 2.0, alpha=4)
    return tmp_path


def write_adapter(folder, value, alpha):
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"m.lora_A.weight": torch.full((1, 3), value), "m.lora_B.weight": torch.ones(4, 1)}
    save_file(factors, folder / "adapter_model.safetensors")


def found(models, base=None, **options):
    tasks = [Task(models / "one"), Task(models / "adapter")]
    return identity(prepare(base or models / "base", tasks, method="task_arithmetic", **options))


CHANGES = {
    "the adapter's factors": lambda folder: write_adapter(folder / "adapter", 3.0, alpha=4),
    "the adapter's config": lambda folder: write_adapter(folder / "adapter", 2.0, alpha=8),
    "a task's weights": lambda folder: save_file(
        {**VALUES, "m.weight": torch.zeros(4, 3)}, folder / "one" / "model.safetensors"
    ),
    "a task's tokenizer": lambda folder: (folder / "one" / "vocab.txt").write_bytes(b"a\r\nb\r\n"),
    "the base's files": lambda folder: (folder / "base" / "merges.txt").write_text("a b\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_another_merge(models, change):
    before = found(models)
    assert found(models) == before
    CHANGES[change](models)
    assert found(models) != before


def test_another_option_or_library_is_another_merge(models, monkeypatch):
    before = found(models)
    assert found(models, scale=2.0) != before
    monkeypatch.setattr("gradmatch.output.identity.versions", lambda: {"gradmatch": "0"})
    assert found(models) != before


def test_models_in_memory_are_never_the_same(models):
    assert found(models, VALUES) != found(models, VALUES)
