"""Task vectors compared: cosines, norms, shares per layer, effective rank. Pure functions of tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def gram(vectors: Tensor) -> Tensor:
    """u_i'u_j in float64. (K, P) -> (K, K); sums over tensors give the Gram matrix of whole models."""
    wide = vectors.double()
    return wide @ wide.T


def cosines(gram_matrix: Tensor) -> Tensor:
    """cos(u_i, u_j) = u_i'u_j / (||u_i|| ||u_j||) from a Gram matrix; 0 where a vector is zero. (K, K) -> (K, K)."""
    norms = gram_matrix.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms[None, :]
    return torch.where(scale > 0, gram_matrix / scale.clamp(min=1e-300), torch.zeros_like(gram_matrix))


def projection(gram_matrix: Tensor, products: Tensor, square: float) -> tuple[Tensor, float]:
    """Coordinates c of a vector d in a span (least squares, G c = U'd) and the share of ||d||^2 outside it.

    Args:
        gram_matrix: (K, K) U'U.
        products: (K,) U'd.
        square: ||d||^2.

    Returns:
        c (K,) and the residual share in [0, 1]; parallel directions share their coordinate (minimum norm).
    """
    if square == 0:
        return torch.zeros_like(products), 0.0
    c = torch.linalg.pinv(gram_matrix, rtol=1e-10, hermitian=True) @ products
    residual = square - 2 * float(c @ products) + float(c @ gram_matrix @ c)
    return c, min(1.0, max(0.0, residual / square))


def effective_rank(matrix: Tensor, probes: int = 16) -> float:
    """(sum_i s_i^2)^2 / sum_i s_i^4, the participation ratio of the squared singular values; 0 for a zero matrix.

    sum s^4 = ||A'A||_F^2 exactly from the smaller Gram matrix, or, beyond a thousand rows and columns, as the mean of
    ||A'A z||^2 over `probes` random sign vectors z (seeded). matrix: (m, ...), flattened to (m, n).
    """
    m = matrix.float().flatten(1)
    m = m / m.abs().max().clamp(min=1e-30)  # keeps fourth powers in range
    if min(m.shape) <= 1000:
        small = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
        fourth = float(small.double().square().sum())
    else:
        generator = torch.Generator().manual_seed(0)
        z = torch.randint(0, 2, (m.shape[1], probes), generator=generator).float() * 2 - 1
        fourth = float((m.T @ (m @ z)).double().square().sum()) / probes
    return float(m.square().sum(dtype=torch.float64)) ** 2 / fourth if fourth > 0 else 0.0


def row_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of corresponding rows. (R, P), (R, P) -> (R,) float32; rows that are zero in either count as 1 (unmoved)."""
    dots = (a.float() * b.float()).sum(1)
    norms = a.float().norm(dim=1) * b.float().norm(dim=1)
    return torch.where(norms > 0, dots / norms.clamp(min=1e-30), torch.ones_like(dots))


def moved_rows(
    before: Tensor,
    after: Tensor,
    own: Tensor | None = None,
    *,
    below: float = math.sqrt(0.5),
    sample: int = 512,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `after` that look like another row of `before`: what permuted neurons and shifted vocabularies leave.

    A row is suspect where its cosine with its own old self is below `below` (more of it is new than kept); for up to
    `sample` evenly spaced suspects, the most similar old row is looked up.

    Args:
        before: (R, P) weights of the base.
        after: (R, P) weights of the fine-tune.
        own: (R,) their `row_cosines`, where they are known.
        below: cosine under which a row is suspect.
        sample: at most so many suspects are looked up.

    Returns:
        suspects (S,) their indices, matches (S,) the most similar old row, similarities (S,) that cosine.
    """
    own = row_cosines(before, after) if own is None else own
    suspects = (own < below).nonzero().flatten()
    if len(suspects) > sample:
        suspects = suspects[torch.linspace(0, len(suspects) - 1, sample).long()]
    if len(suspects) == 0:
        return suspects, suspects, torch.zeros(0)
    old = torch.nn.functional.normalize(before.float(), dim=1)
    new = torch.nn.functional.normalize(after[suspects].float(), dim=1)
    similarity, match = (new @ old.T).max(1)
    return suspects, match, similarity
