"""Opening what a merge reads, and checking it against one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.common.settings import numbers
from gradmatch.estimators.curvature import GRADIENT, MEAN, Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.adapters import UNTIE
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.curvatures import (
    CurvatureStore,
    Factors,
    arranged_curvature,
    moved_curvature,
    open_curvature,
)
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Task
from gradmatch.models.views import like
from gradmatch.plan.inputs import Inputs, OpenTask
from gradmatch.rules import Solve

if TYPE_CHECKING:
    from gradmatch.models.task import Model
    from gradmatch.plan.request import Request


def open_inputs(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    request: Request,
    *,
    base_curvature: Curvature | str | os.PathLike[str] | float | None = None,
    anchor: Model | Checkpoint | None = None,
    allow_mismatch: bool = False,
    allow_pickle: bool = False,
) -> Inputs:
    """Open base, tasks and curvatures; nothing but headers and fingerprints is read.

    Raises:
        ValueError: no tasks, two tasks of one name, a rule without the curvature it needs, a curvature of another model.
        TypeError: tasks that are no Tasks.
        FileNotFoundError: a path that is not there.
    """
    if isinstance(tasks, Task):
        tasks = [tasks]
    tasks = list(tasks)
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(
                f"tasks must be Task objects, got {type(task).__name__}; write Task(model, curvature, weight)"
            )
    if not tasks:
        raise GradmatchError(
            "no tasks to merge; pass at least one Task(model, curvature, weight)", "bad_tasks"
        )
    opened_base = open_checkpoint(base, allow_pickle=allow_pickle)
    names = task_names(tasks)
    opened = []
    for name, task in zip(names, tasks, strict=True):
        checkpoint = open_checkpoint(task.model, base=opened_base, allow_pickle=allow_pickle)
        if broken := sorted(checkpoint.untied - opened_base.untied):
            raise GradmatchError(
                f"{name} is an adapter that trains embeddings or head by itself (modules_to_save), which {opened_base.where} ties "
                f"({broken[0]!r}): {UNTIE}; or give an adapter as the base",
                "bad_adapter",
                name,
            )
        opened.append(_open_task(name, task, checkpoint, opened_base, request, allow_mismatch))
    h0, factors = _base_curvature(base_curvature, opened_base, request, allow_mismatch)
    inputs = Inputs(
        opened_base,
        opened_base.store,
        opened,
        h0,
        factors,
        _anchor(anchor, opened_base, request, allow_pickle),
    )
    owners = [*(task.factors for task in opened), factors]
    if "factors" in request.rule.needs and not any(
        known and any(name in known.a for name in known.a) for known in owners
    ):
        raise GradmatchError(
            f"{request.method} needs curvatures with Kronecker factors, and none of these has any; estimate them with method='kfac' "
            "(`gradmatch estimate --method kfac`), or use gradient_matching, which takes the diagonal",
            "bad_curvature",
        )
    return inputs


def _anchor(
    given: Model | Checkpoint | None, base: Checkpoint, request: Request, allow_pickle: bool
) -> Checkpoint | None:
    """The merge that a rule holds on to, under the base's names; None where the rule needs none."""
    if ("anchor" in request.rule.needs) == (given is None):
        raise GradmatchError(
            f"{request.method} needs anchor=..., another merge of this base (a path or a mapping of tensors)"
            if given is None
            else f"{request.method} takes no anchor; method='anchored' does",
            "bad_setting",
            "anchor",
        )
    if given is None:
        return None
    own = open_checkpoint(given, base=base, allow_pickle=allow_pickle)
    anchor = like(own, base)
    for name in base.store:
        shape = anchor.spec(name).shape if name in anchor else None
        if shape != base.spec(name).shape:
            found = f"shape {list(shape)}" if shape is not None else "none"
            raise GradmatchError(
                f"the anchor {own.where} has {found} for {name!r}, the base {list(base.spec(name).shape)}; it must be a merge of this base",
                "other_weights",
                name,
            )
    return anchor


def task_names(tasks: Sequence[Task]) -> list[str]:
    """Each task's own name, else its folder's, else its position ("task 1").

    Raises:
        ValueError: a name given twice.
    """
    given = [task.name for task in tasks if task.name]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise GradmatchError(
            f"two tasks are called {twice[0]!r}; names tell reports, heads and random draws apart",
            "bad_tasks",
            twice[0],
        )
    names = []
    for position, task in enumerate(tasks, 1):
        name = task.name
        if not name and isinstance(task.model, (str, os.PathLike)):
            name = Path(task.model).name
        if not name or name in names:
            name = f"{name} {position}" if name else f"task {position}"
        names.append(name)
    return names


def _open_task(
    name: str, task: Task, own: Checkpoint, base: Checkpoint, request: Request, allow_mismatch: bool
) -> OpenTask:
    """One task under the base's names, with the curvature that the rule needs."""
    checkpoint = like(own, base)
    opened = OpenTask(name, task.weight, checkpoint, checkpoint.store, options=task.options)
    needs = request.rule.needs
    if not needs & {"curvature", "gradient", "gram"}:
        return opened
    if task.curvature is None and request.rule.signed and max(numbers(task.weight)) < 0:
        return opened  # it is taken away
    if task.curvature is None:
        instead = "negation" if request.rule.removes else "task_arithmetic"
        kind = (
            "gram matrices (`gradmatch estimate --method gram`)"
            if "gram" in needs
            else "a curvature (`gradmatch estimate`)"
        )
        raise GradmatchError(
            f"{request.method} needs {kind} for every task, {name} has none; pass Task(model, curvature=...) "
            f"(--task MODEL,curvature=FILE), or choose a method without, such as {instead}",
            "bad_curvature",
            name,
        )
    curvature = moved_curvature(own, open_curvature(task.curvature), name)
    arranged = arranged_curvature(curvature, own, base, name, allow_mismatch)
    opened.curvature = curvature
    if "curvature" in needs:
        opened.mean = CurvatureStore(curvature, MEAN, arranged)
    if "gradient" in needs:
        if not curvature.has_gradient:
            raise GradmatchError(
                f"{request.method} needs the measured gradient, which the curvature of {name} lacks; estimate it with gradient=True",
                "bad_curvature",
                name,
            )
        opened.gradient = CurvatureStore(curvature, GRADIENT, arranged)
    if "gram" in needs:
        opened.factors = Factors.of(curvature, arranged)
        if not any(name in opened.factors.a for name in checkpoint):
            raise GradmatchError(
                f"the curvature of {name} holds no gram matrices; estimate it with method='gram'",
                "bad_curvature",
                name,
            )
    elif isinstance(request.rule, Solve):
        opened.factors = Factors.of(curvature, arranged)
    return opened


def _base_curvature(
    given: Curvature | str | os.PathLike[str] | float | None,
    base: Checkpoint,
    request: Request,
    allow_mismatch: bool,
) -> tuple[CurvatureStore | float | None, Factors | None]:
    """H0 before its weight and floor: a curvature, an isotropic number, or None where the rule needs none; and its factors."""
    if "base_curvature" not in request.rule.needs:
        return None, None
    if given is None:
        instead = "negation" if request.rule.removes else "fisher"
        raise GradmatchError(
            f"{request.method} needs the base's curvature; pass base_curvature=... (`gradmatch estimate` on the base makes one), "
            f"or a number such as base_curvature=1.0 for an isotropic one, or use method={instead!r}, which needs none",
            "bad_curvature",
        )
    if isinstance(given, Real):  # numpy's too
        given = float(given)
    if isinstance(given, (int, float)):
        if not 0 <= given < float("inf"):
            raise GradmatchError(
                f"base_curvature is {given}; an isotropic curvature is a finite number of at least 0",
                "out_of_range",
                "base_curvature",
            )
        return float(given), None
    curvature = moved_curvature(base, open_curvature(given), "the base")
    arranged = arranged_curvature(curvature, base, base, "the base", allow_mismatch)
    factors = Factors.of(curvature, arranged) if isinstance(request.rule, Solve) else None
    return CurvatureStore(curvature, MEAN, arranged), factors
