"""REPAIR (Jordan et al. 2023): units of an average vary less than those of its ends; their statistics are put right again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.batchnorm import BATCH_NORMS
from gradmatch.rebasin.learned import with_statistics
from gradmatch.rebasin.probing import Call, calls_of

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
LEAST = 1e-6  # of a unit's spread


def repair(
    module: nn.Module,
    merged: Mapping[str, Tensor],
    ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    data: Iterable[Any],
    share: float = 0.5,
) -> dict[str, Tensor]:
    """An average whose units have the mean and spread that lie between those of its ends.

    Layer by layer in the order in which data pass them, each unit's incoming weights and bias are scaled and shifted. In a
    network with BatchNorm its statistics are measured again instead, which comes to the same. Layers without a bias are scaled alone.

    Args:
        module: whose structure the weights are of; linear and convolution layers.
        merged: the average, by the module's names.
        ends: the two (aligned) models that it lies between.
        data: batches to measure on.
        share: of the second end.

    Returns:
        The tensors of `merged`, repaired.

    Raises:
        ValueError: no data, a layer that two places share, or values that are not finite.

    >>> layer = torch.nn.Linear(1, 1)
    >>> ends = {"weight": torch.tensor([[2.0]]), "bias": torch.zeros(1)}, {"weight": torch.tensor([[-2.0]]), "bias": torch.zeros(1)}
    >>> merged = {"weight": torch.tensor([[0.5]]), "bias": torch.zeros(1)}
    >>> repair(layer, merged, ends, [torch.tensor([[-1.0], [1.0]])])["weight"]
    tensor([[2.]])
    """
    batches = list(data)
    calls = calls_of(batches)
    if any(isinstance(layer, BATCH_NORMS) for layer in module.modules()):
        return with_statistics(module, merged, batches)
    first, second = (measured(module, end, calls) for end in ends)
    fixed = {name: value.clone() for name, value in merged.items()}
    for name in list(first)[:-1] or list(
        first
    ):  # the last layer answers: it is left as it is, unless it is the only one
        mean, spread = measured(module, fixed, calls)[name]
        wanted_mean = torch.lerp(first[name][0], second[name][0], share)
        wanted = torch.lerp(first[name][1], second[name][1], share)
        scale = torch.where(spread > LEAST, wanted / spread.clamp(min=LEAST), torch.ones_like(spread))
        if not bool(scale.isfinite().all()):
            raise GradmatchError(f"the outputs of {name!r} are not finite on these data", "not_finite", name)
        prefix = f"{name}." if name else ""
        weight, bias = fixed[f"{prefix}weight"], fixed.get(f"{prefix}bias")
        fixed[f"{prefix}weight"] = weight * scale.to(weight).reshape(-1, *[1] * (weight.dim() - 1))
        if bias is not None:
            fixed[f"{prefix}bias"] = ((bias - mean.to(bias)) * scale.to(bias) + wanted_mean.to(bias)).to(bias)
    return fixed


def measured(
    module: nn.Module, weights: Mapping[str, Tensor], calls: list[Call]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> mean and spread of each unit's outputs, (units,) float64, in the order in which data pass the layers."""
    with _watched(module) as seen, torch.no_grad():
        for call in calls:
            functional_call(module, dict(weights), call.args, dict(call.kwargs or {}))
    found = {}
    for name, parts in seen.items():
        x = torch.cat(parts, 1)
        found[name] = x.mean(1), x.std(1, unbiased=False)
    return found


@contextmanager
def _watched(module: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What every linear and convolution layer gives, as (units, positions); in evaluation mode."""
    seen: dict[str, list[Tensor]] = {}
    modes = [(part, part.training) for part in module.modules()]

    def observed(name: str, last: bool) -> Any:
        def hook(_: nn.Module, __: Any, result: Tensor) -> None:
            seen.setdefault(name, []).append(
                result.detach().double().movedim(-1 if last else 1, 0).flatten(1)
            )

        return hook

    hooks = [
        layer.register_forward_hook(observed(name, isinstance(layer, torch.nn.Linear)))
        for name, layer in module.named_modules()
        if isinstance(layer, LAYERS)
    ]
    module.eval()
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes:
            part.training = training
