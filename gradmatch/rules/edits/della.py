"""DELLA's MAGPRUNE: drop small entries more often than large ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def widest(density: float) -> float:
    """The default epsilon, 0.1, or what a density leaves room for, so that every probability lies in (0, 1]."""
    return min(0.1, density, 2 * (1 - density))


def keep_probability(tau: Tensor, density: Tensor | float, epsilon: Tensor | float) -> Tensor:
    """MAGPRUNE (Deep et al. 2024): within a row of n entries, density - epsilon/2 for the smallest |tau| to density + epsilon/2.

    tau: (T, *s), rows along the last axis. Returns (T, *s). The steps between neighbours in rank are equal and the mean
    over a row is `density`; a row of length one has probability `density`. At density 1 everything stays.
    """
    import torch

    # a tensor without axes is a row of length one
    rows = tau.abs() if tau.dim() > 1 else tau.abs().unsqueeze(-1)
    n = rows.shape[-1]
    rank = torch.empty_like(rows)  # 0 for the smallest; of equal ones the first
    counted = torch.arange(n, dtype=tau.dtype, device=tau.device).expand(rows.shape[1:])
    for row, ranked in zip(
        rows, rank, strict=True
    ):  # task by task: the order takes twice the memory of the values
        ranked.scatter_(-1, row.argsort(dim=-1, stable=True), counted)
    return density + epsilon * (density < 1) * ((rank.reshape(tau.shape) + 0.5) / n - 0.5)


def della(tau: Tensor, noise: Tensor, density: Tensor | float, epsilon: Tensor | float) -> Tensor:
    """Keep each entry with its MAGPRUNE probability and divide it by that probability, so that the expectation is tau.

    tau, noise: (T, *s), noise uniform in [0, 1). Returns (T, *s).
    """
    probability = keep_probability(tau, density, epsilon)
    return tau * (noise < probability) / probability
