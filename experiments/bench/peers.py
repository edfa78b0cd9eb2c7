"""Per-example squares by other libraries, each as (shape) -> step() -> {name: mean of squares}. None is required.

All compute the diagonal empirical Fisher (true labels), the one quantity that every library offers. What cannot run
raises Unavailable with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.shapes import Shape

Result = dict[str, Tensor]
Step = Callable[[], Result]


class Unavailable(Exception):
    """A library that is not installed, or cannot do this model; the message says why."""


class TooSlow(Unavailable):
    """A contender that was not ready within its time."""


def _inputs(shape: Shape) -> tuple[Any, Tensor]:
    """Inputs without masks (all tokens are real here) and labels."""
    if isinstance(shape.batch, dict):
        return shape.batch["input_ids"], shape.batch["labels"]
    return shape.batch


def _rows(shape: Shape, first: int, last: int) -> Any:
    if isinstance(shape.batch, dict):
        return {key: value[first:last] for key, value in shape.batch.items()}
    return tuple(value[first:last] for value in shape.batch)


def check_memory(shape: Shape) -> None:
    """Refuse what would hold B x P numbers and their copies in more than half of the free memory (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    needed = 3 * 4 * shape.examples * shape.parameters()
    if needed > free / 2:
        largest = shape.examples * free // (2 * needed)
        raise Unavailable(
            f"would need {needed / 2**30:.0f} GiB (B x P); here it could do about {largest} examples"
        )


def loop(shape: Shape) -> Step:
    """One example at a time."""

    def step() -> Result:
        names = list(shape.model.named_parameters())
        sums = {name: torch.zeros_like(value) for name, value in names}
        for n in range(shape.examples):
            loss = shape.loss(shape.model, _rows(shape, n, n + 1))
            for (name, _), g in zip(
                names, torch.autograd.grad(loss, [v for _, v in names], allow_unused=True), strict=True
            ):
                if g is not None:
                    sums[name].addcmul_(g, g)
        return {name: value / shape.examples for name, value in sums.items()}

    return step


def vmap_grad(shape: Shape) -> Step:
    """torch.func.vmap(grad): per-example gradients of everything at once."""
    check_memory(shape)
    values = {name: value.detach() for name, value in shape.model.named_parameters()}
    inputs, labels = _inputs(shape)
    if hasattr(shape.model, "config"):
        shape.model.config.use_cache = False

    def loss(at: Result, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(shape.batch, dict):
            logits = torch.func.functional_call(shape.model, at, (x[None],))
            return nn.functional.cross_entropy(logits, y[None])
        logits = torch.func.functional_call(shape.model, at, (), {"input_ids": x[None]}).logits
        if y.dim():  # a language model: the tokens are the labels
            return nn.functional.cross_entropy(logits[0, :-1], y[1:], reduction="sum")
        return nn.functional.cross_entropy(logits, y[None])

    def step() -> Result:
        found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, inputs, labels)
        return {name: value.square_().mean(0) for name, value in found.items()}

    return step


def opacus(shape: Shape) -> Step:
    """Opacus' GradSampleModule; it works in train mode only, so dropout is switched off by hand."""
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError as error:
        raise Unavailable("not installed") from error
    check_memory(shape)
    model = copy.deepcopy(shape.model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")

    def step() -> Result:
        batch = shape.batch
        if isinstance(batch, dict):
            length = batch["input_ids"].shape[1]
            offset = 2 if "Roberta" in type(model).__name__ else 0
            places = torch.arange(offset, length + offset).expand(shape.examples, length)
            inputs = {"input_ids": batch["input_ids"], "position_ids": places}
            logits = wrapped(**inputs).logits
            if logits.dim() == 3:
                loss = nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
                )
            else:
                loss = nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
        else:
            loss = nn.functional.cross_entropy(wrapped(batch[0]), batch[1], reduction="sum")
        loss.backward()
        each = {name: getattr(value, "grad_sample", None) for name, value in model.named_parameters()}
        found = {name: value.square().mean(0) for name, value in each.items() if value is not None}
        wrapped.zero_grad(set_to_none=True)
        return found

    return step


def backpack(shape: Shape) -> Step:
    """BackPACK's SumGradSquared, for nn.Sequential."""
    try:
        from backpack import backpack as extended
        from backpack import extend
        from backpack.extensions import SumGradSquared
    except ImportError as error:
        raise Unavailable("not installed") from error
    if not isinstance(shape.model, nn.Sequential):
        raise Unavailable("no transformers models (LayerNorm, Conv1D, residuals)")
    model, loss = extend(copy.deepcopy(shape.model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def step() -> Result:
        with extended(SumGradSquared()):
            loss(model(shape.batch[0]), shape.batch[1]).backward()
        found = {name: value.sum_grad_squared / shape.examples for name, value in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return found

    return step


def _laplace(shape: Shape, backend: str) -> Step:
    try:
        import laplace.curvature as curvature
    except ImportError as error:
        raise Unavailable("not installed") from error
    if isinstance(shape.batch, dict) and shape.batch["labels"].dim() > 1:
        raise Unavailable("classification of sequences only")
    if backend.startswith("Curvlinops"):
        check_memory(shape)

    class Logits(nn.Module):
        """laplace-torch wants a model that returns a tensor."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(input_ids=x).logits

    plain = not isinstance(shape.batch, dict)
    model = copy.deepcopy(shape.model).eval()
    model = model if plain else Logits(model)
    inputs, labels = _inputs(shape)
    found = getattr(curvature, backend)(model, "classification")
    names = [name if plain else name.removeprefix("model.") for name, _ in model.named_parameters()]
    sizes = [value.numel() for value in model.parameters()]
    shapes = [value.shape for value in model.parameters()]

    def step() -> Result:
        _, flat = found.diag(inputs, labels, N=shape.examples)
        pieces = flat.detach().split(sizes)
        return {n: piece.view(s) / shape.examples for n, piece, s in zip(names, pieces, shapes, strict=True)}

    return step


def laplace_ef(shape: Shape) -> Step:
    """laplace-torch's empirical Fisher through Curvlinops."""
    return _laplace(shape, "CurvlinopsEF")


def laplace_asdl(shape: Shape) -> Step:
    """laplace-torch's empirical Fisher through ASDL."""
    return _laplace(shape, "AsdlEF")


PEERS: dict[str, Callable[[Shape], Step]] = {
    "batch-size-1 loop": loop,
    "torch.func vmap(grad)": vmap_grad,
    "opacus": opacus,
    "BackPACK": backpack,
    "laplace-torch, Curvlinops": laplace_ef,
    "laplace-torch, ASDL": laplace_asdl,
}
