"""Stages and formulas: paired bootstrap of accuracies, distances of weights, rank correlation, intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

Array = NDArray[np.float64]
# Per domain (n_d,): which document a text is a part of; None: each is its own.
Documents = Sequence[NDArray[np.int64] | None]


def compare(
    out: Path,
    *,
    ours: Mapping[str, Path],
    theirs: Mapping[str, Path],
    data: Path,
    domains: Sequence[str],
    draws: int = 4000,
) -> None:
    """Macro accuracy of one model minus another's, over the same test examples, with its bootstrap interval.

    ours, theirs: seed -> folder of an evaluation; data: whose test examples they are. Writes `out/comparison.json`.
    """
    differences = correct_less(ours, theirs, domains)
    low, high = paired_bootstrap(differences, documents_of(data, domains), draws)
    by_seed = np.mean([part.mean(1) for part in differences], axis=0)
    card = {
        "difference": float(by_seed.mean()),
        "low": low,
        "high": high,
        "seeds": len(ours),
        "by_seed": dict(zip(ours, by_seed.tolist(), strict=True)),
        "draws": draws,
    }
    (out / "comparison.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def distance(out: Path, *, model: Path, base: Path, joint: Path) -> None:
    """||theta - theta_joint||, and as a share of ||theta_0 - theta_joint||: `out/distance.json`."""
    theta, start, target = (
        load_file(folder / "model" / "model.safetensors") for folder in (model, base, joint)
    )
    left, whole = (
        sum(float((weights[name] - target[name]).double().square().sum()) for name in target) ** 0.5
        for weights in (theta, start)
    )
    (out / "distance.json").write_text(json.dumps({"distance": left, "relative": left / whole}))


def correct_less(ours: Mapping[Any, Path], theirs: Mapping[Any, Path], domains: Sequence[str]) -> list[Array]:
    """Per domain (seeds, n_d): 1 where only ours is right, -1 where only theirs is; folders of evaluations by seed."""
    return [
        np.stack(
            [
                _correct(ours[seed] / f"{domain}.npz") - _correct(theirs[seed] / f"{domain}.npz")
                for seed in ours
            ]
        )
        for domain in domains
    ]


def documents_of(data: Path, domains: Sequence[str]) -> Documents:
    """Which document each test example of a domain belongs to, where the data say so (texts)."""
    from datasets import load_from_disk

    found: list[NDArray[np.int64] | None] = []
    for domain in domains:
        folder = data / domain / "test"  # a data set of texts; images have a file instead
        rows = load_from_disk(str(folder)) if folder.is_dir() else None
        known = rows is not None and "document" in rows.column_names
        found.append(np.unique(rows["document"], return_inverse=True)[1] if known else None)
    return found


def paired_bootstrap(
    differences: Sequence[Array], documents: Documents, draws: int, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean_d mean_s mean_n x_dsn, by drawing seeds s and, within each domain d, whole documents again.

    differences: per domain (seeds, n_d). The same seeds are drawn for every domain of a draw.
    """
    low, high = np.quantile(_drawn_means(differences, documents, draws, seed), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_ratio(
    above: Sequence[Array], below: Sequence[Array], documents: Documents, draws: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """mean(above) / mean(below) and its 95 % interval; both as in `paired_bootstrap`, the same draws for both.

    NaN where the mean below is 0. The interval is wide, up to infinite, where that mean may be 0.
    """
    whole = sum(part.mean() for part in below)
    value = sum(part.mean() for part in above) / whole if whole else np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _drawn_means(above, documents, draws, seed) / _drawn_means(below, documents, draws, seed)
    low, high = np.nanquantile(ratios, [0.025, 0.975], method="nearest")
    return float(value), float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of Student's t; infinitely wide for one value."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return float(np.mean(values)), float("inf")
    return float(np.mean(values)), float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


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


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho = correlation of the ranks of x and y, ties sharing their mean rank. NaN for constant input."""
    first, second = _ranks(np.asarray(x, dtype=float)), _ranks(np.asarray(y, dtype=float))
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


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
