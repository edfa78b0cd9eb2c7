"""Spherical means and Model Stock of every row by itself: the formulas of `gradmatch.rules.spherical` for a stack of vectors.

A row is what one output unit of a layer computes with (the filter of a convolution), so its direction has a meaning of its
own. Matrices (m, n) hold m vectors; `as_rows` makes them from a tensor, whichever way its vectors run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.rules.linear import weight_sum

if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 0.9995  # |cos| beyond which the arc is a line to working accuracy
TINY = 1e-8  # norms below this have no direction
ALONG = ("tensor", "rows", "columns")


def as_rows(flat: Tensor, shape: Sequence[int], along: str) -> Tensor:
    """The vectors of a tensor as rows of a matrix: (..., numel) -> (..., m, n).

    flat: all of a tensor of this shape, or whole rows of it. "rows": one vector an entry of the first axis; "columns": one an
    entry of the others. A tensor of one axis is one vector.
    """
    width = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    rows = flat.reshape(*flat.shape[:-1], -1, width)
    return rows.transpose(-1, -2) if along == "columns" and len(shape) > 1 else rows


def slerp_rows(one: Tensor, two: Tensor, t: float) -> Tensor:
    """s0 x_1 + s1 x_2 for each pair of rows, s0 = sin((1-t)O)/sin O, s1 = sin(tO)/sin O, O their angle; Shoemake 1985.

    one, two: (m, n); t in [0, 1]. Returns (m, n). Rows that are nearly parallel, or have no direction, are interpolated
    linearly, as in `gradmatch.rules.spherical.arc`.
    """
    norms = one.double().norm(dim=-1), two.double().norm(dim=-1)  # (m,)
    dot, size = (one.double() * two.double()).sum(-1), norms[0] * norms[1]
    straight = (norms[0] < TINY) | (norms[1] < TINY) | (dot.abs() > PARALLEL * size)
    omega = (dot / size.masked_fill(straight, 1.0)).masked_fill(straight, 0.0).acos()
    s0 = (((1 - t) * omega).sin() / omega.sin()).masked_fill(straight, 1 - t)
    s1 = ((t * omega).sin() / omega.sin()).masked_fill(straight, t)
    merged: Tensor = s0.to(one.dtype)[:, None] * one + s1.to(one.dtype)[:, None] * two
    return merged


def model_stock_rows(theta0: Tensor, tau: Tensor, clamp: bool = True) -> Tensor:
    """t mean(theta_t) + (1-t) theta0 row by row, t = T c / (1 + (T-1) c), c a row's mean cosine of tau; Jang et al. 2024.

    theta0: (m, n); tau: (T, m, n). Returns (m, n). With `clamp`, t stays within [0, 1]; a row without a task vector counts as orthogonal,
    as in `gradmatch.rules.spherical.model_stock`.
    """
    count = len(tau)
    if count == 1:
        return theta0 + tau[0]
    norm = tau.double().norm(dim=-1, keepdim=True)  # (T, m, 1)
    unit = tau.double() / norm.masked_fill(norm == 0, 1.0)
    ordered_pairs = unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))  # (m,)
    cosine = ordered_pairs / (count * (count - 1))
    denominator = 1 + (count - 1) * cosine
    opposed = denominator <= 0 if clamp else denominator == 0
    t = (count * cosine / denominator.masked_fill(opposed, 1.0)).masked_fill(opposed, 0.0)
    t = t.clamp(0, 1) if clamp else t
    merged: Tensor = theta0 + t.to(tau.dtype)[:, None] * tau.mean(0)
    return merged


# What the engine calls, on theta0 (m, n), tau (T, m, n), alpha and the options.


def slerp(theta0: Tensor, tau: Tensor, alpha: Sequence[float], options: Mapping[str, Any]) -> Tensor:
    """`slerp_rows` of two models."""
    return slerp_rows(theta0 + tau[0], theta0 + tau[1], options["t"])


def nuslerp(theta0: Tensor, tau: Tensor, alpha: Sequence[float], options: Mapping[str, Any]) -> Tensor:
    """theta0 + `slerp_rows` of two task vectors at t = alpha_2 / (alpha_1 + alpha_2)."""
    return theta0 + slerp_rows(tau[0], tau[1], alpha[1] / weight_sum(alpha))


def model_stock(theta0: Tensor, tau: Tensor, alpha: Sequence[float], options: Mapping[str, Any]) -> Tensor:
    """`model_stock_rows`, where weights play no role."""
    return model_stock_rows(theta0, tau, options["clamp"])
