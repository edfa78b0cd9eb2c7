"""Rules of one model beside the base that take over some of its entries: nearswap and arcee_fusion of mergekit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.rules.options import Options, option

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-8  # added to probabilities before their logarithm
FENCE = 1.5  # interquartile ranges above the median, as in a box plot


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


def arcee_fusion(theta0: Tensor, tau: Tensor, alpha: Sequence[float], options: Any) -> Tensor:
    """theta0 + m tau_1, m = 1 where |tau_1| KL(softmax theta_1 || softmax theta0) is at least median + 1.5 (Q3 - Q1) over the tensor.

    theta0: (*s); tau: (1, *s). Returns (*s). The divergence is that of a row (the last axis). Quartiles are the entries at
    places floor(q (n - 1)) of the sorted importances, all of which are looked at (mergekit samples a million of larger tensors).

    Example:
        >>> import torch
        >>> theta = torch.tensor([0.1, 0.2, 0.3, 0.4, 3.0])
        >>> arcee_fusion(torch.zeros(5), theta[None], [1.0], None)
        tensor([0., 0., 0., 0., 3.])
    """
    theta = theta0 + tau[0]
    p, q = (x.softmax(-1) + EPS if x.dim() else x.new_tensor(1 + EPS) for x in (theta, theta0))
    divergence = (p * (p / q).log()).sum(-1, keepdim=True) if theta.dim() else theta.new_zeros(())
    importance = tau[0].abs() * divergence
    first, median, third = (
        importance.flatten().kthvalue(1 + int(share * (importance.numel() - 1))).values
        for share in (0.25, 0.5, 0.75)
    )
    return theta0 + tau[0] * (importance >= median + FENCE * (third - first))
