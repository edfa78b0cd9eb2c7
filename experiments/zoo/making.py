"""Stages: what does harm in a zoo. Labels in a wrong order, a base of other random weights, noise on a fine-tune."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from experiments.files import CARD, write_json
from experiments.models import load_classifier, load_tokenizer, save
from experiments.rows import sets_of


def shuffled(out: Path, *, data: Path, seed: int) -> None:
    """A training split whose labels are in a random order, domain by domain: nothing can be learnt from it but noise."""
    from datasets import disable_progress_bars, load_from_disk

    disable_progress_bars()
    for domain in sets_of(data):
        table: Any = load_from_disk(str(data / domain / "train"))
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).tolist()
        labels = table["labels"][:]
        moved = table.remove_columns("labels").add_column("labels", [labels[row] for row in order])
        (out / domain).mkdir(parents=True)
        moved.save_to_disk(out / domain / "train")
    shutil.copy(data / CARD, out / CARD)


def reinitialised(out: Path, *, model: Path, seed: int) -> None:
    """A model of the same architecture whose weights are drawn anew: what is trained from it is of another base."""
    torch.manual_seed(seed)
    trained: Any = load_classifier(model / "model")
    save(type(trained)(copy.deepcopy(trained.config)), out / "model", load_tokenizer(str(model / "model")))
    write_json(out / "training.json", {"losses": []})


def noisy(out: Path, *, model: Path, scale: float, seed: int) -> None:
    """A fine-tune with normal noise on every weight, of `scale` times the standard deviation of its tensor."""
    generator = torch.Generator().manual_seed(seed)
    spoilt: Any = load_classifier(model / "model")
    with torch.no_grad():
        for weight in spoilt.parameters():
            spread = weight.std() if weight.numel() > 1 else weight.abs().mean()
            weight += scale * spread * torch.randn(weight.shape, generator=generator)
    save(spoilt, out / "model", load_tokenizer(str(model / "model")))
    write_json(out / "training.json", {"losses": []})
