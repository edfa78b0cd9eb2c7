"""Who is left out of a family before anything is scored, and the order of the rest: from products of task vectors, or from curvature files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradmatch.zoo.alike import Similarity
from gradmatch.zoo.finding import Found
from gradmatch.zoo.forecasts import Forecast, forecasts
from gradmatch.zoo.pairs import Array, aligned

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint


TOO_FAR = 3.0  # times the median update of its family: such a learning rate has broken a model


ASTRAY = 0.1  # of the median agreement of its family, below which an update goes nowhere that others go


def agreement(gram: Array) -> Array:
    """(K,) cosine of every task vector with the sum of the others', each of length 1; gram: (K, K) of the task vectors.

    >>> agreement(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).round(3).tolist()
    [0.707, 0.707, 0.0]
    """
    norms = np.sqrt(np.maximum(gram.diagonal(), 0))
    scale = np.where(norms > 0, norms, 1.0)
    cosines = gram / scale[:, None] / scale[None, :]
    count = len(gram)
    found = np.zeros(count)
    for i in range(count):
        others = [j for j in range(count) if j != i]
        whole = cosines[np.ix_(others, others)].sum()
        found[i] = cosines[i, others].sum() / np.sqrt(whole) if whole > 1e-12 else 0.0
    return found


def screened(family: Sequence[str], alike: Similarity) -> dict[str, str]:
    """The members that are left out before anything is evaluated, with the reason."""
    pairs = alike.pairs
    assert pairs.tau_dot is not None
    rows = [alike.names.index(name) for name in family]
    gram = pairs.tau_dot[np.ix_(rows, rows)]
    norms = np.sqrt(np.maximum(gram.diagonal(), 0))
    middle = float(np.median(norms))
    left_out: dict[str, str] = {}
    for name, norm in zip(family, norms, strict=True):
        if norm == 0:
            left_out[name] = "it is the base"
        elif middle > 0 and norm > TOO_FAR * middle:
            left_out[name] = f"its update is {norm / middle:.1f} times as long as that of the median model"
    kept = [place for place, name in enumerate(family) if name not in left_out]
    agreed = agreement(gram[np.ix_(kept, kept)]) if len(kept) > 2 else np.ones(len(kept))
    usual = float(np.median(agreed)) if len(agreed) else 0.0
    for place, value in zip(kept, agreed, strict=True):
        if value < ASTRAY * usual:
            left_out[family[place]] = (
                f"its update agrees with no other: cosine {value:.3f} with their sum, {usual:.3f} of the median model"
            )
    return left_out


def ranked(names: Sequence[str], alike: Similarity, found: Found, base: Checkpoint) -> tuple[list[str], str]:
    """Names, best first by what needs no evaluation, and what that is."""
    if all(found.tasks[name].curvature is not None for name in names):
        models = {name: model for name, model in aligned(found.opened, base).items() if name in names}
        known = Forecast(forecasts(base, models, {name: found.tasks[name] for name in names}), 0.0)
        return sorted(
            names, key=lambda name: (known.cost({name: 1.0}), name)
        ), "the forecast cost of each alone, by curvature files"
    pairs = alike.pairs
    assert pairs.tau_dot is not None
    rows = [alike.names.index(name) for name in names]
    agreed = agreement(pairs.tau_dot[np.ix_(rows, rows)])
    order = sorted(range(len(names)), key=lambda place: (-agreed[place], names[place]))
    return [
        names[place] for place in order
    ], "agreement: the cosine of each task vector with the sum of the others'"
