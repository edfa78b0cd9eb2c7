"""Intervals and rank correlation: scipy's, and the one bootstrap that scipy has not.

scipy's `bootstrap` draws one sample, or several independently or in pairs. Here seeds and documents are crossed: one draw of seeds
serves every domain, a draw of whole documents every seed, and a ratio takes both its parts from one draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

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
