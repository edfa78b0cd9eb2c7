"""One head for all image sets: each owns some of its classes, and sees only those.

So every model of a study has the same tensors, and merging needs no choice of heads: the head is fitted once on the base's
features (a linear probe a set) and stays as it is; fine-tuning moves the trunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.evaluate import BATCH
from experiments.models import IMAGES, NOTHING, ready
from experiments.rows import Images, Views, load_split
from experiments.vision import packages


def new_classifier(encoder: str, pixels: int, num_labels: int) -> nn.Module:
    """A classifier with a new head on `dinov2` (from its package), a folder's, or a hub name's trunk."""
    if encoder == "dinov2":
        return ready(packages.dinov2(pixels, num_labels))
    from transformers import AutoModelForImageClassification

    options = {"num_labels": num_labels, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    try:
        return ready(AutoModelForImageClassification.from_pretrained(encoder, **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(NOTHING.format(encoder, IMAGES)) from error


class CommonHeadLoss:
    """Cross-entropy over the classes of the label's own set; labels count in the common head."""

    def __init__(self, sets: Mapping[str, Any]) -> None:
        sizes = torch.tensor([len(own["classes"]) for own in sets.values()])
        self.owner = torch.arange(len(sizes)).repeat_interleave(sizes)  # of each class

    def __call__(self, output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Mean over the batch. logits (B, classes of all sets), labels (B,)."""
        owner = self.owner.to(labels.device)
        foreign = owner[None] != owner[labels][:, None]  # (B, classes)
        return nn.functional.cross_entropy(output.logits.float().masked_fill(foreign, float("-inf")), labels)


def fit_head(model: nn.Module, data: Views, domains: Sequence[str], examples: int, seed: int) -> None:
    """Each set's rows of the head: ridge-penalised softmax regression on the model's features, by L-BFGS in float64."""
    head = model.get_submodule("classifier")
    for name in domains:
        rows = load_split(data, name, "train").subset(examples, seed)
        own = rows.classes
        weight, bias = fit_probe(features(model, rows), rows.labels, own.stop - own.start)
        with torch.no_grad():
            head.weight[own] = weight.to(head.weight)
            head.bias[own] = bias.to(head.bias)


@torch.inference_mode()
def features(model: nn.Module, rows: Images) -> Tensor:
    """(n, width) what the head is given."""
    seen: list[Tensor] = []
    head = model.get_submodule("classifier")
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for _, batch in rows.batches(BATCH, next(model.parameters()).device):
        model(pixel_values=batch["pixel_values"])
    handle.remove()
    return torch.cat(seen).cpu()


def fit_probe(x: Tensor, labels: Tensor, classes: int, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """argmin_W,b mean cross-entropy + ridge/2 ||W||^2 on features divided by their root mean square. x (n, d) -> (classes, d), (classes,)."""
    x = x.double().clone()
    scale = x.square().mean().sqrt()
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(x / scale @ weight.T + bias, labels)
        loss = loss + ridge / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach() / scale, bias.detach()
