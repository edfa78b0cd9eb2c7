"""What a merge reads: the base, the tasks and their curvatures, and what is known of single tensors over all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import Setting
from gradmatch.common.warning import warn
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.curvatures import CurvatureStore, Factors
from gradmatch.models.orientation import CONV1D, conv1d_weights
from gradmatch.models.stores import Spec, Store
from gradmatch.models.views import buffers_of, unsaved_of
from gradmatch.rules import Solve

if TYPE_CHECKING:
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
        sizes = [self.anchor.spec(name).nbytes] if self.anchor else []
        for owner, store in self.stores(tasks):
            if not isinstance(store, CurvatureStore):
                continue
            if name in store and store.spec(name).shape != spec.shape:
                raise GradmatchError(
                    f"{owner} has shape {list(store.spec(name).shape)} for {name!r}, the model has {list(spec.shape)}; it belongs to "
                    "another model",
                    "other_weights",
                    name,
                )
            if name in store:
                sizes.append(store.spec(name).nbytes)
            elif request.missing_curvature == "error" and name not in self.buffers:
                raise GradmatchError(
                    f"{owner} has no block for {name!r} (a parameter frozen while it was estimated, or a second copy of a tied one); "
                    "pass missing_curvature='zero' to treat it as flat there",
                    "bad_curvature",
                    name,
                )
        if not isinstance(request.rule, Solve) or len(spec.shape) < 2:
            return sizes, False
        factors = []
        if needs & {"curvature", "gram"}:
            factors = [(self.tasks[t].name, self.tasks[t].factors) for t in tasks]
        if "base_curvature" in needs:
            factors.append(("the base", self.base_factors))
        held = [known.size(name, spec.shape, owner) for owner, known in factors if known is not None]
        # without a diagonal to fall back on, a layer needs the factors of all
        found_factors = request.rule.whole or (all(held) if "gram" in needs else any(held))
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
