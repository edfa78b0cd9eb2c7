"""The files that a merge reads: an output must not lie on them, and only a run of the same ones may be resumed."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.output.card import versions
from gradmatch.output.carried import CARRIED, carried
from gradmatch.output.publishing import check_apart_from

if TYPE_CHECKING:
    from gradmatch.models.stores import Store
    from gradmatch.plan.inputs import Inputs
    from gradmatch.plan.step import Plan


def stores(inputs: Inputs) -> Iterator[Store]:
    """Everything that values are read from, factors too."""
    yield from (store for _, store in inputs.stores(range(len(inputs.tasks))))
    for factors in (*(task.factors for task in inputs.tasks), inputs.base_factors):
        if factors is not None:
            yield from (factors.a, factors.b)


def weight_files(inputs: Inputs) -> set[Path]:
    """Files with values: weights, adapters' factors, curvatures."""
    return {file.path for store in stores(inputs) for name in store for file, _, _ in store.files(name)}


def model_paths(inputs: Inputs) -> list[Path]:
    """The folder or file of every model that has one."""
    models = (
        inputs.base,
        *(task.checkpoint for task in inputs.tasks),
        *([inputs.anchor] if inputs.anchor else []),
    )
    return [path for model in models for path in (model.path, model.folder) if path is not None]


def check_apart(out: Path, inputs: Inputs) -> None:
    """Refuse an output that is, holds or lies in something that the merge reads.

    Raises:
        ValueError: both paths are named.
    """
    check_apart_from(out, (*model_paths(inputs), *weight_files(inputs)), "the merge reads")


def identity(made: Plan) -> str:
    """What makes two runs the same merge: request, steps, library versions, and the files they read.

    Files count by size and time of change: weights, factors, curvatures, and what stands beside them (configs of models and
    adapters, tokenizers). In-memory inputs are never the same.
    """
    inputs = made.inputs
    beside = [
        path
        for folder in model_paths(inputs)
        if folder.is_dir()
        for path in folder.iterdir()
        if path.suffix in CARRIED and path.is_file()
    ]
    base = inputs.base.folder
    beside += [base / name for name in carried(base)] if base else []
    files = {}
    for path in {*weight_files(inputs), *beside}:
        found = path.stat()
        files[str(path.resolve())] = [found.st_size, found.st_mtime_ns]
    memory = any(not store.files(name) for store in stores(inputs) for name in store)
    steps = [
        (
            s.name,
            s.path,
            s.formula,
            str(s.spec),
            s.compute,
            s.tasks,
            s.alpha,
            dict(s.options),
            [(n, dict(o)) for n, o in (*s.edits, *s.after)],
        )
        for s in made.steps
    ]
    content: list[Any] = [
        {one.name: getattr(made.request, one.name) for one in fields(made.request)},
        steps,
        files,
        [task.name for task in inputs.tasks],
        inputs.base_curvature if isinstance(inputs.base_curvature, float) else None,
        versions(),
        uuid.uuid4().hex if memory else "",
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
