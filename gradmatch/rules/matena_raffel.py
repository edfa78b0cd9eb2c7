"""Fisher merging as Matena and Raffel published it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.rules.options import Options, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MatenaRaffelOptions(Options):
    """How the Fishers are bounded and scaled."""

    floor: float = option(0.0, "[0, inf]", help="least value of a Fisher (theirs: 1e-6)")
    normalize_fishers: bool = option(False, help="divide each Fisher by its norm over the model")


def matena_raffel(theta: Tensor, alpha: Tensor, f: Tensor, floor: float) -> Tensor:
    """Matena & Raffel 2022: (sum_t alpha_t F_t)^-1 sum_t alpha_t F_t theta_t, F_t the per-example *mean* Fisher.

    theta, f: (T, *s); alpha: (T, 1, ..., 1). Returns (*s,). Each F_t is at least `floor` (theirs is 1e-6). Where all
    Fishers vanish nothing is known, and the coordinate is the weighted mean. Using the mean and not N_t F_t, a task's
    number of examples plays no role.

    Example:
        >>> import torch
        >>> theta, one = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
        >>> matena_raffel(theta, one, torch.tensor([[1.0], [3.0]]), floor=0.0)
        tensor([2.5000])
    """
    weight = alpha * f.clamp(min=floor)
    total = weight.sum(0)
    fallback = (alpha * theta).sum(0) / alpha.sum(0)
    return fallback.where(total == 0, (weight * theta).sum(0) / total.masked_fill(total == 0, 1))
