"""The one linear system: a merge is the mode of a product of Gaussian beliefs about the update x = theta - theta0.

Belief k says "x should be c_k" with the precision H_k (a curvature) and the weight w_k:

    minimise  sum_k w_k/2 (x - c_k)' H_k (x - c_k) + b'x     <=>     (sum_k w_k H_k) x = sum_k w_k H_k c_k - b

Eqs. 15-17 of Daheim et al. 2024. `gradmatch.rules.beliefs` writes the rules of the field as such lists; sum_k w_k H_k is the
posterior precision of the merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.rules.structures import (
    Basis,
    Moments,
    Structure,
    Sum,
    approximate_inverse,
    common_basis,
    has_closed_basis,
    one_sided,
)

if TYPE_CHECKING:
    from torch import Tensor

ITERATIONS, TOLERANCE = 100, 1e-6  # of conjugate gradients for the exact solution
QUICK = 0.05  # their tolerance where float32 and a few steps are enough
# of the largest eigenvalue: factors are stored in float32, so smaller ones may come out negative
NOISE = 1e-6
PROBES = 16


@dataclass(frozen=True)
class Belief:
    """What one source says of the update.

    Attributes:
        weight: w, negative for what is taken away.
        precision: H, of a matrix (out, in).
        centre: c, (out, in); the number 0 for the base itself.
    """

    weight: float
    precision: Structure
    centre: Tensor | float


@dataclass(frozen=True)
class Solution:
    """The update, (out, in), after how many iterations, and what is left: |sum_k w_k H_k (x - c_k) + b| over |sum_k w_k H_k c_k - b|.

    `positive` is False where sum_k w_k H_k is not positive definite, beyond rounding: then there is no mode.
    """

    update: Tensor
    iterations: int = 0
    residual: float = 0.0
    positive: bool = True


def posterior(beliefs: Sequence[Belief]) -> Sum:
    """sum_k w_k H_k."""
    return Sum(tuple(term for one in beliefs for term in (one.weight * one.precision).terms))


def right_side(beliefs: Sequence[Belief], like: Tensor, b: Tensor | None = None) -> Tensor:
    """sum_k w_k H_k c_k - b, (out, in)."""
    right = like.new_zeros(like.shape) if b is None else -b
    for one in beliefs:
        if not isinstance(one.centre, (int, float)):
            right = right + one.weight * one.precision(one.centre)
    return right


def remaining(beliefs: Sequence[Belief], x: Tensor, b: Tensor | None = None) -> Tensor:
    """sum_k w_k H_k (c_k - x) - b, what the update x leaves of the system; (out, in)."""
    import torch

    left = x.new_zeros(x.shape) if b is None else -b
    for one in beliefs:
        if isinstance(one.centre, (int, float)) or not torch.equal(one.centre, x):
            left = left + one.weight * one.precision(one.centre - x)
    return left


def residual(beliefs: Sequence[Belief], x: Tensor, b: Tensor | None = None, probes: int = PROBES) -> float:
    """|what x leaves of the system| over |its right side|; 0 where both are 0. Within a tenth or so, and the same at every call.

    From a few random directions s of signs, as |R|^2 = E |R s|^2: products of a matrix and a vector alone.
    """
    return _shares(beliefs, x, b, probes)[0]


def _shares(
    beliefs: Sequence[Belief], x: Tensor, b: Tensor | None, probes: int = PROBES
) -> tuple[float, float]:
    """The residual, and what it is a share of: |right side|, or |left side| where that is 0, or 1."""
    s = _signs(x, probes)
    left, right = x.new_zeros(len(x), probes), x.new_zeros(len(x), probes)
    for one in beliefs:
        for term in one.precision.terms:
            left += one.weight * term.times_columns(x, s)
            if not isinstance(one.centre, (int, float)):
                right += one.weight * term.times_columns(one.centre, s)
    if b is not None:
        right -= b @ s
    size = (float(right.norm()) or float(left.norm())) / probes**0.5 or 1.0
    return float((left - right).norm()) / probes**0.5 / size, size


def solve(
    beliefs: Sequence[Belief],
    like: Tensor,
    b: Tensor | None = None,
    start: Tensor | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Solution:
    """The mode of a list of beliefs about a matrix, exactly.

    In closed form where all precisions are diagonal (elementwise), where all have one factor beside the identity, as RegMean's
    (one Cholesky factorisation), or where there is one Kronecker product and a multiple of the identity (its eigenbasis); else by
    `iterate`, from `start`.

    `like`: any matrix (out, in) of the dtype and device of the arithmetic.

    Example:
        >>> import torch
        >>> from gradmatch.rules.structures import Product
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> h0, *h = (Product(n, a=one, b=one) for n in (1.0, 1.0, 2.0))  # Eq. 12 of tau = 1, 3: (2 * 1 + 3 * 3) / (1 + 1 + 2)
        >>> solve([Belief(1.0, h0, 4 * one), Belief(1.0, h[0], one), Belief(1.0, h[1], 3 * one)], one).update.item()
        2.75
    """
    agreed = common_centre(beliefs)
    if agreed is not None and b is None:
        return Solution(agreed)
    precision, right = posterior(beliefs), right_side(beliefs, like, b)
    terms = precision.terms
    products = [term for term in terms if not term.is_diagonal]
    if not products:
        diagonal = Basis(None, None).diagonal(precision, like)
        return _finished(beliefs, right / diagonal, b, bool((diagonal > 0).all()))
    if side := one_sided(terms):
        matrix = like.new_zeros(*[like.shape[-1] if side == "a" else len(like)] * 2)
        matrix.diagonal().add_(sum(float(term.diagonal) for term in terms))
        for term in products:
            matrix.add_(getattr(term, side), alpha=term.scale)
        return _by_cholesky(matrix, right, side)
    if has_closed_basis(precision):
        basis = common_basis(precision, like)
        diagonal = basis.diagonal(precision, like)
        if float(diagonal.min()) > NOISE**2 * float(diagonal.max()):
            return _finished(beliefs, basis.back(basis.into(right) / diagonal), b, True)
    return iterate(beliefs, like.new_zeros(like.shape) if start is None else start, b, iterations, tolerance)


def iterate(
    beliefs: Sequence[Belief],
    start: Tensor,
    b: Tensor | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = QUICK,
) -> Solution:
    """The mode by conjugate gradients from `start` until the residual is `tolerance`, or after `iterations`, in the dtype of `start`.

    What no precision sees stays as it is there. They are preconditioned by the one Kronecker product nearest to the sum, by its
    Cholesky factors; where a term is negative by the sum's diagonal in the eigenbasis of that product, which must be positive. The
    first step takes away most of what the tasks disagree on: of three tasks on an encoder three steps leave about 4 %.
    """
    precision = posterior(beliefs)
    left, (share, size) = remaining(beliefs, start, b), _shares(beliefs, start, b)
    if not float(left.norm()) > tolerance * size:
        return Solution(start, 0, share)
    inverse, largest = approximate_inverse(precision, start, NOISE)
    if inverse is None:
        return Solution(start, 0, share, positive=False)
    x, direction, rho, done = start, None, 0.0, 0
    while float(left.norm()) > tolerance * size and done < iterations:
        z = inverse(left)
        before, rho = rho, float((left * z).sum())
        direction = z if direction is None else z + (rho / before) * direction
        image = precision(direction)
        curvature = float((direction * image).sum())
        if not curvature > 0:
            noise = NOISE * largest * float(direction.square().sum())
            return Solution(x, done, float(left.norm()) / size, positive=-curvature <= noise)
        step = rho / curvature
        x, left, done = x + step * direction, left - step * image, done + 1
    return Solution(x, done, residual(beliefs, x, b))


def common_centre(beliefs: Sequence[Belief]) -> Tensor | None:
    """The centre that all beliefs share, or None: then it is the mode, whatever the precisions are."""
    import torch

    centres = [one.centre for one in beliefs if one.weight]
    known = [centre for centre in centres if not isinstance(centre, (int, float))]
    if not known or len(known) < len(centres):
        return None
    first = known[0]
    return first if all(other is first or torch.equal(other, first) for other in known[1:]) else None


def solve_by_moments(beliefs: Iterable[Belief], like: Tensor) -> Solution:
    """The mode of beliefs whose precisions are `Moments` or multiples of the identity: one Cholesky factorisation.

    They are added up one after the other, so that one matrix (in, in) is held, whatever their number. Where none says anything the
    update is 0.
    """
    width = like.shape[-1]
    matrix, right = like.new_zeros(width, width), like.new_zeros(like.shape)
    for one in beliefs:
        assert not isinstance(one.centre, (int, float))
        if isinstance(one.precision, Moments):
            one.precision.add_to(matrix, right, one.centre, one.weight)
        else:
            flat = one.weight * sum(float(term.diagonal) for term in one.precision.terms)
            matrix.diagonal().add_(flat)
            right.add_(one.centre, alpha=flat)
        del one
    return _by_cholesky(matrix, right, "a")


def _by_cholesky(matrix: Tensor, right: Tensor, side: str) -> Solution:
    """X with X M = R, or M X = R, in the place of R; 0 where both are. The matrix is used up."""
    import torch

    if not bool(right.any()) and not bool(matrix.any()):
        return Solution(right)
    s = _signs(right, PROBES)
    asked = right @ s
    probed = matrix @ s if side == "a" else matrix.clone()
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    # of its transpose, which is itself as LAPACK lays it out: in place. `torch.cholesky_solve` would copy the factor
    torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))
    if int(info):
        return Solution(right, residual=1.0, positive=False)
    x = right.mT if side == "a" else right.mT.contiguous().mT
    for factor, upper in ((matrix.mT, False), (matrix, True)):
        torch.linalg.solve_triangular(factor, x, upper=upper, out=x)
    x = x.mT if side == "a" else x
    left = x @ probed if side == "a" else probed @ (x @ s)
    size = float(asked.norm()) or float(left.norm()) or 1.0
    return Solution(x, residual=float((left - asked).norm()) / size)


def _signs(x: Tensor, probes: int) -> Tensor:
    """Random directions (in, probes) of signs, the same at every call."""
    import torch

    signs = torch.randint(0, 2, (x.shape[-1], probes), generator=torch.Generator().manual_seed(0))
    return (2 * signs - 1).to(x)


def _finished(beliefs: Sequence[Belief], x: Tensor, b: Tensor | None, positive: bool) -> Solution:
    return Solution(x, 0, residual(beliefs, x, b) if positive else 1.0, positive)
