"""How alike models are: cosines of weights, of task vectors, of gradients, or what averaging two of them is forecast to cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.models.opening import open_checkpoint
from gradmatch.zoo.finding import Found, Models, find
from gradmatch.zoo.pairs import Array, Pairs, aligned, compare, cosines, floating

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

MEASURES = {
    "weights": "cosine of all weights that two models share, as one long vector",
    "task_vectors": "cosine of the task vectors theta_i - theta_0, as one long vector; 0 for a model that is the base",
    "mismatch": "exp(-r), r the forecast rise of the mean loss of both tasks at the average of the two, in nats per example",
    "gradients": "cosine of the measured gradients of the summed losses, which the curvature files hold",
}


@dataclass(frozen=True)
class Similarity:
    """A matrix of similarities.

    Attributes:
        names: of the K models.
        matrix: (K, K), symmetric, 1 on the diagonal; at most 1.
        by: the measure, a key of MEASURES.
        definition: the measure in words.
        pairs: the sums of products behind it.
        found: the models themselves, and what was skipped.
    """

    names: list[str]
    matrix: Array
    by: str
    definition: str
    pairs: Pairs = field(repr=False)
    found: Found = field(repr=False)

    def of(self, one: str, other: str) -> float:
        """The similarity of two models by their names."""
        return float(self.matrix[self.names.index(one), self.names.index(other)])

    def to_dict(self) -> dict[str, Any]:
        """What `gradmatch zoo inspect --json` prints of it."""
        rows = [[round(float(value), 6) for value in row] for row in self.matrix]
        return {"by": self.by, "definition": self.definition, "names": self.names, "matrix": rows}

    def table(self) -> list[str]:
        """The matrix as lines of text, columns by number."""
        width = max(len(name) for name in self.names)
        lines = [f"similarity by {self.by}: {self.definition}"]
        lines.append(" " * (width + 5) + " ".join(f"{n:>6}" for n in range(1, len(self.names) + 1)))
        for number, (name, row) in enumerate(zip(self.names, self.matrix, strict=True), 1):
            lines.append(f"{number:>3}  {name:<{width}}" + " ".join(f"{value:6.3f}" for value in row))
        return lines


def similarity(
    models: Models,
    base: Model | None = None,
    *,
    by: str = "weights",
    allow_pickle: bool = False,
    progress: bool = False,
) -> Similarity:
    """Compare all models of a zoo, two by two, in one pass over their files and in a few hundred MB of memory at most.

    Args:
        models: name -> model, or a list of models, tasks and folders of models; tasks with curvature files for "mismatch" and "gradients".
        base: theta_0; needed for "task_vectors" and "mismatch".
        by: see MEASURES. "mismatch" holds all task vectors in memory.
        allow_pickle: read .bin and .pt files too.
        progress: show a progress bar.

    Raises:
        GradmatchError: an unknown measure, no base where one is needed, or no curvature files where these are.

    >>> import torch
    >>> zoo = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([1.0, 1.0])}}
    >>> round(similarity(zoo).of("a", "b"), 4)
    0.7071
    """
    return similarity_of(*opened_for(by, models, base, allow_pickle), by, progress)


def opened_for(
    by: str, models: Models, base: Model | None, allow_pickle: bool
) -> tuple[Found, Checkpoint | None]:
    """The models that a measure compares, and the base; errors as `similarity`."""
    choose("by", by, MEASURES)
    opened = None if base is None else open_checkpoint(base, allow_pickle=allow_pickle)
    if opened is None and by in ("task_vectors", "mismatch"):
        raise GradmatchError(
            f"by={by!r} compares what models have added to a base; pass base=...", "bad_choice", by
        )
    return find(models, opened, allow_pickle=allow_pickle), opened


def similarity_of(found: Found, base: Checkpoint | None, by: str, progress: bool = False) -> Similarity:
    """`similarity` of models that are open."""
    models = aligned(found.opened, base)
    if by == "mismatch":
        from gradmatch.zoo.forecasts import pairwise

        if base is None:
            raise GradmatchError("by='mismatch' needs a base; pass base=...", "bad_choice", by)
        matrix = pairwise(base, models, found.tasks)
    elif by == "gradients":
        matrix = _gradients(found)
    with _bar(models, base, progress) as advance:
        pairs = compare(models, base, advance)
    if by == "weights":
        matrix = cosines(pairs.dot, pairs.square)
    elif by == "task_vectors":
        assert pairs.tau_dot is not None
        assert pairs.tau_square is not None
        matrix = cosines(pairs.tau_dot, pairs.tau_square)
    return Similarity(pairs.names, matrix, by, MEASURES[by], pairs, found)


def _gradients(found: Found) -> Array:
    """(K, K) cosines of stored gradients over the tensors that two files share."""
    from gradmatch.zoo.forecasts import curvatures_of

    curvatures = curvatures_of(found.tasks)
    names = list(curvatures)
    dot, square = np.zeros((len(names), len(names))), np.zeros((len(names), len(names)))
    gradients: dict[str, Mapping[str, Any]] = {}
    for name, curvature in curvatures.items():
        if not curvature.has_gradient:
            raise GradmatchError(
                f"the curvature of {name} holds no gradient; estimate it with `gradmatch estimate --gradient`",
                "bad_curvature",
                name,
            )
        gradients[name] = curvature
    for i, one in enumerate(names):
        for j, other in enumerate(names[: i + 1]):
            for key in curvatures[one]:
                if key not in curvatures[other]:
                    continue
                u, v = curvatures[one].gradient(key), curvatures[other].gradient(key)
                if u is None or v is None or u.shape != v.shape:
                    continue
                x, y = u.double().flatten(), v.double().flatten()
                dot[i, j] += float(x @ y)
                square[i, j] += float(x @ x)
                if i != j:
                    square[j, i] += float(y @ y)
            dot[j, i] = dot[i, j]
    return cosines(dot, square)


def _bar(models: Mapping[str, Checkpoint], base: Checkpoint | None, shown: bool) -> Any:
    """A progress bar over bytes; as a context its `update`, or None."""
    from contextlib import contextmanager

    @contextmanager
    def bar() -> Any:
        if not shown:
            yield None
            return
        from tqdm import tqdm

        opened = [*models.values(), *([base] if base is not None else [])]
        total = sum(model.spec(name).nbytes for model in opened for name in floating(model))
        with tqdm(total=total, unit="B", unit_scale=True, desc="comparing") as one:
            yield one.update

    return bar()
