"""Where task vectors pull against each other: sign conflicts, plain and weighted by curvature, and shared curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def sign_conflict(tau_s: Tensor, tau_t: Tensor, importance: Tensor | None = None) -> tuple[float, float]:
    """Share of weights on which two task vectors have opposite signs: sum w [tau_s tau_t < 0] / sum w [tau_s tau_t != 0].

    Args:
        tau_s: (*s,).
        tau_t: (*s,).
        importance: (*s,) w >= 0, e.g. |tau_s tau_t| or h_s + h_t; None counts every weight once.

    Returns:
        numerator and denominator, to be added over tensors; in random directions the ratio is 1/2.
    """
    product = tau_s.double() * tau_t.double()
    against, moving = product < 0, product != 0
    if importance is None:
        return float(against.sum()), float(moving.sum())
    w = importance.double()
    return float(w[against].sum()), float(w[moving].sum())


def curvature_overlap(h_s: Tensor, h_t: Tensor) -> tuple[float, float, float]:
    """Parts of sum sqrt(h_s h_t) / sqrt(sum h_s sum h_t): 1 where two tasks need the same weights, 0 where none is shared.

    Returns:
        (sum sqrt(h_s h_t), sum h_s, sum h_t), to be added over tensors; negative curvatures count as 0.
    """
    s, t = h_s.double().clamp(min=0), h_t.double().clamp(min=0)
    return float((s * t).sqrt().sum()), float(s.sum()), float(t.sum())


def outside_hull(delta: Tensor, taus: Tensor, reach: Tensor) -> float:
    """Energy of an update that no reweighting of the task vectors makes: sum (|delta| - 2 sum_t reach_t |tau_t|)_+^2.

    Every elementwise merge (averaging, Fisher, gradient matching, TIES ...) keeps each weight between multiples of its
    task vectors; the factor 2 leaves room for rescaling.

    Args:
        delta: (P,) merged minus base.
        taus: (T, P).
        reach: (T,) largest coefficients of the rule.

    Returns:
        that energy, to be added over tensors.
    """
    beyond = delta.abs() - 2 * reach.abs().to(taus) @ taus.abs()
    return float(beyond.clamp_(min=0).square_().sum(dtype=torch.float64))
