"""Rules of singular values: TSV-M and Iso-C merge every matrix by the directions in which the task vectors move it.

Triplets whose singular value is zero to rounding are left out: their directions are arbitrary, and task vectors of low rank (of
adapters, of tensors that a task did not train) would be merged with noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmatch.rules.linear import Scale, task_arithmetic
from gradmatch.rules.rule import Linear, Whole

if TYPE_CHECKING:
    from torch import Tensor


def tsv_m(theta0: Tensor, tau: Tensor, alpha: Sequence[float], options: Scale) -> Tensor:
    """TSV-M of Gargiulo et al. 2025: theta0 + scale * polar(U) S polar(V)', of the first r/T singular triplets of each alpha_t tau_t.

    theta0: (m, n); tau: (T, m, n), alpha_t tau_t = U_t S_t V_t', r = min(m, n). U (m, k) and V (n, k) are the kept directions of
    all tasks side by side, and polar(X) is the matrix of orthonormal columns nearest to X, which parts directions that the tasks
    share. Returns (m, n).

    Example:
        >>> import torch
        >>> tau = torch.stack([torch.diag(torch.tensor(d)) for d in ([3.0, 1.0], [1.0, 2.0])])
        >>> tsv_m(torch.zeros(2, 2), tau, [1.0, 1.0], Scale())  # the largest triplet of each
        tensor([[3., 0.],
                [0., 2.]])
    """
    import torch

    kept = max(1, min(theta0.shape) // len(tau))
    triplets = [_triplets(weight * one, kept) for weight, one in zip(alpha, tau, strict=True)]
    u, s, vt = (
        torch.cat(parts, dim) for parts, dim in zip(zip(*triplets, strict=True), (1, 0, 0), strict=True)
    )
    return theta0 + options.scale * (_polar(u) * s) @ _polar(vt)


def iso_c(theta0: Tensor, tau: Tensor, alpha: Sequence[float], options: Scale) -> Tensor:
    """Iso-C of Marczak et al. 2025: theta0 + scale * mean(S) U V', with U S V' the singular value decomposition of sum_t alpha_t tau_t.

    theta0: (m, n); tau: (T, m, n). Returns (m, n). Every direction of the sum moves equally far.

    Example:
        >>> import torch
        >>> iso_c(torch.zeros(2, 2), torch.diag(torch.tensor([3.0, 1.0]))[None], [1.0], Scale())
        tensor([[2., 0.],
                [0., 2.]])
    """
    total = (tau.new_tensor(alpha).reshape(-1, 1, 1) * tau).sum(0)
    u, s, vt = _triplets(total, min(total.shape))
    return theta0 + options.scale * s.sum() / max(1, len(s)) * (u @ vt)


def _triplets(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triplets, (m, k), (k,), (k, n), with k at the most `most` and as many as are not zero to rounding."""
    import torch

    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rounding = torch.finfo(s.dtype).eps * max(matrix.shape) * (s[:1].sum())
    kept = min(most, int((s > rounding).sum()))
    return u[:, :kept].clone(), s[:kept], vt[:kept].clone()  # a part alone, or all of them would be held


def _polar(matrix: Tensor) -> Tensor:
    """The orthonormal factor U V' of a matrix U S V'."""
    import torch

    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vt
    return nearest


MEAN = Linear(
    "theta0 + scale * mean_t alpha_t tau_t", "mean of the task vectors",
    lambda a, gram, o: task_arithmetic([weight / len(a) for weight in a], o.scale), options=Scale(),
)  # fmt: skip
TSV_M = Whole(
    "theta0 + scale * polar(U) S polar(V)' of the first r/T singular triplets of every alpha_t tau_t", "Gargiulo et al. 2025",
    tsv_m, otherwise=MEAN, options=Scale(), memory=(13, 7),
    lacks={"equal": "every task keeps its share of the singular triplets"},
)  # fmt: skip
ISO_C = Whole(
    "theta0 + scale * mean(S) U V', U S V' = sum_t alpha_t tau_t", "Marczak et al. 2025", iso_c, otherwise=MEAN, options=Scale(),
    lacks={"single": "all singular values become their mean", "equal": "all singular values become their mean"},
)  # fmt: skip
