"""What removal costs: toxicity against perplexity along alpha, and the area between two methods' curves.

A method's curve says how little toxicity can be had at a perplexity: the lower envelope through its points, from the
unchanged model on. The area between two curves over the perplexities that both reach, divided by their width, is the mean
difference of toxicity at equal perplexity. Over several seeds it is the mean of theirs; its interval draws seeds, prompts and
texts again, the same for both methods. What the seeds share, the unedited model and its curvature, is not drawn; and of few
seeds a percentile bootstrap is narrow. scipy's bootstrap does not draw three crossed samples, nor a curve from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GRID = 201  # abscissas at which two curves are compared


@dataclass(frozen=True)
class Path:
    """What was measured along one method's path with one seed, the unchanged model first.

    alphas: (A,), alphas[0] = 0. losses: (A, n, 2), nats and tokens of each text that must stay. scores: (A, m), toxicity
    of each prompt's continuation. beside: (A, m, 2), losses of texts of another domain that must stay too, or None: the abscissa
    is then the larger of the two rises.
    """

    alphas: Array
    losses: Array
    scores: Array
    beside: Array | None = None


@dataclass(frozen=True)
class Area:
    """Mean of `other - method` at equal perplexity (positive: `method` is better), and its bootstrap interval.

    by_seed: the same of each seed, in their order. span: the nats per token over which both curves reach, from the
    unchanged model on, means over seeds.
    """

    method: str
    other: str
    difference: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    span: tuple[float, float]
    draws: int


def points(
    path: Path,
    text_counts: Array | None = None,
    prompt_counts: Array | None = None,
    beside_counts: Array | None = None,
) -> tuple[Array, Array]:
    """((A,) nats per token, (A,) mean toxicity) of a path; counts: how often a resample holds each text and prompt."""
    texts = np.ones(path.losses.shape[1]) if text_counts is None else text_counts
    prompts = np.ones(path.scores.shape[1]) if prompt_counts is None else prompt_counts
    nats = (path.losses[..., 0] @ texts) / (path.losses[..., 1] @ texts)
    if path.beside is not None:
        own = np.ones(path.beside.shape[1]) if beside_counts is None else beside_counts
        other = (path.beside[..., 0] @ own) / (path.beside[..., 1] @ own)
        nats = nats[0] + np.maximum(nats - nats[0], other - other[0])
    return nats, (path.scores @ prompts) / prompts.sum()


def envelope(x: Array, y: Array, at: Array) -> Array:
    """Least y that the path offers at an abscissa of at most `at`: its running minimum, linear in between.

    x, y: (A,), the unchanged model first; points left of it count as lying at it. at: (G,) >= x[0].
    """
    x = np.maximum(x, x[0])
    order = np.lexsort((y, x))
    return np.interp(at, x[order], np.minimum.accumulate(y[order]))


def difference(method: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[float, tuple[float, float]]:
    """Mean of envelope(other) - envelope(method) over the abscissas both reach, and these; NaN where they reach none."""
    low = method[0][0]
    high = min(float(np.nanmax(method[0])), float(np.nanmax(other[0])))
    if not high > low:
        return float("nan"), (low, low)
    at = np.linspace(low, high, GRID)
    gap = envelope(*other, at) - envelope(*method, at)
    return float(np.trapezoid(gap, at) / (high - low)), (float(low), high)


def area_between(
    paths: Mapping[str, Sequence[Path]],
    method: str,
    other: str,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Area:
    """Compare two methods by their paths, one a seed of the experiment, all over the same texts and prompts.

    NaN, and no interval, where the two curves of a seed reach no perplexity in common; draws in which they do not are left out.

    Raises:
        ValueError: no paths, or other numbers of seeds; paths with other texts or prompts, or one that does not start at the
            same unchanged model.
    """
    count = len(paths[method])
    if not count or count != len(paths[other]):
        raise ValueError(
            f"{method} has {count} paths and {other} {len(paths[other])}: one a seed is needed of both"
        )
    pairs = [(complete(a), complete(b)) for a, b in zip(paths[method], paths[other], strict=True)]
    shapes = {(path.losses.shape[1], path.scores.shape[1]) for pair in pairs for path in pair}
    if len(shapes) > 1:
        raise ValueError(
            f"{method} and {other} were measured on other texts or prompts ({sorted(shapes)}); measure them on the same"
        )
    for a, b in pairs:
        starts = [path.alphas[:1].tolist() == [0.0] for path in (a, b)]
        if not all(starts) or not np.array_equal(a.losses[0], b.losses[0]):
            raise ValueError(f"{method} and {other} must both start at alpha = 0, the unchanged model")
    more = {None if path.beside is None else path.beside.shape[1] for pair in pairs for path in pair}
    if len(more) > 1:
        raise ValueError(f"{method} and {other} were measured on other texts beside those that must stay")
    (others,) = more
    values, spans = zip(*(difference(points(a), points(b)) for a, b in pairs), strict=True)
    ((texts, prompts),) = shapes
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        seed_counts, text_counts, prompt_counts = (
            generator.multinomial(size, np.full(size, 1 / size)).astype(float)
            for size in (count, texts, prompts)
        )
        others_counts = (
            None if others is None else generator.multinomial(others, np.full(others, 1 / others)) * 1.0
        )
        drawn = [  # a seed drawn twice counts twice; its texts and prompts are those of every seed
            times * difference(*(points(path, text_counts, prompt_counts, others_counts) for path in pair))[0]
            for times, pair in zip(seed_counts, pairs, strict=True)
            if times
        ]
        found.append(sum(drawn) / count)
    tail = 50 * (1 - level)
    known = np.isfinite(values).all() and np.isfinite(found).any()
    low, high = np.nanpercentile(found, [tail, 100 - tail]) if known else (np.nan, np.nan)
    start, end = np.mean(spans, axis=0)
    ends = (float(low), float(high))
    return Area(method, other, float(np.mean(values)), *ends, values, (float(start), float(end)), draws)


def complete(path: Path) -> Path:
    """The points of a path at which every loss and every score is a number; refused ones drop out."""
    whole = np.isfinite(path.losses).all((1, 2)) & np.isfinite(path.scores).all(1)
    beside = None if path.beside is None else path.beside[whole]
    return Path(path.alphas[whole], path.losses[whole], path.scores[whole], beside)
