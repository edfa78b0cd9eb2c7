"""Localize-and-Stitch without data: the largest entries of every task vector, averaged where they meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.rules.block import total

if TYPE_CHECKING:
    from torch import Tensor


def localize(tau: Tensor, alpha: Tensor, threshold: Tensor | float) -> Tensor:
    """He et al. 2024, data-free: tau'_t = gamma_t tau_t / sum_s |alpha_s| gamma_s, gamma_t = 1 at the largest |tau_t| of the model.

    tau: (T, *s); alpha: (T, 1, ..., 1); threshold: (T, 1, ..., 1), the k-th largest |tau_t| of the model, k by the share `density`.
    Returns (T, *s), such that sum_t alpha_t tau'_t is stitched: where one task alone claims an entry it is that task's, and where
    several do it is their (weighted) mean. Entries equal to the threshold all stay; those that are 0 claim nothing.

    Example:
        >>> import torch
        >>> localize(torch.tensor([[4.0, 1.0, 2.0], [3.0, -5.0, 0.0]]), torch.ones(2, 1), 2.0).sum(0)
        tensor([ 3.5000, -5.0000,  2.0000])
    """
    claims = (
        tau.abs().ge_(threshold).mul_(tau.sign().abs_())
    )  # as floats, which torch multiplies faster than booleans
    weight = total(alpha.abs() * claims)
    divisor = weight + weight.abs().eq_(0)
    return claims.mul_(tau).div_(divisor)
