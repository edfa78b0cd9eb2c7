"""DARE: drop and rescale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def drop(tau: Tensor, noise: Tensor, density: Tensor | float) -> Tensor:
    """DARE's first step: each entry stays with probability `density`. Shapes as in `dare`."""
    return tau * noise.clone().lt_(
        density
    )  # a mask of floats: torch multiplies booleans several times slower


def dare(
    tau: Tensor,
    noise: Tensor,
    density: Tensor | float,
    rescale: str = "unbiased",
    ratio: Tensor | None = None,
) -> Tensor:
    """DARE (Yu et al. 2024): keep each entry with probability `density`, divide what stays by it.

    tau: (T, *s); noise: (T, *s), uniform in [0, 1); density: a number or (T, 1, ..., 1). Returns (T, *s), whose expectation
    is tau. rescale="l1" multiplies by `ratio` instead, (T, 1, ..., 1), which restores each tensor's sum of |tau| (`l1_ratio`);
    it follows the draw and is biased on small tensors. "none" leaves what stays as it is.
    """
    kept = drop(tau, noise, density)
    if rescale == "unbiased":
        return kept / density
    return kept if ratio is None else kept * ratio


def l1_ratio(before: Tensor, after: Tensor) -> Tensor:
    """sum |tau| / sum |kept| for each model from both sums, (T,); 0 where nothing was kept."""
    return (after != 0) * before / after.masked_fill(after == 0, 1)
