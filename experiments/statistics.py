"""Stage and formulas: paired bootstrap of a difference of accuracy, rank correlation, interval of a share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def compare(
    out: Path,
    *,
    ours: Mapping[str, Path],
    theirs: Mapping[str, Path],
    domains: Sequence[str],
    draws: int = 4000,
) -> None:
    """Macro accuracy of one model minus another's, over the same test examples, with its bootstrap interval.

    ours, theirs: seed -> folder of an evaluation. Writes `out/comparison.json`.
    """
    differences = [
        np.stack(
            [
                _correct(ours[seed] / f"{domain}.npz") - _correct(theirs[seed] / f"{domain}.npz")
                for seed in ours
            ]
        )
        for domain in domains
    ]
    low, high = paired_bootstrap(differences, draws)
    mean = float(np.mean([part.mean() for part in differences]))
    card = {"difference": mean, "low": low, "high": high, "seeds": len(ours), "draws": draws}
    (out / "comparison.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def paired_bootstrap(differences: Sequence[Array], draws: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of mean_d mean_s mean_n x_dsn, by drawing seeds s and, within each domain d, examples n again.

    differences: per domain (seeds, n_d). The same seeds are drawn for every domain of a draw.
    """
    generator = np.random.default_rng(seed)
    seeds = len(differences[0])
    drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws, seeds)
    total = np.zeros(draws)
    for part in differences:
        n = part.shape[1]
        counts = generator.multinomial(n, np.full(n, 1 / n), size=draws)  # (draws, n)
        total += (drawn * (counts @ part.T / n)).sum(-1)
    low, high = np.quantile(total / len(differences), [0.025, 0.975])
    return float(low), float(high)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho = correlation of the ranks of x and y, ties sharing their mean rank. NaN for constant input."""
    first, second = _ranks(np.asarray(x, dtype=float)), _ranks(np.asarray(y, dtype=float))
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def spearman_interval(
    groups: Sequence[Sequence[tuple[float, float]]], draws: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's rho over all points (x, y), and its 95 % interval by drawing whole groups of points again."""
    arrays = [np.asarray(points, dtype=float) for points in groups]
    rho = spearman(*np.concatenate(arrays).T)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(arrays), size=(draws, len(arrays)))
    found = [spearman(*np.concatenate([arrays[index] for index in row]).T) for row in drawn]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return rho, float(low), float(high)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share observed in `count` trials."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return middle - half, middle + half


def _ranks(values: Array) -> Array:
    less = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return less + (equal - 1) / 2


def _correct(path: Path) -> Array:
    saved = np.load(path)
    return (saved["probabilities"].argmax(-1) == saved["labels"]).astype(float)  # type: ignore[no-any-return]
