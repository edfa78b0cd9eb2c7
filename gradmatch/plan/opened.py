"""The opened inputs of a merge: base, tasks and curvatures, checked against one another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import Setting
from gradmatch.common.warning import warn
from gradmatch.estimators.curvature import GRADIENT, MEAN, Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.adapters import UNTIE
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.curvatures import CurvatureStore, Factors, arranged_curvature, open_curvature
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.orientation import CONV1D, conv1d_weights
from gradmatch.models.stores import Spec, Store
from gradmatch.models.task import Task
from gradmatch.models.views import buffers_of, like, unsaved_of
from gradmatch.rules import Solve

if TYPE_CHECKING:
    from gradmatch.models.task import Model
    from gradmatch.plan.request import Request

UNNAMED = re.compile(r"task \d+")


@dataclass
class OpenTask:
    """A task with its files opened."""

    name: str
    weight: Setting
    checkpoint: Checkpoint
    store: Store
    curvature: Curvature | None = None
    mean: CurvatureStore | None = None
    gradient: CurvatureStore | None = None
    factors: Factors | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Inputs:
    """Everything that a merge reads."""

    base: Checkpoint
    store: Store
    tasks: list[OpenTask]
    base_curvature: CurvatureStore | float | None = None
    base_factors: Factors | None = None
    anchor: Checkpoint | None = None

    def stores(self, tasks: Iterable[int]) -> Iterator[tuple[str, Store]]:
        """Whose values are read, and where from, of some tasks alone: models, and the curvatures that the rule needs."""
        yield "the base", self.store
        if self.anchor is not None:
            yield "the anchor", self.anchor.store
        for task in (self.tasks[t] for t in tasks):
            yield task.name, task.store
            if task.mean is not None:
                yield f"the curvature of {task.name}", task.mean
            if task.gradient is not None:
                yield f"the gradient of {task.name}", task.gradient
        if isinstance(self.base_curvature, CurvatureStore):
            yield "the curvature of the base", self.base_curvature

    @cached_property
    def buffers(self) -> frozenset[str]:
        """The base's tensors that its module keeps as buffers: no loss has a curvature in them, so it is flat there."""
        return buffers_of(self.base)

    @cached_property
    def unsaved(self) -> frozenset[str]:
        """The base's tensors that its class computes (sinusoids) and does not save, so that files lack them."""
        return unsaved_of(self.base)

    def curvatures_of(
        self, name: str, tasks: Sequence[int], request: Request, spec: Spec
    ) -> tuple[list[int], bool]:
        """Check that the curvatures which the rule needs are there for one tensor.

        Returns:
            Their sizes in bytes, and whether there are the factors that a rule needs which solves for a matrix.

        Raises:
            ValueError: a curvature lacks the tensor and no policy was chosen, or its shape differs.
        """
        needs = request.rule.needs
        stores: list[tuple[str, CurvatureStore | None]] = []
        if "base_curvature" in needs and isinstance(self.base_curvature, CurvatureStore):
            stores.append(("the base", self.base_curvature))
        for position in tasks:
            task = self.tasks[position]
            if "curvature" in needs:
                stores.append((task.name, task.mean))
            if "gradient" in needs:
                stores.append((task.name, task.gradient))
        sizes = [self.anchor.spec(name).nbytes] if self.anchor else []
        for owner, store in stores:
            if store is None or name not in store:
                if request.missing_curvature == "error" and name not in self.buffers:
                    raise GradmatchError(
                        f"the curvature of {owner} has no block for {name!r} (a parameter frozen while it was "
                        "estimated, or a second copy of a tied one); pass missing_curvature='zero' to treat it as flat there",
                        "bad_curvature",
                        owner,
                    )
                continue
            found = store.spec(name)
            if found.shape != spec.shape:
                raise GradmatchError(
                    f"the curvature of {owner} has shape {list(found.shape)} for {name!r}, the model has {list(spec.shape)}; "
                    "it belongs to another model",
                    "other_weights",
                    owner,
                )
            sizes.append(found.nbytes)
        if not isinstance(request.rule, Solve) or len(spec.shape) < 2:
            return sizes, False
        if not needs:  # what it solves with is made of the matrices themselves
            self.check_conv1d(name, spec, request)
            return sizes, True
        factors = []
        if needs & {"curvature", "gram"}:
            factors = [(self.tasks[t].name, self.tasks[t].factors) for t in tasks]
        if "base_curvature" in needs:
            factors.append(("the base", self.base_factors))
        held = [known.size(name, spec.shape, owner) for owner, known in factors if known is not None]
        # without a diagonal to fall back on, a layer needs the factors of all
        found_factors = all(held) if "gram" in needs else any(held)
        if found_factors:
            sizes += held
            self.check_conv1d(name, spec, request)
        return sizes, found_factors

    @cached_property
    def conv1d(self) -> dict[str, bool]:
        """Of each weight whether it is stored [in, out], as GPT-2's Conv1D layers do; empty where no model tells."""
        models = (self.base, *(task.checkpoint for task in self.tasks))
        return next(filter(None, map(conv1d_weights, models)), {})

    def check_conv1d(self, name: str, spec: Spec, request: Request) -> None:
        """Refuse a matrix that may be stored either way: a square one, or any where no curvature's factors tell.

        Raises:
            ValueError: it is named like a Conv1D layer, and neither the models nor the option tell.
        """
        unclear = spec.shape[0] == spec.shape[-1] or not request.rule.needs  # without factors, no size tells
        told = request.options.get("conv1d") is not None
        if len(spec.shape) == 2 and unclear and not told and CONV1D.search(name) and name not in self.conv1d:
            raise GradmatchError(
                f"{request.method}: {name!r} {list(spec.shape)} is stored [in, out] in GPT-2's Conv1D layers and [out, in] in nn.Linear, and "
                "no module or config of these models tells which; pass models or folders, or the option conv1d=True or False",
                "bad_model",
                name,
            )

    def describe(self, notes: list[str], request: Request) -> None:
        """Warn of what is legal and probably unintended."""
        weights = [task.weight for task in self.tasks]
        if not request.rule.weighs and any(weight != weights[0] for weight in weights):
            notes.append(f"{request.method} ignores the weights {weights}; 'weighted' uses them")
            warn(notes[-1])
        unnamed = [task.name for task in self.tasks if UNNAMED.fullmatch(task.name)]
        random = any("seed" in options for _, options in request.edits)
        if random and len(unnamed) > 1:
            notes.append(
                "random draws follow the names of tasks, and these have none of their own, so their order matters: "
                f"{', '.join(unnamed)}; pass Task(..., name=...)"
            )
            warn(notes[-1])
        owners = [*((task.name, task.factors) for task in self.tasks), ("the base", self.base_factors)]
        for owner, known in owners:
            if known is not None and known.a.left:
                left = known.a.left
                notes.append(
                    f"factors of {len(left)} layers in the curvature of {owner} are not used, first {left[0]!r}: the base stores these "
                    "matrices stacked or split, where factors do not follow; give the base as a module to use them"
                )
                warn(notes[-1])
        if request.rule.caution:
            notes.append(request.rule.caution)
            warn(notes[-1])


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
    name: str,
    task: Task,
    own: Checkpoint,
    base: Checkpoint,
    request: Request,
    allow_mismatch: bool,
) -> OpenTask:
    """One task under the base's names, with the curvature that the rule needs."""
    checkpoint = like(own, base)
    opened = OpenTask(name, task.weight, checkpoint, checkpoint.store, options=task.options)
    needs = request.rule.needs
    if not needs & {"curvature", "gradient", "gram"}:
        return opened
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
    curvature = open_curvature(task.curvature)
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
    curvature = open_curvature(given)
    arranged = arranged_curvature(curvature, base, base, "the base", allow_mismatch)
    factors = Factors.of(curvature, arranged) if isinstance(request.rule, Solve) else None
    return CurvatureStore(curvature, MEAN, arranged), factors
