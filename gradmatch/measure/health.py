"""Health of the numbers themselves: not finite, rounded away, decided by a floor, mostly noise, statistics out of date."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.estimators.curvature import Curvature

BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)


def count_nonfinite(tensor: Tensor) -> int:
    """Number of NaN and infinite entries; 0 for integers."""
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


def on_grid(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value is exactly representable in `dtype`: the tensor went through it, whatever it is stored as."""
    return bool((tensor.to(dtype).to(tensor.dtype) == tensor).all())


def rounding_energy(tensor: Tensor, dtype: torch.dtype) -> float:
    """Expected sum of squared rounding errors of storing a tensor in `dtype`: sum (spacing)^2 / 12, units of weight squared.

    spacing = 2^floor(log2 |x|) eps: uniform error within half a spacing on each side.
    """
    exponents = torch.frexp(tensor.float()).exponent - 1
    spacing = (
        torch.ldexp(torch.full_like(exponents, 1, dtype=torch.float32), exponents) * torch.finfo(dtype).eps
    )
    spacing = spacing.masked_fill(tensor == 0, 0.0)  # zero is stored exactly
    return float(spacing.double().square().sum()) / 12


def floor_share(h: Tensor, delta0: float) -> tuple[int, int]:
    """(number of weights whose curvature is below delta0, number of weights): there the floor, not the data, decides.

    h: (*s,) H0 + sum_t alpha_t H_t without the floor, of summed losses.
    """
    return int((h < delta0).sum()), h.numel()


def fisher_noise(curvature: Curvature) -> float | None:
    """Relative standard error of an estimated diagonal: sqrt(sum se^2 / sum mean^2) over the tensors that carry one.

    At least sqrt(2 / n) for n examples: the square of a Gaussian gradient has relative deviation sqrt(2), and real ones have heavier
    tails, of which an error estimated from few examples knows nothing. None where neither is known.
    """
    seen = curvature.info.get("examples_seen", "")
    least = (2 / int(seen)) ** 0.5 if seen.isdecimal() and int(seen) > 0 else None
    square = error = 0.0
    for name in curvature:
        se = curvature.standard_error(name)
        if se is not None:
            square += float(curvature.mean(name).double().square().sum())
            error += float(se.double().square().sum())
    return max(least or 0.0, float((error / square) ** 0.5)) if square > 0 else least


@contextmanager
def observed_inputs(module: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, for every BatchNorm by name, per-channel (count, mean, mean of squares) of what goes in; rows of (3, C)."""
    seen: dict[str, list[Tensor]] = {}

    def observe(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double()
            flat = x.transpose(0, 1).flatten(1)  # (C, everything else)
            count = torch.full((len(flat),), float(flat.shape[1]), dtype=torch.float64)
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


def batchnorm_statistics(
    module: nn.Module, weights: Mapping[str, Tensor], runs: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]
) -> dict[str, Tensor]:
    """Mean and variance of each BatchNorm's input on data: name.running_mean and name.running_var, (C,) each.

    The layers keep normalising with batch statistics meanwhile (as in training), so that every layer sees inputs that are
    already corrected below it.

    Args:
        module: its structure.
        weights: of the model to look at.
        runs: (args, kwargs) of forward passes.
    """
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    own = {**dict(module.named_parameters()), **buffers}
    placed = {name: value.to(own[name]) for name, value in weights.items() if name in own}
    try:
        for layer in module.modules():
            if isinstance(layer, BATCH_NORMS):
                layer.train()
        with observed_inputs(module) as seen, torch.no_grad():
            for args, kwargs in runs:
                fresh = {name: value.clone() for name, value in placed.items()}
                functional_call(module, {**buffers, **fresh}, args, kwargs)
    finally:
        for layer, training in modes:
            layer.training = training
    statistics: dict[str, Tensor] = {}
    for name, rows in seen.items():
        count, mean, square = torch.stack(rows).unbind(1)
        share = count / count.sum(0)
        centre = (share * mean).sum(0)
        statistics[f"{name}.running_mean"] = centre.float()
        statistics[f"{name}.running_var"] = ((share * square).sum(0) - centre.square()).clamp(min=0).float()
    return statistics


def batchnorm_shift(stored: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square over channels of (observed mean - running mean) / running deviation, by BatchNorm layer.

    0 where the stored statistics are those of the data; 1 where the typical channel is off by a standard deviation.
    """
    shifts = {}
    for key, mean in observed.items():
        if key.endswith("running_mean") and key in stored:
            name = key.removesuffix(".running_mean")
            deviation = stored[f"{name}.running_var"].double().clamp(min=1e-12).sqrt()
            z = (mean.double() - stored[key].double()) / deviation
            shifts[name] = float(z.square().mean().sqrt())
    return shifts
