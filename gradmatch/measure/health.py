"""Health of the numbers themselves: not finite, rounded away, decided by a floor, mostly noise, statistics out of date."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from gradmatch.estimators.curvature import STANDARD_ERROR
from gradmatch.models.curvatures import blocks
from gradmatch.models.stores import spans, take

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.estimators.curvature import Curvature

AT_ONCE = 2**20  # values of a curvature


def count_nonfinite(tensor: Tensor) -> int:
    """Number of NaN and infinite entries; 0 for integers."""
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


def on_grid(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value is exactly representable in `dtype`: the tensor went through it, whatever it is stored as."""
    return bool((tensor.to(dtype).to(tensor.dtype) == tensor).all())


def spacing_energy(tensor: Tensor) -> float:
    """sum 4^floor(log2 |x|), the squared spacings of the values in a precision with eps = 1; zero is stored exactly."""
    powers = (tensor.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent's bits alone
    return float(powers.square().sum(dtype=torch.float64))


def rounding_energy(tensor: Tensor, dtype: torch.dtype) -> float:
    """Expected sum of squared rounding errors of storing a tensor in `dtype`: sum (spacing)^2 / 12, units of weight squared.

    spacing = 2^floor(log2 |x|) eps: uniform error within half a spacing on each side.
    """
    return spacing_energy(tensor) * torch.finfo(dtype).eps ** 2 / 12


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
    means, errors = blocks(curvature), blocks(curvature, STANDARD_ERROR)
    square = error = 0.0
    for name in errors:
        for part in spans(errors.spec(name).numel, AT_ONCE):
            square += float(take(means, name, *part).double().square().sum())
            error += float(take(errors, name, *part).double().square().sum())
    return max(least or 0.0, float((error / square) ** 0.5)) if square > 0 else least


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
