"""Arcee Fusion (mergekit): only the entries that matter, by how far they moved and how much their row's softmax did."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-8  # added to probabilities before their logarithm
FENCE = 1.5  # interquartile ranges above the median, as in a box plot


def importance(theta0: Tensor, tau: Tensor) -> Tensor:
    """|tau_t| KL(softmax theta_t || softmax theta0), the divergence that of a row (the last axis). theta0: (*s); tau: (T, *s)."""
    if not theta0.dim():
        return tau * 0
    p, q = (x.softmax(-1).add_(EPS) for x in (theta0 + tau, theta0))
    divergence = (p / q).log_().mul_(p).sum(-1, keepdim=True)
    return tau.abs() * divergence


def quartiles(numel: int) -> tuple[int, int, int]:
    """Ranks, from the largest, of the entries at places floor(q (n - 1)) of n sorted ones, q = 3/4, 1/2, 1/4.

    Example:
        >>> quartiles(5)
        (2, 3, 4)
    """
    third, median, first = (numel - int(share * (numel - 1)) for share in (0.75, 0.5, 0.25))
    return third, median, first


def fusion(tau: Tensor, size: Tensor, third: Tensor, median: Tensor, first: Tensor) -> Tensor:
    """tau_t where its importance is at least median + 1.5 (Q3 - Q1) over the tensor, else 0.

    tau, size: (T, *s), the importances; the quartiles: (T, 1, ..., 1), of all entries (mergekit samples a million of larger
    tensors). Returns (T, *s).

    Example:
        >>> import torch
        >>> tau = torch.tensor([[0.1, 0.2, 0.3, 0.4, 3.0]])
        >>> fusion(tau, importance(torch.zeros(5), tau), *importance(torch.zeros(5), tau)[0, [3, 2, 1]])
        tensor([[0., 0., 0., 0., 3.]])
    """
    return tau * (size >= median + FENCE * (third - first)).to(tau.dtype)
