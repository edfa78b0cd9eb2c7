"""TIES: trim, elect sign, and share among those who agree."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from gradmatch.rules.block import total

if TYPE_CHECKING:
    from torch import Tensor


def whole_part(share: float, numel: int) -> int:
    """The whole part of share * numel, of the share as it is written: 0.35 of 960 are 336, whatever 0.35 is in binary.

    Example:
        >>> whole_part(0.29, 100), int(0.29 * 100)
        (29, 28)
    """
    return int(numel * Fraction(f"{share:.12g}"))


def kept_count(density: float, numel: int) -> int:
    """How many of `numel` entries a density keeps: the whole part of density * numel, and at least one."""
    return max(1, whole_part(density, numel)) if numel else 0


def trim(tau: Tensor, threshold: Tensor | float) -> Tensor:
    """TIES step 1 (Yadav et al. 2023): tau where |tau| >= threshold, else 0.

    tau: (T, *s); threshold: (T, 1, ..., 1), the k-th largest |tau_t| of the whole model (or of this tensor). Entries equal
    to the threshold all stay.
    """
    return tau * tau.abs().ge_(threshold)


def elect(vote: Tensor, majority: float) -> Tensor:
    """TIES step 2: sign(sum_t alpha_t tau_t) per coordinate, (*s,); where entries cancel exactly, the sign of the majority.

    vote: sum_t alpha_t tau_t, (*s,); majority: sign of the sum of all elected signs of the model (+1 or -1).
    """
    sign = vote.sign()
    return sign + majority * sign.abs().eq_(0)


def share(tau: Tensor, alpha: Tensor, sign: Tensor, normalize: bool = True) -> Tensor:
    """TIES step 3, before the sum: tau_t where it agrees with `sign`, divided by the weight of all that agree; else 0.

    tau: (T, *s); alpha: (T, 1, ..., 1); sign: (*s,). Returns (T, *s), such that sum_t alpha_t tau'_t is the disjoint mean
    (the weighted mean over the agreeing, non-zero entries). Without `normalize` it is their weighted sum.
    """
    agrees = (alpha * tau).sign_().eq_(sign)
    if not normalize:
        return tau * agrees
    weight = total(alpha.abs() * agrees)
    return agrees.mul_(tau).div_(weight + weight.abs().eq_(0))


def votes(weighted: Tensor, vote: Tensor) -> dict[str, float]:
    """Of trimmed task vectors: coordinates in conflict, those that cancel exactly, the sum of elected signs, and all of them.

    weighted: alpha_t tau_t, (T, *s); vote: their sum, (*s,). Masks are floats throughout: torch multiplies and compares these
    several times faster than it mixes them with booleans.
    """
    conflict = weighted.amax(0).sign_().mul_(weighted.amin(0).sign_()).eq_(-1)
    conflicts = conflict.count_nonzero()
    return {
        "conflicts": float(conflicts),
        "cancelled": float(conflict.mul_(vote.abs().eq_(0)).count_nonzero()),
        "signs": float(vote.sign().sum()),
        "weights": float(vote.numel()),
    }


def ties(
    tau: Tensor,
    alpha: Tensor,
    threshold: Tensor | float,
    majority: float,
    scale: float = 1.0,
    normalize: bool = True,
    health: dict[str, float] | None = None,
) -> Tensor:
    """TIES (Yadav et al. 2023) as a map of task vectors: scale * share(trimmed, elected sign).

    Task arithmetic of the result is TIES merging; any other rule may follow instead. Shapes as in its three steps; `health`
    takes what `votes` counts.
    """
    trimmed = trim(tau, threshold)
    weighted = alpha * trimmed
    vote = total(weighted)
    if health is not None:
        health.update(votes(weighted, vote))
    return share(trimmed, alpha, elect(vote, majority), normalize).mul_(scale)
