"""Image classifiers with one common head: each set owns some of its classes, and sees only those.

So every model of a study has the same tensors, and merging needs no choice of heads: the head is fitted once on the base's
features (a linear probe a set) and stays as it is; fine-tuning moves the trunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.vision import packages

MEAN, DEVIATION = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet, which the models were trained with


def card(data: Path) -> dict[str, Any]:
    """What `prepare` says of the sets: first class, number of classes, images of each split."""
    loaded: dict[str, Any] = json.loads((data / "sets.json").read_text(encoding="utf-8"))
    return loaded


def classes_of(data: Path, name: str) -> slice:
    """The classes of one set in the common head."""
    own = card(data)[name]
    return slice(own["first"], own["first"] + own["classes"])


def new_classifier(encoder: str, pixels: int, num_labels: int) -> nn.Module:
    """A classifier with a new head on `dinov2` (from its package), a folder's, or a hub name's trunk."""
    if encoder == "dinov2":
        return ready(packages.dinov2(pixels, num_labels))
    from transformers import AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(
            encoder, num_labels=num_labels, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"cannot load a model from {encoder}: it is no folder with a model, and no hub that has it is within reach; "
            "encoder=dinov2 stands in for it (DINOv2-small, which needs only PyPI)"
        ) from error
    return ready(model)


def load(folder: Path, classes: slice | None = None) -> nn.Module:
    """The classifier in a folder; with `classes`, its outputs are the logits of those alone."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    return restricted(ready(model), classes) if classes else ready(model)


def restricted(model: nn.Module, classes: slice) -> nn.Module:
    """The same model, whose outputs are the logits of some classes alone; the names of its parameters stay."""

    def narrow(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.logits = output.logits[:, classes]
        return output

    model.register_forward_hook(narrow)
    return model


def ready(model: nn.Module) -> nn.Module:
    """In eval mode, without dropout, on the device there is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def save(model: nn.Module, folder: Path) -> None:
    """Configuration and weights, under the names that the module itself has: those that its curvature has too."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images and labels of a split (labels from 0 on within the set), ready for the model when they are read."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": normalised(self.images[index]), "labels": self.labels[index]}

    def subset(self, count: int, seed: int) -> Rows:
        """`count` of them drawn without replacement by the seed; all where there are fewer."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Rows(self.images[chosen], self.labels[chosen])

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
        """What the model takes, in order."""
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield {"pixel_values": normalised(images).to(device), "labels": labels.to(device)}


def load_split(data: Path, name: str, split: str) -> Rows:
    """One split of one set."""
    saved = load_file(data / name / f"{split}.safetensors")
    return Rows(saved["images"], saved["labels"])


def normalised(images: Tensor) -> Tensor:
    """(..., 1 or 3, P, P) bytes -> (..., 3, P, P), as the model was trained: grey three times over, ImageNet's mean and scale."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation
