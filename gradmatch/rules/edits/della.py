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
    # Task by task: the order takes twice the memory of the values.
    for row, ranked in zip(rows, rank, strict=True):
        ranked.scatter_(-1, order(row), counted)
    return density + epsilon * (density < 1) * ((rank.reshape(tau.shape) + 0.5) / n - 0.5)


def order(rows: Tensor) -> Tensor:
    """The places of a row's entries from the smallest on, equal ones as they stand. rows: (*s, n), none below 0. Returns (*s, n).

    Example:
        >>> import torch
        >>> order(torch.tensor([3.0, 0.0, 3.0, 1.0])).tolist()
        [1, 3, 0, 2]
    """
    import numpy as np
    import torch

    if rows.dtype != torch.float32 or rows.device.type != "cpu":
        return rows.argsort(dim=-1, stable=True)
    # The bits of floats that are not negative order like the values. With the places below them they are whole numbers that
    # all differ, which numpy sorts five times faster than torch sorts places by floats.
    keys = rows.view(torch.int32).numpy().astype(np.int64)
    keys <<= 32
    keys |= np.arange(rows.shape[-1])
    keys.sort(axis=-1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys)


def della(tau: Tensor, noise: Tensor, density: Tensor | float, epsilon: Tensor | float) -> Tensor:
    """Keep each entry with its MAGPRUNE probability and divide it by that probability, so that the expectation is tau.

    tau, noise: (T, *s), noise uniform in [0, 1). Returns (T, *s).
    """
    probability = keep_probability(tau, density, epsilon)
    return tau * noise.clone().lt_(probability) / probability
