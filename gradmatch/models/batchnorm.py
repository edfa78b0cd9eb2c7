"""BatchNorm statistics of a module on data: the mean and variance of what goes into every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)


def batchnorm_statistics(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    runs: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]],
) -> dict[str, Tensor]:
    """Mean and variance over all data of each BatchNorm's input: name.running_mean and name.running_var, (C,) float32.

    The variance is that of all values together, unbiased, as torch keeps it. The layers normalise with the statistics of their
    batch meanwhile (as in training), so that every layer sees inputs that are already corrected below it. The module stays
    as it was.

    Args:
        module: its structure.
        weights: tensors that stand in for the module's own, by the module's names.
        runs: (args, kwargs) of forward passes; gone through once.

    Example:
        >>> layer = torch.nn.BatchNorm1d(1)
        >>> found = batchnorm_statistics(layer, {}, [((torch.tensor([[1.0], [3.0]]),), {})])
        >>> found["running_mean"], found["running_var"]
        (tensor([2.]), tensor([2.]))
    """
    modes = [(layer, layer.training) for layer in module.modules()]
    buffers = dict(module.named_buffers())
    module.eval()
    try:
        for layer in module.modules():
            if isinstance(layer, BATCH_NORMS):
                layer.train()
        with _observed(module) as seen, torch.no_grad():
            for args, kwargs in runs:
                fresh = {name: weights.get(name, value).clone() for name, value in buffers.items()}
                functional_call(module, {**weights, **fresh}, args, dict(kwargs))
    finally:
        for layer, training in modes:
            layer.training = training
    statistics: dict[str, Tensor] = {}
    for name, rows in seen.items():
        count, mean, square = torch.stack(rows).unbind(1)
        total = count.sum(0)
        centre = (count * mean).sum(0) / total
        variance = ((count * square).sum(0) / total - centre.square()).clamp(min=0)
        prefix = f"{name}." if name else ""
        statistics[f"{prefix}running_mean"] = centre.float()
        statistics[f"{prefix}running_var"] = (variance * total / (total - 1)).float()
    return statistics


@contextmanager
def _observed(module: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, for every BatchNorm by name, per-channel (count, mean, mean of squares) of what goes in; rows of (3, C)."""
    seen: dict[str, list[Tensor]] = {}

    def observe(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double()
            flat = x.transpose(0, 1).flatten(1)  # (C, everything else)
            count = torch.full((len(flat),), float(flat.shape[1]), dtype=torch.float64, device=flat.device)
            seen.setdefault(name, []).append(torch.stack([count, flat.mean(1), flat.square().mean(1)]))

        return hook

    handles = [
        layer.register_forward_pre_hook(observe(name))
        for name, layer in module.named_modules()
        if isinstance(layer, BATCH_NORMS)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
