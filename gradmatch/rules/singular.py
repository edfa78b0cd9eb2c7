"""Singular triplets and polar factors of matrices that may be large.

float64 matrices are decomposed as they are. float32 ones go through the Gram matrix of their smaller side, summed and solved in
float64: a 4096 x 14336 matrix is then never copied, and 4096 x 4096 numbers are what its decomposition holds. Nothing is lost by
that. With s_1 the largest singular value and g the gap of the i-th to its neighbour, the directions of the i-th are off by about
eps64 s_1^2 / (s_i g); an SVD in float32 leaves eps32 s_1 / g, which is more wherever s_i > 2e-9 s_1, and what lies below
`rounding`, at least 1e-7 s_1, is left out either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 256  # of a large matrix that are held in float64 at a time


def triplets(
    matrix: Tensor, most: int | None = None, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triplets, U (m, k), s (k,), V' (k, n): at most `most`, and as many as are not zero to rounding.

    The directions of those that are zero to rounding are arbitrary; of task vectors of low rank they would be noise. `size` is
    the norm of what the matrix is the remainder of, where it is one; rounding is then that of the whole.

    Example:
        >>> import torch
        >>> triplets(torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]))[1]
        tensor([3., 2.])
    """
    import torch

    if matrix.dtype == torch.float64:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        k = _count(s, rounding(matrix), most, size)
        return u[:, :k].clone(), s[:k], vt[:k].clone()  # a part alone, or all of them would be held
    if matrix.shape[0] > matrix.shape[1]:
        v, s, ut = triplets(matrix.mT, most, size)
        return ut.mT, s, v.mT
    vectors, s = _eigen(matrix)
    k = _count(s, rounding(matrix), most, size)
    vectors, s = vectors[:, :k], s[:k]
    return vectors.to(matrix.dtype), s.to(matrix.dtype), _times((vectors / s).mT, matrix)


def polar(directions: Tensor) -> Tensor:
    """U V' of a matrix U S V' (m, n): the orthonormal matrix nearest to it.

    Of directions of several matrices side by side. Where two of them coincide, to the square root of the precision (singular
    vectors are known no better than that where values are close), nothing tells them apart, and one takes the place of both.

    Example:
        >>> import torch
        >>> polar(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    import torch

    if directions.dtype == torch.float64:
        u, s, vt = torch.linalg.svd(directions, full_matrices=False)
    elif directions.shape[0] > directions.shape[1]:
        return polar(directions.mT).mT
    else:
        u, s = _eigen(directions)
    k = _count(s, torch.finfo(directions.dtype).eps ** 0.5)
    if directions.dtype == torch.float64:
        nearest: Tensor = u[:, :k] @ vt[:k]
        return nearest
    return _times((u[:, :k] / s[:k]) @ u[:, :k].mT, directions)


def rounding(matrix: Tensor) -> float:
    """The share of the largest singular value below which one is zero to rounding: eps max(m, n)."""
    import torch

    return torch.finfo(matrix.dtype).eps * max(matrix.shape)


def _count(s: Tensor, share: float, most: int | None = None, size: Tensor | None = None) -> int:
    """How many of the descending singular values are kept: those above a share of the largest, or of `size`.

    Raises:
        LinAlgError: they are not finite, as those of a matrix that is not; they would count as no direction at all.
    """
    import torch

    if not bool(s.isfinite().all()):
        raise torch.linalg.LinAlgError("the matrix is not finite")  # type: ignore[attr-defined]
    kept = int((s > share * (s[:1].sum() if size is None else size)).sum())
    return kept if most is None else min(most, kept)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (m, m) and singular values (m,) of a wide matrix (m, n), descending, in float64."""
    import torch

    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for part in torch.split(matrix, COLUMNS, dim=1):
        wide = part.double()
        gram.addmm_(wide, wide.mT)
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), values.flip(0).clamp(min=0).sqrt()


def _times(left: Tensor, matrix: Tensor) -> Tensor:
    """left (k, m) in float64 times a matrix (m, n), in the matrix's dtype."""
    result = matrix.new_empty(len(left), matrix.shape[1])
    for start in range(0, matrix.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        result[:, part] = left @ matrix[:, part].double()
    return result
