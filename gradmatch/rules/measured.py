"""Gradient matching with the measured gradient of each fine-tuned model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def measured(theta0: Tensor, tau: Tensor, alpha: Tensor, h0: Tensor | float, h: Tensor, g: Tensor) -> Tensor:
    """theta0 + Hbar^-1 sum_t alpha_t (H_t tau_t - g_t): Eq. 12 without its assumption that g_t = -H0 tau_t (Eq. 8).

    theta0, h0: (*s,); tau, h, g: (T, *s); alpha: (T, 1, ..., 1). Returns (*s,). g_t is the gradient of the summed loss
    l_t at theta_t (true labels). Exact for quadratic losses with full curvature, however theta_t was reached: one model at
    weight 1 goes on to the minimum of its loss instead of returning itself. On networks a *diagonal* H is far too small
    along g and the step explodes; there, solve in the subspace spanned by the task vectors instead.

    Example:
        >>> import torch
        >>> theta0, tau, one = torch.zeros(1), torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
        >>> h, g = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [-3.0]])  # g = -H0 tau, as Eq. 8 has it: Eq. 12
        >>> measured(theta0, tau, one, h0=1.0, h=h, g=g)
        tensor([2.7500])
    """
    h_bar = h0 + (alpha * h).sum(0)
    return theta0 + (alpha * (h * tau - g)).sum(0) / h_bar
