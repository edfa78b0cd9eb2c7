"""Curvatures of one matrix W (out, in) as linear maps: identity, diagonal, Kronecker product B (x) A, and sums of them.

Each adds, is multiplied by a number, is applied to a matrix, and tells its diagonal in any orthonormal basis of the matrix's
rows and columns. `gradmatch.rules.system` inverts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# of a factor's norm is added to it before it is inverted as a first approximation: directions that it hardly sees then stay near where they
# begin. Undamped, the first steps went a hundred times the task vectors there (three tasks on a 22M encoder, KFAC of 320 examples)
SLIGHT = 0.03
SMALL = 128  # rows: a matrix up to this size is decomposed in double precision, which costs little


class Structure:
    """A symmetric linear map of matrices (out, in), as a sum of `terms`."""

    @property
    def terms(self) -> tuple[Product, ...]:
        """The summands."""
        raise NotImplementedError

    def __call__(self, w: Tensor) -> Tensor:
        """The map applied to a matrix, (out, in)."""
        first, *others = self.terms
        applied = first.times(w)
        for term in others:
            applied = applied + term.times(w)
        return applied

    def __add__(self, other: Structure) -> Sum:
        return Sum(self.terms + other.terms)

    def __rmul__(self, factor: float) -> Sum:
        return Sum(
            tuple(replace(t, scale=factor * t.scale, diagonal=factor * t.diagonal) for t in self.terms)
        )


@dataclass(frozen=True)
class Product(Structure):
    """scale * B W A + diagonal * W: one Kronecker product and one diagonal, either of which may be zero.

    Attributes:
        scale: N of the summed loss, times its weight.
        a: second moments of the inputs, (in, in); None for the identity.
        b: those of the gradients at the outputs, (out, out); None for the identity. Without a and b there is no product.
        diagonal: (out, in) or a number, in nats per squared unit of weight.

    Example:
        >>> import torch
        >>> Product(2.0, a=torch.diag(torch.tensor([1.0, 3.0])), diagonal=0.5)(torch.ones(1, 2))
        tensor([[2.5000, 6.5000]])
    """

    scale: float = 0.0
    a: Tensor | None = None
    b: Tensor | None = None
    diagonal: Tensor | float = 0.0

    @property
    def terms(self) -> tuple[Product, ...]:
        """Itself."""
        return (self,)

    @property
    def is_diagonal(self) -> bool:
        """Whether it has no Kronecker product."""
        return (self.a is None and self.b is None) or self.scale == 0

    @property
    def positive(self) -> bool:
        """Whether neither its product nor its diagonal takes anything away, as far as traces and signs tell."""
        traces = [1.0 if factor is None else float(factor.trace()) for factor in (self.a, self.b)]
        least = self.diagonal if isinstance(self.diagonal, (int, float)) else float(self.diagonal.min())
        return least >= 0 and (self.is_diagonal or self.scale * traces[0] * traces[1] >= 0)

    def times(self, w: Tensor) -> Tensor:
        """The map applied to a matrix."""
        result: Tensor = self.diagonal * w
        if self.is_diagonal:
            return result
        turned = w if self.b is None else self.b @ w
        return result + self.scale * (turned if self.a is None else turned @ self.a)

    def times_columns(self, w: Tensor, s: Tensor) -> Tensor:
        """(H W) s without the whole of H W; w (out, in), s (in, k). Returns (out, k)."""
        result: Tensor = (self.diagonal * w) @ s
        if self.is_diagonal:
            return result
        turned = w @ (s if self.a is None else self.a @ s)
        return result + self.scale * (turned if self.b is None else self.b @ turned)


@dataclass(frozen=True)
class Sum(Structure):
    """Any number of products and diagonals."""

    parts: tuple[Product, ...]

    @property
    def terms(self) -> tuple[Product, ...]:
        """Its summands."""
        return self.parts


@dataclass(frozen=True)
class Moments(Structure):
    """I (x) scale (X'X + ridge mean(diag X'X) I) of rows X (k, in), whose square matrix is made where it is asked for.

    Example:
        >>> import torch
        >>> Moments(torch.tensor([[1.0, 0.0]]), ridge=0.5)(torch.ones(1, 2))  # X'X = diag(1, 0), mean 1/2
        tensor([[1.2500, 0.2500]])
    """

    rows: Tensor
    scale: float = 1.0
    ridge: float = 0.0

    @property
    def flat(self) -> float:
        """What stands beside X'X on its diagonal, times the scale."""
        return self.scale * self.ridge * float(self.rows.square().sum()) / self.rows.shape[-1]

    @property
    def terms(self) -> tuple[Product, ...]:
        """One product, with the square matrix."""
        return (Product(self.scale, a=self.rows.mT @ self.rows, diagonal=self.flat),)

    def __call__(self, w: Tensor) -> Tensor:
        """W X'X by two products with the rows."""
        result: Tensor = self.flat * w
        return result.add_((w @ self.rows.mT) @ self.rows, alpha=self.scale)

    def add_to(self, matrix: Tensor, right: Tensor, w: Tensor, weight: float) -> None:
        """matrix (in, in) += weight * scale * (X'X + ...) and right (out, in) += W times that, in place."""
        flat, scale = weight * self.flat, weight * self.scale
        matrix.addmm_(self.rows.mT, self.rows, alpha=scale)
        matrix.diagonal().add_(flat)
        right.addmm_(w @ self.rows.mT, self.rows, alpha=scale)
        right.add_(w, alpha=flat)


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions u (out, m) of a matrix's columns and v (in, n) of its rows; None for the unit vectors."""

    u: Tensor | None
    v: Tensor | None

    def into(self, w: Tensor) -> Tensor:
        """Coordinates U' W V, (m, n), of one matrix or of a stack."""
        turned = w if self.u is None else self.u.T @ w
        return turned if self.v is None else turned @ self.v

    def back(self, z: Tensor) -> Tensor:
        """The matrix U Z V'."""
        turned = z if self.u is None else self.u @ z
        return turned if self.v is None else turned @ self.v.T

    def diagonal(self, structure: Structure, like: Tensor) -> Tensor:
        """The diagonal of a map in this basis, (m, n): <u_i v_j', H u_i v_j'>; `like` is a matrix (out, in)."""
        rows = len(like) if self.u is None else self.u.shape[1]
        columns = like.shape[-1] if self.v is None else self.v.shape[1]
        found = like.new_zeros(rows, columns)
        for term in structure.terms:
            if not term.is_diagonal:
                b = _in_basis(self.u, term.b, like.new_ones(rows))
                a = _in_basis(self.v, term.a, like.new_ones(columns))
                found += term.scale * b[:, None] * a
            if isinstance(term.diagonal, (int, float)):
                found += term.diagonal
            else:
                spread = term.diagonal if self.u is None else self.u.square().T @ term.diagonal
                found += spread if self.v is None else spread @ self.v.square()
        return found


def nearest_product(structure: Structure, like: Tensor) -> Product:
    """One product and a multiple of I near a sum of products: it has the partial traces sum_j |s_j| tr(B_j) A_j, sum_j |s_j| tr(A_j) B_j.

    Its diagonal is the mean of the sum's diagonals, its factor None where all are. `like`: (out, in).
    """
    a: Tensor | None = None
    b: Tensor | None = None
    whole = flat = same_a = same_b = 0.0
    for term in structure.terms:
        flat += term.diagonal if isinstance(term.diagonal, (int, float)) else float(term.diagonal.mean())
        if term.is_diagonal:
            continue
        size = abs(term.scale)
        rows = size * (len(like) if term.b is None else float(term.b.trace()))
        columns = size * (like.shape[-1] if term.a is None else float(term.a.trace()))
        whole += rows * columns / (size or 1.0)
        if term.a is None:
            same_a += rows
        else:
            a = rows * term.a if a is None else a.add_(term.a, alpha=rows)
        if term.b is None:
            same_b += columns
        else:
            b = columns * term.b if b is None else b.add_(term.b, alpha=columns)
    if a is not None and b is not None:
        a.diagonal().add_(same_a)
        b.diagonal().add_(same_b)
    elif a is not None:
        whole = float(len(like))
    elif b is not None:
        whole = float(like.shape[-1])
    return Product(1 / whole if whole else 0.0, a, b, flat)


def common_basis(structure: Structure, like: Tensor) -> Basis:
    """Eigenvectors of the factors of `nearest_product`: of a single product its eigenbasis. `like`: (out, in)."""
    near = nearest_product(structure, like)
    return Basis(_eigenvectors(near.b), _eigenvectors(near.a))


def has_closed_basis(structure: Structure) -> bool:
    """Whether all of it is diagonal in `common_basis`: one product and multiples of the identity."""
    products = [term for term in structure.terms if not term.is_diagonal]
    return len(products) == 1 and all(isinstance(term.diagonal, (int, float)) for term in structure.terms)


def approximate_inverse(
    structure: Structure, like: Tensor, noise: float
) -> tuple[Callable[[Tensor], Tensor] | None, float]:
    """A symmetric positive map of matrices (out, in) near a sum's inverse, and about the sum's largest eigenvalue.

    (B + eps b I)^-1 R (A + eps a I)^-1 with the factors of `nearest_product` and a, b their norms. eps^2 is the diagonal beside the
    product as a share of a b, eps at least `SLIGHT`. Where a term takes something away: the sum's diagonal in
    that product's eigenbasis, at least `noise` of the largest, and None where it says that the sum is not positive.
    """
    near = nearest_product(structure, like)
    factors = [factor for factor in (near.b, near.a) if factor is not None]
    size, beside = near.scale, float(near.diagonal)
    for factor in factors:
        size *= float(factor.norm())
    if all(term.positive for term in structure.terms):
        if not size:
            return (lambda r: r), beside
        eps = max(SLIGHT, (beside / size) ** (1 / len(factors)))
        b, a = (None if factor is None else _inverse(factor, eps) for factor in (near.b, near.a))
        return (lambda r: Basis(b, a).into(r) / near.scale), size + beside
    basis = Basis(_eigenvectors(near.b), _eigenvectors(near.a))
    diagonal = basis.diagonal(structure, like)
    largest = float(diagonal.abs().max())
    if float(diagonal.min()) < -noise * largest:
        return None, largest
    floored = diagonal.clamp(min=noise * largest)
    return (lambda r: basis.back(basis.into(r) / floored)), largest


def one_sided(terms: Sequence[Product]) -> str:
    """Which single factor all Kronecker products have beside a multiple of the identity: "a", "b", or "" for neither."""
    if not all(isinstance(term.diagonal, (int, float)) for term in terms):
        return ""
    products = [term for term in terms if not term.is_diagonal]
    if products and all(term.b is None for term in products):
        return "a"
    return "b" if products and all(term.a is None for term in products) else ""


def _in_basis(vectors: Tensor | None, factor: Tensor | None, unit: Tensor) -> Tensor:
    """diag(V' F V), (n,), or `unit` (ones) where F is the identity.

    A factor of one sign has a diagonal of that sign in every basis. Where F sees next to nothing rounding says otherwise, and times
    the other factor and N that is more than delta0.
    """
    if factor is None:
        return unit
    found = factor.diagonal() if vectors is None else (vectors * (factor @ vectors)).sum(0)
    return found.clamp(min=0) if float(factor.trace()) >= 0 else found.clamp(max=0)


def _inverse(factor: Tensor, eps: float) -> Tensor:
    """(F + eps |F| I)^-1; of an F that rounding left short of positive, with a larger eps."""
    import torch

    damped, size = factor.clone(), float(factor.norm())
    while True:
        damped.diagonal().add_(eps * size)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info) or not math.isfinite(size):
            return torch.cholesky_inverse(lower)
        eps *= 10


def _eigenvectors(matrix: Tensor | None) -> Tensor | None:
    """Eigenvectors as columns, in the matrix's dtype."""
    import torch

    if matrix is None:
        return None
    wide = matrix.double() if len(matrix) <= SMALL else matrix
    vectors: Tensor = torch.linalg.eigh(wide).eigenvectors
    return vectors.to(matrix.dtype)
