"""Stage: fine-tune a vision model with transformers' Trainer; the base first gets a head, a linear probe a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed

from experiments.finetune import run, training_arguments, write_card
from experiments.vision.models import Rows, card, classes_of, load, load_split, new_classifier, save


def finetune(
    out: Path,
    *,
    data: Path,
    domains: Sequence[str],
    start: Path | str,
    pixels: int | None = None,
    probe: int | None = None,
    precision: str,
    seed: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    warmup_steps: int,
    weight_decay: float,
) -> None:
    """Fine-tune the trunk of `start` on the training images of some sets, all taken together; the head stays.

    start: the folder of another run, or a model's name together with `pixels` and `probe` (images of a set that its part of
    the head is fitted to): then the head is fitted before training, and again after it, for every set.
    Writes `out/model`, `out/optimizer.pt` and `out/training.json`.
    """
    set_seed(seed)
    sets = card(data)
    if isinstance(start, Path):
        model = load(start / "model")
    else:
        assert pixels is not None
        model = new_classifier(start, pixels, sum(own["classes"] for own in sets.values()))
        fit_head(model, data, domains, probe or 1000, seed)
    for parameter in model.get_submodule("classifier").parameters():
        parameter.requires_grad_(False)
    arguments = training_arguments(
        out / "trainer", precision=precision, seed=seed, steps=steps, learning_rate=learning_rate, batch_size=batch_size,
        warmup_steps=warmup_steps, weight_decay=weight_decay,
    )  # fmt: skip
    rows = torch.utils.data.ConcatDataset([_in_common_head(data, name) for name in domains])
    trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=CommonHeadLoss(sets))
    losses = run(trainer)
    torch.save(trainer.optimizer.state_dict(), out / "optimizer.pt")
    if not isinstance(start, Path):
        fit_head(model, data, list(sets), probe or 1000, seed)
    save(model, out / "model")
    write_card(out, sum(sets[name]["train"] for name in domains), precision, losses)


def _in_common_head(data: Path, name: str) -> Rows:
    rows = load_split(data, name, "train")
    return Rows(rows.images, rows.labels + classes_of(data, name).start)


class CommonHeadLoss:
    """Cross-entropy over the classes of the label's own set; labels count in the common head."""

    def __init__(self, sets: Mapping[str, Any]) -> None:
        self.owner = torch.cat(
            [torch.full((own["classes"],), index) for index, own in enumerate(sets.values())]
        )

    def __call__(self, output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Mean over the batch. logits (B, classes of all sets), labels (B,)."""
        owner = self.owner.to(labels.device)
        foreign = owner[None] != owner[labels][:, None]  # (B, classes)
        return nn.functional.cross_entropy(output.logits.float().masked_fill(foreign, float("-inf")), labels)


def fit_head(model: nn.Module, data: Path, domains: Sequence[str], examples: int, seed: int) -> None:
    """Each set's rows of the head: ridge-penalised softmax regression on the model's features, by L-BFGS in float64."""
    head = model.get_submodule("classifier")
    for name in domains:
        rows, own = load_split(data, name, "train").subset(examples, seed), classes_of(data, name)
        weight, bias = fit_probe(features(model, rows), rows.labels, own.stop - own.start)
        with torch.no_grad():
            head.weight[own] = weight.to(head.weight)
            head.bias[own] = bias.to(head.bias)


@torch.inference_mode()
def features(model: nn.Module, rows: Rows) -> Tensor:
    """(n, width) what the head is given."""
    seen: list[Tensor] = []
    handle = model.get_submodule("classifier").register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    device = next(model.parameters()).device
    for batch in rows.batches(64, device):
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
