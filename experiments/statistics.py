"""Intervals and rank correlation: scipy's, and the one bootstrap that scipy has not.

scipy's `bootstrap` draws one sample, or several independently or in pairs. Here seeds and documents are crossed: one draw of seeds
serves every domain, a draw of whole documents every seed, and a ratio takes both its parts from one draw.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Per domain (n_d,): which document a text is a part of; None: each is its own.
Documents = Sequence["NDArray[np.int64] | None"]
LEVEL = 0.95
TAILS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
DRAWS = 4000


def paired_bootstrap(
    differences: Sequence[Array], documents: Documents, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean_d mean_s mean_n x_dsn, by drawing seeds s and, within each domain d, whole documents again.

    differences: per domain (seeds, n_d). The same seeds are drawn for every domain of a draw.
    """
    low, high = np.quantile(_drawn_means(differences, documents, draws, seed), TAILS)
    return float(low), float(high)


def paired_p(differences: Sequence[Array], documents: Documents, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p of "no difference", from the same draws as `paired_bootstrap`: twice the smaller share beyond 0.

    Draws of exactly 0 count for both sides; the least is 2 / (draws + 1).
    """
    means = _drawn_means(differences, documents, draws, seed)
    sides = ((means <= 0).sum(), (means >= 0).sum())
    return float(min(1.0, 2 * (min(sides) + 1) / (draws + 1)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) correction: the i-th smallest of m counts (m - i + 1) times, never less than a smaller one.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda index: p[index])
    found, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        found[index] = largest
    return found


def detectable(
    counts: Sequence[int], comparisons: int, disagreement: float = 0.1, power: float = 0.8
) -> float:
    """The smallest difference of macro accuracy that a paired comparison would find with such a power, from sizes alone.

    (z_(1 - a/2) + z_power) sqrt(disagreement / D^2 sum_d 1/n_d), a = .05 / comparisons: two models of one seed that differ on so
    many of the examples (Connor 1987, with an accuracy gap small beside the disagreement).

    Args:
        counts: test rows of each domain (n_d).
        comparisons: among which Holm corrects.
        disagreement: share of examples on which exactly one of the two is right.
        power: the chance to find it.
    """
    quantile = NormalDist().inv_cdf
    error: float = (disagreement * sum(1 / count for count in counts)) ** 0.5 / len(counts)
    return (quantile(1 - 0.025 / max(1, comparisons)) + quantile(power)) * error


def rank_interval(rho: float, count: int) -> tuple[float, float]:
    """95 % interval of Spearman's rho over `count` points: Fisher's z with Bonett and Wright's (2000) variance.

    A perfect order is taken as half way to the next one, so that few points in order are not certain.
    """
    most = 1 - 6 / (count * (count**2 - 1))
    z = math.atanh(max(-most, min(most, rho)))
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return math.tanh(z - half), math.tanh(z + half)


def bootstrap_ratio(
    above: Sequence[Array], below: Sequence[Array], documents: Documents, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """mean(above) / mean(below) and its 95 % interval; both as in `paired_bootstrap`, the same draws for both.

    NaN where the mean below is 0. The interval is wide, up to infinite, where that mean may be 0.
    """
    whole = sum(part.mean() for part in below)
    value = sum(part.mean() for part in above) / whole if whole else np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _drawn_means(above, documents, draws, seed) / _drawn_means(below, documents, draws, seed)
    low, high = np.nanquantile(ratios, TAILS, method="nearest")
    return float(value), float(low), float(high)


def _drawn_means(differences: Sequence[Array], documents: Documents, draws: int, seed: int) -> Array:
    """(draws,) of the mean under a draw of seeds and documents; equal shapes and seed give equal draws."""
    generator = np.random.default_rng(seed)
    seeds = len(differences[0])
    drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws, seeds)
    total = np.zeros(draws)
    for part, own in zip(differences, documents, strict=True):
        which = np.arange(part.shape[1]) if own is None else own
        sizes = np.bincount(which)  # of the documents
        sums = np.stack([np.bincount(which, weights=row) for row in part], axis=1)  # (documents, seeds)
        count = len(sizes)
        counts = generator.multinomial(count, np.full(count, 1 / count), size=draws)  # (draws, documents)
        total += (drawn * (counts @ sums)).sum(-1) / (counts @ sizes)
    return total / len(differences)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of Student's t; infinitely wide for one value."""
    from scipy.stats import sem, t

    mean = float(np.mean(values))
    half = t.ppf(TAILS[1], len(values) - 1) * sem(values) if len(values) > 1 else np.inf
    return mean, float(half)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank. NaN for constant input, and for fewer than two points."""
    from scipy.stats import ConstantInputWarning, spearmanr

    if len(x) < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(x, y).statistic)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, from the successes in `count` trials."""
    from scipy.stats import binomtest

    found = binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(values: Array, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of (n,) values and its 95 % percentile bootstrap interval."""
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if len(values) < 2:  # of which there is one draw
        return float(values.mean()), float(values.mean()), float(values.mean())
    options = {"n_resamples": draws, "method": "percentile", "random_state": np.random.default_rng(seed)}
    interval = bootstrap((values,), np.mean, confidence_level=LEVEL, **options).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)
