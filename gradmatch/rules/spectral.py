"""Rules of singular values: they merge every matrix by the directions in which the task vectors move it.

Each is a function (tau, alpha, options, rank) -> update that takes the task vectors one after the other. Turning all of them by the
same orthogonal matrices turns the update alike, so that the cores of adapters are merged by the same functions; `rank` is the
smaller side of the whole matrix. Triplets whose singular value is zero to rounding are left out (`gradmatch.rules.singular`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.rules.edits.ties import whole_part
from gradmatch.rules.linear import Scale, task_arithmetic
from gradmatch.rules.options import option
from gradmatch.rules.rule import Linear, Whole
from gradmatch.rules.singular import polar, triplets

if TYPE_CHECKING:
    from torch import Tensor

Vectors = Sequence["Tensor"]
Triplets = tuple["Tensor", "Tensor", "Tensor"]


@dataclass(frozen=True)
class IsoCtsOptions(Scale):
    """How far the merge goes, and how much of it is common."""

    common: float = option(
        0.8, "[0, 1]", help="share of the directions that are those of the sum of all tasks"
    )


def tsv_m(tau: Vectors, alpha: Sequence[float], options: Scale, rank: int) -> Tensor:
    """TSV-M of Gargiulo et al. 2025: scale * polar(U) S polar(V)', of the first r/T singular triplets of each alpha_t tau_t.

    tau: T of (m, n); alpha_t tau_t = U_t S_t V_t'; r = `rank`. U (m, k) and V (n, k) are the kept directions of all tasks side by
    side, and polar(X) is the matrix of orthonormal columns nearest to X, which parts directions that the tasks share. Returns
    (m, n).

    Example:
        >>> import torch
        >>> tau = torch.stack([torch.diag(torch.tensor(d)) for d in ([3.0, 1.0], [1.0, 2.0])])
        >>> tsv_m(tau, [1.0, 1.0], Scale(), 2)  # the largest triplet of each
        tensor([[3., 0.],
                [0., 2.]])
    """
    kept = max(1, rank // len(tau))
    u, s, vt = _beside(triplets(weight * one, kept) for weight, one in zip(alpha, tau, strict=True))
    return options.scale * (polar(u) * s) @ polar(vt)


def iso_c(tau: Vectors, alpha: Sequence[float], options: Scale, rank: int) -> Tensor:
    """Iso-C of Marczak et al. 2025, Algorithm 1: scale * mean(S) U V', with U S V' = sum_t alpha_t tau_t.

    tau: T of (m, n). Returns (m, n). Every direction of the sum moves equally far.

    Example:
        >>> import torch
        >>> iso_c(torch.diag(torch.tensor([3.0, 1.0]))[None], [1.0], Scale(), 2)
        tensor([[2., 0.],
                [0., 2.]])
    """
    u, s, vt = triplets(_sum(tau, alpha))
    return options.scale * s.sum() / max(1, len(s)) * (u @ vt)


def iso_cts(tau: Vectors, alpha: Sequence[float], options: IsoCtsOptions, rank: int) -> Tensor:
    """Iso-CTS of Marczak et al. 2025, Algorithm 2: scale * mean(S) polar(U) polar(V)', of common and of each task's own directions.

    tau: T of (m, n); r = `rank`. Returns (m, n). U, S and V hold the first k singular triplets of sum_t alpha_t tau_t, and of every
    task the first s of what these leave, (I - U_k U_k') alpha_t tau_t. s = (r - floor(common r)) / T, rounded, and k = r - T s.

    Example:
        >>> import torch
        >>> tau = torch.stack([torch.diag(torch.tensor(d)) for d in ([4.0, 1.0, 0.0], [4.0, 0.0, 2.0])])
        >>> iso_cts(tau, [1.0, 1.0], IsoCtsOptions(common=0.3), 3)  # 8 of the sum, 1 and 2 of the tasks: (8 + 1 + 2) / 3
        tensor([[3.6667, 0.0000, 0.0000],
                [0.0000, 3.6667, 0.0000],
                [0.0000, 0.0000, 3.6667]])
    """
    own = min(round((rank - whole_part(options.common, rank)) / len(tau)), rank // len(tau))
    u, s, vt = _beside(_common_and_own(tau, alpha, rank - own * len(tau), own))
    return options.scale * s.sum() / max(1, len(s)) * (polar(u) @ polar(vt))


def _common_and_own(tau: Vectors, alpha: Sequence[float], common: int, own: int) -> Iterator[Triplets]:
    """The first `common` triplets of the sum, then the first `own` of what they leave of every task."""
    first = triplets(_sum(tau, alpha), common)
    yield first
    for weight, one in zip(alpha, tau, strict=True) if own else ():
        left = weight * one
        size = left.norm()
        left -= first[0] @ (first[0].mT @ left)
        yield triplets(left, own, size)


def _sum(tau: Vectors, alpha: Sequence[float]) -> Tensor:
    """sum_t alpha_t tau_t."""
    result = alpha[0] * tau[0]
    for t in range(1, len(tau)):
        result.add_(tau[t], alpha=alpha[t])
    return result


def _beside(found: Iterable[Triplets]) -> Triplets:
    """Triplets of several matrices side by side: U (m, k), s (k,), V' (k, n)."""
    import torch

    u, s, vt = (torch.cat(parts, dim) for parts, dim in zip(zip(*found, strict=True), (1, 0, 0), strict=True))
    return u, s, vt


def _added(update: Callable[[Vectors, Sequence[float], Any, int], Tensor]) -> Callable[..., Tensor]:
    """The rule of an update."""

    def whole(theta0: Tensor, tau: Vectors, alpha: Sequence[float], options: Any) -> Tensor:
        return update(tau, alpha, options, min(theta0.shape)).add_(theta0)

    return whole


MEAN = Linear(
    "theta0 + scale * mean_t alpha_t tau_t", "mean of the task vectors",
    lambda a, gram, o: task_arithmetic([weight / max(1, sum(map(bool, a))) for weight in a], o.scale), options=Scale(),
)  # fmt: skip
FLAT = dict.fromkeys(("single", "equal"), "all singular values become their mean")
TSV_M = Whole(
    "theta0 + scale * polar(U) S polar(V)' of the first r/T singular triplets of every alpha_t tau_t", "Gargiulo et al. 2025",
    _added(tsv_m), update=tsv_m, streams=True, otherwise=MEAN, options=Scale(), memory=(5, 0), square=15,
    lacks={"equal": "every task keeps its share of the singular triplets"},
)  # fmt: skip
ISO_C = Whole(
    "theta0 + scale * mean(S) U V', U S V' = sum_t alpha_t tau_t", "Marczak et al. 2025", _added(iso_c), update=iso_c, streams=True,
    otherwise=MEAN, options=Scale(), memory=(5, 0), square=12, lacks=FLAT,
)  # fmt: skip
ISO_CTS = Whole(
    "theta0 + scale * mean(S) polar(U) polar(V)' of the common triplets of sum_t alpha_t tau_t and each task's own of what is left",
    "Marczak et al. 2025", _added(iso_cts), update=iso_cts, streams=True, otherwise=MEAN, options=IsoCtsOptions(), memory=(6, 0),
    square=17, lacks=FLAT,
)  # fmt: skip
