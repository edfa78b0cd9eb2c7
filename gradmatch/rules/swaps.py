"""NearSwap of mergekit: a rule of one model beside the base that takes over the entries that are near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.rules.options import Options, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NearswapOptions(Options):
    """How near two entries must be."""

    t: float = option(
        1e-4, "[0, inf]", help="entries that differ by less are the task's, others move by this much"
    )


def nearswap(theta0: Tensor, tau: Tensor, t: float) -> Tensor:
    """w theta_1 + (1 - w) theta0 with w = min(1, t / |tau_1|): every entry moves towards the task's, by t at the most.

    theta0: (*s); tau: (1, *s). Returns (*s).

    Example:
        >>> import torch
        >>> nearswap(torch.zeros(3), torch.tensor([[0.1, -0.5, 2.0]]), t=0.5)
        tensor([ 0.1000, -0.5000,  0.5000])
    """
    return theta0 + tau[0].clamp(-t, t)
