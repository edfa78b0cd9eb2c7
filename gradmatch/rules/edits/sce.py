"""SCE: where the tasks differ most, by how much each of them moved, without the entries that go against the sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.rules.block import Cut, total
from gradmatch.rules.edits.ties import elect

if TYPE_CHECKING:
    from torch import Tensor

FLAT = 1e-6  # mean squares that sum to less say nothing of the tasks' sizes, which then count alike (as in mergekit)


def spread(tau: Tensor) -> Tensor:
    """Variance of every entry over the tasks, (1, *s), exactly 0 where they are equal. tau: (T, *s)."""
    apart = tau - tau[0]  # torch.var along the first axis takes twenty times as long
    apart -= total(apart) / len(tau)
    return (total(apart.square_()) / len(tau))[None]


def select(tau: Tensor, cut: Cut | None, first: int = 0) -> Tensor:
    """SCE's first step: entries of small variance over the tasks are 0 in every tau_t.

    tau: (T, *s), a piece that begins at place `first` of its tensor; `cut`: of the variances that stay, None where all do.
    """
    if cut is None:
        return tau
    held = Cut(cut.value[:1], cut.place[:1]).holds(spread(tau), first)  # one cut for all tasks
    return tau * held.to(tau.dtype)


def sce(tau: Tensor, weight: Tensor) -> Tensor:
    """Wan et al. 2024 (FuseChat), after `select`: tau'_t = w_t m_t tau_t / sum_s w_s m_s; their sum is what theta0 gets.

    tau: (T, *s); weight: w_t, (T, 1, ..., 1), the mean squares of the selected tau_t over the tensor. m_t is 1 where tau_t has the
    sign of sum_t tau_t (plus where it cancels), else 0. Returns (T, *s).

    Example:
        >>> import torch
        >>> tau = torch.tensor([[1.0, 1.0], [3.0, -1.0]])  # mean squares 1 and 5; the second entries cancel, so plus is kept
        >>> sce(tau, torch.tensor([[1.0], [5.0]])).sum(0)  # (1 * 1 + 5 * 3) / 6
        tensor([2.6667, 1.0000])
    """
    sign = elect(total(tau), 1.0)
    weights = tau.sign().eq_(sign).mul_(weight)
    summed = total(weights)
    divisor = summed + summed.abs().eq_(0)  # before the weights change: of one task the sum is itself
    return weights.mul_(tau).div_(divisor)
