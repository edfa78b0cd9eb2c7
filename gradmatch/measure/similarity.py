"""Task vectors compared: cosines, norms, shares per layer, effective rank. Pure functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

EXACT, PROBES = 256, 32  # of `Ranks`: what is beyond costs more than the rest of a scan


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


def effective_rank(matrix: Tensor) -> float:
    """(sum_i s_i^2)^2 / sum_i s_i^4, the participation ratio of the squared singular values; 0 for a zero matrix.

    matrix: (m, ...), flattened to (m, n). See `Ranks` for how exact it is.
    """
    m = matrix.float().flatten(1)
    ranks = Ranks(1, len(m), m.shape[1], m.numel())
    ranks.add(m.reshape(1, -1))
    return ranks.found(m.square().sum(dtype=torch.float64)[None])[0]


class Ranks:
    """Effective ranks (see `effective_rank`) of T matrices of one shape that come a piece at a time: whole rows, or parts of one.

    sum s^4 = ||A'A||_F^2 is exact where the whole is one piece and its smaller side at most EXACT. Else it is the mean of
    ||A'A z||^2 over PROBES random sign vectors z (seeded): within about a quarter of the rank for rank 1, and 1/sqrt(rank) of that
    beyond. Of rows that are longer than a piece (stacks of experts), evenly spaced columns are taken.

    Args:
        count: T.
        rows: m.
        width: n.
        piece: number of values that pieces have at most.
    """

    def __init__(self, count: int, rows: int, width: int, piece: int) -> None:
        self.shape, self.whole = (count, rows, width), rows * width <= piece
        self.step = 1 if width <= piece else -(-rows * width // piece)
        self.exact = min(rows, width) <= EXACT and self.whole
        self.columns: list[Tensor] = []
        self.fourth = torch.zeros(count, dtype=torch.float64)
        if self.step == 1 and not self.exact:
            signs = torch.randint(0, 2, (width, PROBES), generator=torch.Generator().manual_seed(0))
            self.z = signs.float() * 2 - 1
            self.applied = torch.zeros(count, width, PROBES)

    def add(self, tau: Tensor) -> None:
        """The next piece, (T, values)."""
        count, _, width = self.shape
        if self.step > 1:
            self.columns.append(tau[:, :: self.step].clone())
            return
        part = tau.view(count, -1, width)
        if self.exact:
            small = part if part.shape[1] <= width else part.transpose(1, 2)
            self.fourth = (small @ small.transpose(1, 2)).double().square().sum((1, 2))
        else:
            self.applied += part.transpose(1, 2) @ (part @ self.z)

    def found(self, squares: Tensor) -> list[float]:
        """The ranks, from ||A||_F^2 (T,) of the whole matrices."""
        if self.step > 1:
            sampled = torch.cat(self.columns, 1).view(*self.shape[:2], -1)
            return [effective_rank(one) for one in sampled]
        fourth = self.fourth if self.exact else self.applied.double().square().sum((1, 2)) / PROBES
        most = min(self.shape[1:])
        ranks = (squares.square() / fourth.clamp(min=1e-300)).clamp(1, most)
        found: list[float] = torch.where(squares > 0, ranks, 0.0).tolist()
        return found
