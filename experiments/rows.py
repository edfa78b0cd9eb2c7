"""Rows of a split as every stage takes them, whether texts or images: counted, drawn, batched, with the outputs that are theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.files import CARD

IGNORED = -100  # the label of a token that no loss counts
MODEL_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")
# Of ImageNet, which the vision models were trained with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batch = dict[str, Tensor]
Views = (
    Path | Mapping[str, Path]
)  # prepared data: a folder a split (see `tasks.views`), or one folder with all splits


class Rows:
    """The rows of one split. `classes`: which of a model's outputs are theirs; labels count from the first of these."""

    classes = slice(None)

    def __len__(self) -> int:
        raise NotImplementedError

    def documents(self) -> Any:
        """(n,) which document each row belongs to; None where each is its own."""
        return None

    def subset(self, count: int, seed: int) -> Rows:
        """`count` of them drawn without replacement by the seed; all where there are fewer."""
        raise NotImplementedError

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[list[int], Batch]]:
        """(indices of rows, what the model takes)."""
        raise NotImplementedError

    def given(self, size: int, model: nn.Module | None = None) -> list[Batch]:
        """All batches, on the model's device."""
        device = next(model.parameters()).device if model else "cpu"
        return [batch for _, batch in self.batches(size, device)]


class Texts(Rows):
    """Tokenised texts: a `datasets.Dataset`, memory-mapped. pad: the token that fills up, which the mask hides."""

    def __init__(self, table: Any, pad: int = 0) -> None:
        self.table, self.pad = table, pad

    def __len__(self) -> int:
        return len(self.table)

    def documents(self) -> Any:
        """(n,) which document each text belongs to."""
        if "document" not in self.table.column_names:
            return None
        return np.unique(self.table["document"][:], return_inverse=True)[1]

    def subset(self, count: int, seed: int) -> Texts:
        if count >= len(self):
            return self
        return Texts(self.table.shuffle(seed=seed).select(range(count)), self.pad)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[list[int], Batch]]:
        """Padded, of like length; the longest first, so that the largest memory is needed at once rather than at the end."""
        names = [name for name in MODEL_COLUMNS if name in self.table.column_names]
        lengths = [len(ids) for ids in self.table["input_ids"]]
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            chosen, width, batch = self.table[indices], lengths[indices[0]], {}
            for name in names:
                values = [torch.as_tensor(value) for value in chosen[name]]
                if name != "labels":
                    fill = self.pad if name == "input_ids" else 0
                    values = [
                        nn.functional.pad(value, (0, width - len(value)), value=fill) for value in values
                    ]
                batch[name] = torch.stack(values).to(device)
            yield indices, batch


class Language(Texts):
    """Texts for a language model: every token but those of the context is a label."""

    def subset(self, count: int, seed: int) -> Language:
        return Language(super().subset(count, seed).table, self.pad)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[list[int], Batch]]:
        contexts = self.table["context"][:]
        for indices, batch in super().batches(size, device):
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            for row, index in enumerate(indices):
                batch["labels"][row, : contexts[index]] = IGNORED
            yield indices, batch


class Images(Rows, torch.utils.data.Dataset[Batch]):
    """Images (n, 1 or 3, P, P) of bytes and labels (n,), ready for the model when they are read."""

    def __init__(self, images: Tensor, labels: Tensor, classes: slice) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """One image with its label in the common head, as a fine-tuning on several sets takes it."""
        return {
            "pixel_values": normalised(self.images[index]),
            "labels": self.labels[index] + self.classes.start,
        }

    def subset(self, count: int, seed: int) -> Images:
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(self.images[chosen], self.labels[chosen], self.classes)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[list[int], Batch]]:
        """In their order."""
        for start in range(0, len(self), size):
            indices = list(range(start, min(start + size, len(self))))
            images, labels = (part[start : start + size] for part in (self.images, self.labels))
            yield indices, {"pixel_values": normalised(images).to(device), "labels": labels.to(device)}


def normalised(images: Tensor) -> Tensor:
    """(..., 1 or 3, P, P) bytes -> (..., 3, P, P), as the model was trained: grey three times over, ImageNet's mean and scale."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


def load_split(data: Views, name: str, split: str) -> Any:
    """One split of one domain (texts) or set (images): `Texts` or `Images`."""
    folder = view_of(data, split)
    file = folder / name / f"{split}.safetensors"
    if file.is_file():
        saved = load_file(file)
        return Images(saved["images"], saved["labels"], classes_of(data, name))
    from datasets import load_from_disk

    card = card_of(data)
    kind = Language if card.get("language") else Texts
    return kind(load_from_disk(str(folder / name / split)), card["pad"])


def view_of(data: Views, split: str) -> Path:
    """The folder that holds a split."""
    return data[split] if isinstance(data, Mapping) else data


def card_of(data: Views) -> dict[str, Any]:
    """What is said of prepared data: `domains` with their classes, and of texts `pad`, `notes`."""
    folder = next(iter(data.values())) if isinstance(data, Mapping) else data
    loaded: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
    return loaded


def sets_of(data: Views) -> dict[str, Any]:
    """What is said of each domain or set: its first class in the head, and the names of its classes."""
    found: dict[str, Any] = card_of(data)["domains"]
    return found


def classes_of(data: Views, name: str) -> slice:
    """The classes of one image set in the common head."""
    own = sets_of(data)[name]
    return slice(own["first"], own["first"] + len(own["classes"]))
