"""Removing tasks: Eq. 13 with its positivity guard, and the negations it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.rules.matrix_options import MatrixOptions
from gradmatch.rules.options import option

if TYPE_CHECKING:
    from torch import Tensor


GUARDS = ("floor", "scale")


@dataclass(frozen=True)
class RemovalOptions(MatrixOptions):
    """What must remain of the base's curvature."""

    keep: float = option(0.1, "(0, 1]", help="share of H0 that must remain of H0 - alpha H_t")
    guard: str = option(
        "floor", choices=GUARDS, help="how: floor the denominator, or scale the tasks' curvature down"
    )


def removal(
    theta0: Tensor,
    tau: Tensor,
    alpha: Tensor,
    h0: Tensor | float,
    h: Tensor,
    keep: float,
    guard: str = "floor",
) -> Tensor:
    """Eq. 13 of Daheim et al. 2024: theta0 - sum_t alpha_t (H0 - sum_s alpha_s H_s)^-1 (H0 + H_t) tau_t.

    It is Eq. 12 with alpha -> -alpha, and equals retraining without D_t on quadratic losses. theta0, h0: (*s,); tau, h:
    (T, *s); alpha > 0: (T, 1, ..., 1); 0 < keep <= 1. Returns (*s,). What remains of the base's curvature must stay
    positive, at least keep * H0, but noisy diagonals break H0 > sum_s alpha_s H_s. What happens there is the guard's:

    floor: the denominator alone is floored, theta0 - sum_t alpha_t (H0 + H_t) tau_t / max(H0 - sum_s alpha_s H_s, keep H0).
        A step then reaches alpha (H0 + H_t) / (keep H0) times tau, which has no bound where the base knows next to nothing
        (in language models the rows of words that the kept text never uses, which can ruin the model).
    scale: every H_t is scaled down by the same factor until it holds, in both places, which bounds the step.

    Example:
        >>> import torch
        >>> theta0, tau, half = torch.ones(1), torch.tensor([[1.0]]), torch.tensor([[0.5]])
        >>> removal(theta0, tau, half, torch.tensor([1.0]), torch.tensor([[1.0]]), keep=0.1)  # 1 - 0.5 * 2 / (1 - 0.5)
        tensor([-1.])
    """
    removed = (alpha * h).sum(0)
    if guard == "floor":
        left = h0 - removed
        return theta0 - (alpha * (h0 + h) * tau).sum(0) / left.maximum(left.new_tensor(keep) * h0)
    allowed = (1 - keep) * h0
    share = (allowed / removed).where(removed > allowed, removed.new_ones(()))
    return theta0 - (alpha * (h0 + share * h) * tau).sum(0) / (h0 - share * removed)


def ewr(theta0: Tensor, tau: Tensor, alpha: Tensor, h0: Tensor | float, h: Tensor) -> Tensor:
    """Elastic weight removal: (H0 theta0 - sum_t alpha_t H_t tau_t) / (H0 + sum_t alpha_t H_t); Daheim et al. 2023.

    Shapes as in `removal`. Like FA1 it mixes origins: theta0 itself shrinks by H0 / (H0 + alpha H_t) where the task's
    curvature is large. alpha = 0 returns the base.

    Example:
        >>> import torch
        >>> theta0, tau, half = torch.ones(1), torch.tensor([[1.0]]), torch.tensor([[0.5]])
        >>> ewr(theta0, tau, half, 1.0, torch.tensor([[2.0]]))  # (1 - 0.5 * 2) / (1 + 0.5 * 2)
        tensor([0.])
    """
    return (h0 * theta0 - (alpha * h * tau).sum(0)) / (h0 + (alpha * h).sum(0))


def fisher_negation(theta0: Tensor, tau: Tensor, alpha: Tensor, h0: Tensor | float, h: Tensor) -> Tensor:
    """Negation scaled by how much of the curvature is the task's: theta0 - sum_t alpha_t H_t / (H0 + H_t) tau_t.

    Shapes as in `removal`. A baseline: it spares what only the base needs, but does not account for what removing a task
    does to the curvature that remains.

    Example:
        >>> import torch
        >>> theta0, tau, half = torch.ones(1), torch.tensor([[1.0]]), torch.tensor([[0.5]])
        >>> fisher_negation(theta0, tau, half, 1.0, torch.tensor([[1.0]]))  # 1 - 0.5 / 2
        tensor([0.7500])
    """
    return theta0 - (alpha * h / (h0 + h) * tau).sum(0)
