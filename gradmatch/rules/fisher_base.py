"""FA1: Fisher averaging with the base's curvature, as in the authors' earlier work."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def fisher_base(theta0: Tensor, tau: Tensor, alpha: Tensor, h0: Tensor | float, h: Tensor) -> Tensor:
    """FA1: (H0 theta0 + sum_t alpha_t H_t tau_t) / (H0 + sum_t alpha_t H_t); Daheim et al. 2023, compared in 2024.

    theta0, h0: (*s,); tau, h: (T, *s); alpha: (T, 1, ..., 1). Returns (*s,). It averages the point theta0 with the
    *differences* tau_t, two quantities of different origin. So it is not Eq. 12 with H0 = 0, one model at weight 1 does
    not return itself, and T equal models do not return that model: theta0 is pulled towards zero by H_t. alpha = 0
    returns the base.

    Example:
        >>> import torch
        >>> theta0, tau, one = torch.zeros(1), torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
        >>> fisher_base(theta0, tau, one, h0=1.0, h=torch.tensor([[1.0], [2.0]]))  # (1 + 6) / (1 + 1 + 2)
        tensor([1.7500])
    """
    return (h0 * theta0 + (alpha * h * tau).sum(0)) / (h0 + (alpha * h).sum(0))
