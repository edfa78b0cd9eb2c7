"""DARE: drop and rescale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def dare(tau: Tensor, noise: Tensor, density: Tensor | float, rescale: str = "unbiased") -> Tensor:
    """DARE (Yu et al. 2024): keep each entry with probability `density`, divide what stays by it.

    tau: (T, *s); noise: (T, *s), uniform in [0, 1); density: a number or (T, 1, ..., 1). Returns (T, *s), whose expectation is tau. rescale="l1" instead
    restores each tensor's sum of |tau|, which follows the draw and is biased on small tensors; "none" leaves what stays as it is.
    """
    kept = tau * (noise < density)
    if rescale == "unbiased":
        return kept / density
    if rescale == "none":
        return kept
    return kept * l1_ratio(tau, kept)


def l1_ratio(tau: Tensor, kept: Tensor) -> Tensor:
    """sum |tau| / sum |kept| for each model, (T, 1, ..., 1); 0 where nothing was kept."""
    axes = tuple(range(1, tau.dim()))
    before, after = (x.abs().sum(axes, keepdim=True) if axes else x.abs() for x in (tau, kept))
    return (after != 0) * before / after.masked_fill(after == 0, 1)
