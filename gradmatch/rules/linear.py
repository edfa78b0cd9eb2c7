"""Rules that add models with constant coefficients: each is the function that gives (c0, c) of c0 theta0 + sum_t c_t theta_t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules.options import Options, option

Coefficients = tuple[float, list[float]]


@dataclass(frozen=True)
class Scale(Options):
    """How far the merge goes."""

    scale: float = option(1.0, help="factor on the merged task vector (passthrough: on the model)")


@dataclass(frozen=True)
class ScaleNormalize(Scale):
    """How far the merge goes, and whether the weights are relative."""

    normalize: bool = option(False, help="divide the weights by their sum")


@dataclass(frozen=True)
class Normalize(Options):
    """Whether the weights are relative."""

    normalize: bool = option(True, help="divide the weights by their sum")


def averaging(alpha: Sequence[float]) -> Coefficients:
    """AM: mean_t theta_t, so c0 = 0 and c_t = 1/T. The weights play no role.

    Example:
        >>> averaging([1.0, 3.0])
        (0.0, [0.5, 0.5])
    """
    return 0.0, [1 / len(alpha)] * len(alpha)


def weighted(alpha: Sequence[float], normalize: bool = True) -> Coefficients:
    """Linear merging: sum_t alpha_t theta_t, divided by sum_t alpha_t when `normalize` is set.

    Raises:
        ValueError: the weights sum to zero and cannot be normalised.

    Example:
        >>> weighted([1.0, 3.0])
        (0.0, [0.25, 0.75])
    """
    total = weight_sum(alpha) if normalize else 1.0
    return 0.0, [weight / total for weight in alpha]


def weight_sum(alpha: Sequence[float]) -> float:
    """sum_t alpha_t, for rules that divide by it.

    Raises:
        ValueError: the weights cancel to within rounding, |sum_t alpha_t| <= 1e-9 sum_t |alpha_t|.
    """
    total = sum(alpha)
    if abs(total) <= 1e-9 * sum(abs(weight) for weight in alpha):
        raise GradmatchError(
            f"the weights {list(alpha)} sum to zero and cannot be normalised: change them (or pass normalize=False where "
            "the method has it)",
            "bad_setting",
        )
    return total


def task_arithmetic(alpha: Sequence[float], scale: float = 1.0, normalize: bool = False) -> Coefficients:
    """TA of Ilharco et al. 2023: theta0 + scale * sum_t alpha_t tau_t, so c_t = scale alpha_t and c0 = 1 - sum_t c_t.

    With `normalize` the weights are divided by their sum.

    Raises:
        ValueError: the weights sum to zero and cannot be normalised.

    Example:
        >>> task_arithmetic([0.5, 0.25], scale=2.0)
        (-0.5, [1.0, 0.5])
    """
    if normalize:
        _, alpha = weighted(alpha)
    c = [scale * weight for weight in alpha]
    return 1.0 - sum(c), c


def negation(alpha: Sequence[float]) -> Coefficients:
    """TA negation: theta0 - sum_t alpha_t tau_t.

    Example:
        >>> negation([0.5])
        (1.5, [-0.5])
    """
    return task_arithmetic([-weight for weight in alpha])


def passthrough(alpha: Sequence[float], scale: float = 1.0) -> Coefficients:
    """One model's tensor as it is, times `scale`: c0 = 0, c_1 = scale.

    Example:
        >>> passthrough([1.0], scale=0.5)
        (0.0, [0.5])
    """
    return 0.0, [scale] + [0.0] * (len(alpha) - 1)
