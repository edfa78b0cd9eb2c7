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


def elect(tau: Tensor, alpha: Tensor, majority: float) -> Tensor:
    """TIES step 2: sign(sum_t alpha_t tau_t) per coordinate, (*s,); where entries cancel exactly, the sign of the majority.

    tau: (T, *s); alpha: (T, 1, ..., 1); majority: sign of the sum of all elected signs of the model (+1 or -1).
    """
    sign = total(alpha * tau).sign()
    return sign + majority * sign.abs().eq_(0)


def share(tau: Tensor, alpha: Tensor, sign: Tensor, normalize: bool = True) -> Tensor:
    """TIES step 3, before the sum: tau_t where it agrees with `sign`, divided by the weight of all that agree; else 0.

    tau: (T, *s); alpha: (T, 1, ..., 1); sign: (*s,). Returns (T, *s), such that sum_t alpha_t tau'_t is the disjoint mean
    (the weighted mean over the agreeing, non-zero entries). Without `normalize` it is their weighted sum.
    """
    agrees = (alpha * tau).sign().eq_(sign)
    if not normalize:
        return tau * agrees
    weight = total(alpha.abs() * agrees)
    return tau * agrees / (weight + (weight == 0))


def votes(tau: Tensor, alpha: Tensor) -> dict[str, float]:
    """Of trimmed task vectors: coordinates in conflict, those that cancel exactly, the sum of elected signs, and all of them."""
    weighted = alpha * tau
    summed = total(weighted)
    conflict = (weighted.amax(0) > 0) & (weighted.amin(0) < 0)
    return {
        "conflicts": float(conflict.count_nonzero()),
        "cancelled": float((conflict & (summed == 0)).count_nonzero()),
        "signs": float(summed.sign().sum()),
        "weights": float(summed.numel()),
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
    if health is not None:
        health.update(votes(trimmed, alpha))
    return scale * share(trimmed, alpha, elect(trimmed, alpha, majority), normalize)
