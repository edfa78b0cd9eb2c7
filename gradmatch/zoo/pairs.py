"""Sums of products of all models' weights, two by two, in one pass over the files: what cosines and distances are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradmatch.common.settings import layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.stores import spans
from gradmatch.models.views import like

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.checkpoint import Checkpoint

Array = NDArray[np.float64]
AT_ONCE = (
    2**19
)  # values of all models together that are compared at a time: 4 MB in float64, which caches hold


@dataclass(frozen=True)
class Pairs:
    """Sums over the tensors that two models share (same name, same shape, floating), float64.

    Attributes:
        names: of the K models.
        numel: (K, K) how many values two models share; on the diagonal, how many one has.
        dot: (K, K) theta_i' theta_j.
        square: (K, K) ||theta_i||^2 over what it shares with j.
        apart: (K, K) ||theta_i - theta_j||^2.
        tau_dot: (K, K) tau_i' tau_j over what both share with the base and one another; None without a base.
        tau_square: (K, K) ||tau_i||^2 over the same.
        base_square: (K,) ||theta_0||^2 over what a model shares with the base.
        base_dot: (K,) theta_0' theta_i.
        broken: names of models that hold NaN or infinite weights; these weights count as 0.
    """

    names: list[str]
    numel: Array
    dot: Array
    square: Array
    apart: Array
    tau_dot: Array | None
    tau_square: Array | None
    base_square: Array | None
    base_dot: Array | None
    broken: frozenset[str]


def aligned(models: Mapping[str, Checkpoint], base: Checkpoint | None) -> dict[str, Checkpoint]:
    """The models under the names of the base, or of the first model of their kind, as far as transformers knows how."""
    firsts: dict[object, Checkpoint] = {}
    found = {}
    for name, model in models.items():
        kind = (model.config or {}).get("model_type")
        frame = base if base is not None and _kin(model, base) else firsts.setdefault(kind, model)
        try:
            found[name] = like(model, frame)
        except GradmatchError:
            found[name] = model
    return found


def _kin(model: Checkpoint, base: Checkpoint) -> bool:
    kinds = [(one.config or {}).get("model_type") for one in (model, base)]
    return None in kinds or kinds[0] == kinds[1]


def floating(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that are merged: floating ones, a tied one once."""
    return {
        name: model.spec(name).shape
        for name in model.store
        if name not in model.aliases and model.spec(name).floating
    }


def layout(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in the layers, which two models must have alike to be merged; of all, where there are no layers."""
    shapes = floating(model)
    return {name: shape for name, shape in shapes.items() if layer_of(name) is not None} or shapes


def compare(
    models: Mapping[str, Checkpoint],
    base: Checkpoint | None = None,
    advance: Callable[[int], object] | None = None,
) -> Pairs:
    """Read every tensor of all models once, a range at a time, and sum up what pairs of them have in common.

    Differences are taken before they are multiplied, so that small task vectors of large weights keep their digits.

    Args:
        models: under one another's names, see `aligned`.
        base: theta_0, for task vectors.
        advance: called with the number of bytes that were read.
    """
    import torch

    names = list(models)
    count = len(names)
    numel, dot, square, apart, tau_dot, tau_square = (np.zeros((count, count)) for _ in range(6))
    base_square, base_dot = np.zeros(count), np.zeros(count)
    held: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for place, model in enumerate(models.values()):
        for name, shape in floating(model).items():
            held.setdefault((name, shape), []).append(place)
    origin = floating(base) if base is not None else {}
    opened: Sequence[Checkpoint] = list(models.values())
    broken: set[str] = set()
    for (name, shape), rows in held.items():
        own = origin.get(name) == shape
        sources = [opened[row] for row in rows] + ([base] if own and base is not None else [])
        size = 1
        for side in shape:
            size *= side
        here = np.ix_(rows, rows)
        numel[here] += size
        for first, last in spans(size, max(1, AT_ONCE // len(sources))):
            values = torch.empty(len(sources), last - first, dtype=torch.float64)
            for row, source in zip(values, sources, strict=True):
                row.copy_(source.block(name, first, last))
            pivot = len(sources) - 1 if own else 0
            gram = _gram(values, pivot)
            if not np.isfinite(gram).all():
                for row in range(len(sources)):
                    read = sources[row].block(name, first, last)
                    if row < len(rows) and not bool(torch.isfinite(read).all()):
                        broken.add(names[rows[row]])
                    values[row].copy_(read).nan_to_num_(0.0, 0.0, 0.0)
                gram = _gram(values, pivot)
            middle, cross = float(gram[pivot, pivot]), gram[: len(rows), pivot].copy()
            inner = gram[: len(rows), : len(rows)].copy()
            if not own:  # the pivot is a model too, and its difference from itself is 0
                cross[pivot] = inner[pivot] = inner[:, pivot] = 0.0
            norms = inner.diagonal()
            dot[here] += inner + cross[:, None] + cross[None, :] + middle
            square[here] += (norms + 2 * cross + middle)[:, None]
            apart[here] += norms[:, None] + norms[None, :] - 2 * inner
            if own:
                tau_dot[here] += inner
                tau_square[here] += norms[:, None]
                base_square[rows] += middle
                base_dot[rows] += cross + middle
            if advance is not None:
                advance(sum((last - first) * (s.spec(name).nbytes // max(1, size)) for s in sources))
    # a model and itself, and equal models, are 0 apart, whatever the rounding of the sums says
    apart = np.where(apart <= 1e-14 * (square + square.T), 0.0, np.maximum(apart, 0.0))
    given = base is not None
    return Pairs(
        names, numel, dot, square, apart, tau_dot if given else None, tau_square if given else None,
        base_square if given else None, base_dot if given else None, frozenset(broken),
    )  # fmt: skip


def _gram(values: Tensor, pivot: int) -> Array:
    """Products of all rows, the pivot as it is and the others as differences from it, which they are made here."""
    base = values[pivot].clone()
    values -= base
    values[pivot] = base
    found: Array = (values @ values.T).numpy()
    return found


def cosines(dot: Array, square: Array) -> Array:
    """dot_ij / sqrt(square_ij square_ji); 1 on the diagonal, 0 where a vector is zero or nothing is shared.

    dot, square: (K, K). square_ij: ||u_i||^2 over what i shares with j. Returns (K, K), symmetric.

    >>> cosines(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [0.0, 0.0]]))
    array([[1., 0.],
           [0., 1.]])
    """
    scale = np.sqrt(np.maximum(square, 0.0) * np.maximum(square.T, 0.0))
    found: Array = np.clip(np.where(scale > 0, dot / np.where(scale > 0, scale, 1.0), 0.0), -1.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found
