"""Uncertainty-based gradient matching, and Fisher averaging as its limit without a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.rules.block import total
from gradmatch.rules.matrix_options import MatrixOptions
from gradmatch.rules.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HbarOptions(MatrixOptions):
    """What the weights are inside Hbar."""

    hbar_weight: float | None = option(
        None, "[0, inf]", kind=1.0, help="takes the place of alpha inside Hbar (default: alpha itself)"
    )


def gradient_matching(
    theta0: Tensor,
    tau: Tensor,
    alpha: Tensor,
    h0: Tensor | float,
    h: Tensor,
    hbar_weight: float | None = None,
) -> Tensor:
    """Eq. 12 of Daheim et al. 2024: theta0 + sum_t alpha_t Hbar^-1 (H0 + H_t) tau_t, with Hbar = H0 + sum_t alpha_t H_t.

    theta0, h0: (*s,); tau, h: (T, *s); alpha: (T, 1, ..., 1). Returns (*s,). Curvatures are of summed losses (nats per
    squared unit of weight); h0 may be a number (isotropic). With H_t = 0 it is task arithmetic. A `hbar_weight` w takes the
    place of alpha inside Hbar alone: the merge is then linear in alpha, in the span of the Hbar^-1 (H0 + H_t) tau_t.

    Example:
        >>> import torch
        >>> theta0, tau, one = torch.zeros(1), torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
        >>> gradient_matching(theta0, tau, one, h0=1.0, h=torch.tensor([[1.0], [2.0]]))  # (2 * 1 + 3 * 3) / (1 + 1 + 2)
        tensor([2.7500])
    """
    h_bar = h0 + total((alpha if hbar_weight is None else hbar_weight) * h)
    return theta0 + total(alpha * (h0 + h) * tau) / h_bar


def fisher(theta0: Tensor, tau: Tensor, alpha: Tensor, delta0: float, h: Tensor) -> Tensor:
    """FA: (sum_t alpha_t H_t)^-1 sum_t alpha_t H_t theta_t, written as Eq. 12 with H0 = delta0.

    Shapes as in `gradient_matching`. The limit delta0 -> 0 is Fisher averaging (theta0 cancels); a positive delta0 decides
    only where no task knows anything, and there it falls back to task arithmetic.

    Example:
        >>> import torch
        >>> theta0, tau, one = torch.zeros(1), torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
        >>> fisher(theta0, tau, one, delta0=1e-9, h=torch.tensor([[1.0], [3.0]]))  # (1 * 1 + 3 * 3) / (1 + 3)
        tensor([2.5000])
    """
    return gradient_matching(theta0, tau, alpha, delta0, h)
