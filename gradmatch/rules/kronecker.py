"""Kronecker merging: Eq. 12 with the curvature of every linear layer as A (x) B, solved by conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.rules.block import NotPositiveError, Product
from gradmatch.rules.options import Options, option

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Curved

# of the largest eigenvalue: factors are stored in float32, so smaller ones may come out negative
NOISE = 1e-6


@dataclass(frozen=True)
class KroneckerOptions(Options):
    """When conjugate gradients stop, and how square matrices are stored."""

    iterations: int = option(100, "[1, inf]", help="conjugate gradients stop after so many")
    tolerance: float = option(1e-6, "[0, inf]", help="or where the residual is this share of the right side")
    conv1d: bool | None = option(
        None, kind=True, help="whether square matrices are stored [in, out] (default: as the config says)"
    )


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found: the update, (out, in), and how exactly, |b - Hbar x| / |b|.

    `positive` is False where a direction of negative curvature was met, beyond rounding: then there is no minimum.
    """

    update: Tensor
    iterations: int
    residual: float
    positive: bool = True


def kronecker(
    tau: Tensor,
    alpha: Sequence[float],
    h0: Product,
    h: Sequence[Product],
    iterations: int = 100,
    tolerance: float = 1e-6,
) -> Solution:
    """x of Eq. 12, (H0 + sum_t alpha_t H_t) x = sum_t alpha_t (H0 + H_t) tau_t, with H = A (x) B: MaTS (Tam et al. 2024) with H0.

    Preconditioned conjugate gradients from task arithmetic, x = sum_t alpha_t tau_t, so that what no curvature sees stays
    there, and one model at weight 1 is found at once. They stop where the residual is `tolerance` of the right side, or after
    `iterations`.

    tau: (T, out, in) in float64; h0, h: of summed losses. H0 + sum_t alpha_t H_t must be positive. Returns the update x, (out, in).

    Example:
        >>> import torch
        >>> tau, one = torch.tensor([[[1.0]], [[3.0]]]).double(), torch.ones(1, 1).double()
        >>> h = [Product(n, one, one) for n in (1.0, 2.0)]
        >>> kronecker(tau, [1.0, 1.0], Product(diagonal=1.0), h).update.item()  # as Eq. 12: (2 * 1 + 3 * 3) / (1 + 1 + 2)
        2.75
    """
    x = _weighted(alpha, tau)
    right = _weighted(alpha, [h0(t) + curve(t) for t, curve in zip(tau, h, strict=True)])
    size = float(right.norm())
    if size == 0:
        return Solution(x, 0, 0.0)
    approximate = Preconditioner([(1.0, h0), *zip(alpha, h, strict=True)])

    def h_bar(w: Tensor) -> Tensor:
        return h0(w) + _weighted(alpha, [curve(w) for curve in h])

    residual = right - h_bar(x)
    direction, rho, done = None, 0.0, 0
    while float(residual.norm()) > tolerance * size and done < iterations:
        z = approximate(residual)
        before, rho = rho, float((residual * z).sum())
        direction = z if direction is None else z + (rho / before) * direction
        image = h_bar(direction)
        curvature = float((direction * image).sum())
        if not curvature > 0:
            noise = NOISE * approximate.largest * float(direction.square().sum())
            return Solution(x, done, float(residual.norm()) / size, positive=-curvature <= noise)
        step = rho / curvature
        x, residual, done = x + step * direction, residual - step * image, done + 1
    return Solution(x, done, float((right - h_bar(x)).norm()) / size)


def solve(theta0: Tensor, tau: Tensor, alpha: Sequence[float], curved: Curved) -> Tensor:
    """`kronecker` as the rule of a matrix; its health is the number of iterations and the residual.

    Raises:
        NotPositiveError: H0 + sum_t alpha_t H_t is not positive.
    """
    options: Any = curved.options
    found = kronecker(tau, alpha, curved.h0, curved.h, options.iterations, options.tolerance)
    if not found.positive:
        raise NotPositiveError
    curved.health.update(iterations=float(found.iterations), residual=found.residual)
    return theta0 + found.update


class Preconditioner:
    """The inverse of one Kronecker product near sum_k w_k (s_k A_k (x) B_k + D_k): exact where there is a single product.

    A = sum_k w_k s_k tr(B_k) A_k and B = sum_k w_k s_k tr(A_k) B_k / sum_k w_k s_k tr(A_k) tr(B_k) have the sum's partial traces;
    with their eigenvectors, A (x) B + mean(D) is a diagonal. Negative weights count as positive.
    """

    def __init__(self, terms: Sequence[tuple[float, Product]]) -> None:
        import torch

        flat = sum(abs(weight) * _mean(term.diagonal) for weight, term in terms)
        products = [
            (abs(weight) * term.scale, term.a, term.b) for weight, term in terms if term.a is not None
        ]
        self._vectors: tuple[Tensor, Tensor | None] | None = None
        self._values: Tensor | float = flat or 1.0
        self.largest = flat  # eigenvalue
        rows = max([1, *(len(b) for *_, b in products if b is not None)])  # identities alone: one of any size
        a, b, total = (
            0.0 * products[0][1],
            torch.eye(rows, dtype=products[0][1].dtype, device=products[0][1].device) * 0.0,
            0.0,
        )
        for scale, one, given in products:
            other = torch.eye(rows, dtype=one.dtype, device=one.device) if given is None else given
            a = a + scale * other.trace() * one
            b = b + scale * one.trace() * other
            total += scale * float(one.trace() * other.trace())
        if not total > 0:
            return
        b = b / total
        a_values, a_vectors = torch.linalg.eigh(a)
        b_values, b_vectors = torch.linalg.eigh(b)
        values = b_values.clamp(min=0)[:, None] * a_values.clamp(min=0) + flat
        self.largest = float(values.max())
        self._values = values.clamp(min=NOISE * self.largest)
        self._vectors = a_vectors, b_vectors if rows > 1 else None

    def __call__(self, w: Tensor) -> Tensor:
        """About Hbar^-1 w; (out, in)."""
        if self._vectors is None:
            return w / self._values
        a, b = self._vectors
        turned = (w if b is None else b.T @ w) @ a / self._values
        return (turned if b is None else b @ turned) @ a.T


def _weighted(alpha: Sequence[float], values: Sequence[Tensor] | Tensor) -> Tensor:
    """sum_t alpha_t values_t."""
    total = alpha[0] * values[0]
    for weight, value in zip(alpha[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def _mean(diagonal: Tensor | float) -> float:
    """Mean of a diagonal, given as a tensor or a number."""
    return float(diagonal) if isinstance(diagonal, (int, float)) else float(diagonal.mean())
