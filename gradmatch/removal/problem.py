"""What is removed from what, and how: read tensor by tensor, checked before anything is read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.curvature import GRADIENT, Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.header import ITEM_SIZE
from gradmatch.estimators.names import choose
from gradmatch.merging import Merged, execute, prepare
from gradmatch.models.curvatures import CurvatureStore, Prior, open_curvature
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import torch_dtype
from gradmatch.models.task import Task
from gradmatch.models.tokenizers import check_tokenizers
from gradmatch.models.views import as_module
from gradmatch.rules import RULES, Rule, removals
from gradmatch.rules.removal import GUARDS
from gradmatch.subtraction import largest_alpha, scaled, task_of

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.measure.objective import Objective
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.stores import Store
    from gradmatch.models.task import Model
    from gradmatch.plan.step import Plan, Step


@dataclass(frozen=True)
class Piece:
    """One tensor that moves.

    Attributes:
        name: of the tensor.
        theta0, tau: (*s,), the base's weights, and how far the task's lie from them.
        h0: (*s,), H0 of the summed loss, weight and floor included.
        mean0, mean: (*s,), curvatures of the base and of the task per example, without weight and floor; None where there is none.
        gradient0, gradient: (*s,), measured, per example, or None.
    """

    name: str
    theta0: Tensor
    tau: Tensor
    h0: Tensor
    mean0: Tensor | None
    mean: Tensor | None
    gradient0: Tensor | None
    gradient: Tensor | None


@dataclass(frozen=True)
class Problem:
    """A base, what is to be removed from it, and how: everything that the functions here share.

    Attributes:
        base: the model that knows too much; path, hub id, state dict or module.
        task: fine-tuned from it on what is to be removed, or several; with their curvatures where the method needs them. alpha
            multiplies their own weights. None for "ascent".
        base_curvature: of the base, on what must stay; or a number for an isotropic one; None for negation.
        method: a rule that removes.
        base_weight, delta0: H0 = base_weight * N0 F0 + delta0.
        keep: what must remain of H0 - alpha H_t, as a share of H0.
        guard: how, one of `gradmatch.rules.removal.GUARDS`.
        retain: data that must stay (an `Objective` on the base's module), or None; `beside`: more such data, by name.
        remove: data to be removed, or None.
        missing_curvature, allow_mismatch: as for `merge`.
        gradient: for "ascent", as for `subtract`.
        options: more of the method's (damping, structure, ...).

    Raises:
        ValueError: unknown method or guard, a task without the curvature that the method needs, or a tokenizer that is not the base's.
        TypeError: a task that is no Task.
    """

    base: Model | Checkpoint
    task: Task | Sequence[Task] | None
    base_curvature: Curvature | str | os.PathLike[str] | float | None
    method: str = "removal"
    base_weight: float = 1.0
    delta0: float = 1e-6
    keep: float = 0.1
    guard: str = "floor"
    retain: Objective | None = None
    remove: Objective | None = None
    missing_curvature: str = "error"
    allow_mismatch: bool = False
    gradient: Curvature | str | os.PathLike[str] | None = None
    beside: Mapping[str, Objective] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        choose("method", self.method, removals())
        choose("guard", self.guard, GUARDS)
        for task in self.tasks:
            if not isinstance(task, Task):
                raise TypeError(
                    f"a budget is of a Task(model, curvature), or of several, not {type(task).__name__}"
                )
            if task.curvature is None and "curvature" in self.rule.needs:
                raise GradmatchError(
                    f"task {task.name or 'to remove'!r} has no curvature; estimate it at its weights on what is to be removed",
                    "bad_curvature",
                    task.name,
                )
        for curvature in (self.base_curvature, *(task.curvature for task in self.tasks)):
            if curvature is not None and not isinstance(curvature, (int, float)):
                open_curvature(curvature)  # a file that is absent or is none: only its head is read
        for task in self.tasks:
            check_tokenizers(self.base, task.model)

    @property
    def rule(self) -> Rule:
        """The method's rule."""
        return RULES[self.method]

    @cached_property
    def tasks(self) -> list[Task]:
        """What is to be removed; of an ascent the base with the gradient."""
        given = task_of(self.base, self.task, self.gradient, self.method)
        return [given] if isinstance(given, Task) or not isinstance(given, Sequence) else list(given)

    @property
    def sides(self) -> dict[str, Objective]:
        """All data by name: "retain", those beside it, "remove"."""
        given = {"retain": self.retain, **self.beside, "remove": self.remove}
        return {name: one for name, one in given.items() if one is not None}

    @cached_property
    def plan(self) -> Plan:
        """What Eq. 13 (or the method, where there is less than Eq. 13 needs) does to each tensor at alpha = 1; from headers alone.

        Raises:
            ValueError: whatever `gradmatch.subtract` refuses: a task that was not fine-tuned from this base, a curvature of
                another model, options out of range.
        """
        known = all(task.curvature is not None for task in self.tasks) and self.base_curvature is not None
        whole = known and len(self.tasks) == 1 and not self.rule.damped
        return self._planned("removal" if whole else self.method, self.tasks)

    def at(self, alpha: float) -> Merged:
        """The model with this alpha, as `gradmatch.subtract` makes it, in memory; half precision is widened, not rounded to.

        Raises:
            ValueError: whatever the merge refuses, such as a base's curvature that is negative somewhere.
        """
        if not self.rule.damped:
            return self._made(alpha)
        one, base = self._unit, self.plan.inputs.base  # linear in alpha, and eigenvectors are dear
        moved = {step.name for step in one.made.steps if step.merged}
        found = Merged(
            {
                name: torch.lerp(base[name].to(value), value, alpha) if name in moved else value
                for name, value in one.items()
            }
        )
        found.report, found.made = one.report, one.made
        return found

    @cached_property
    def _unit(self) -> Merged:
        return self._made(1.0)

    def _made(self, alpha: float) -> Merged:
        base = self.plan.inputs.base
        half = any(spec.floating and ITEM_SIZE[spec.dtype] < 4 for spec in map(base.spec, base))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a path tries what it warns of
            tasks = [scaled(task, alpha) for task in self.tasks]
            made = self._planned(self.method, tasks, dtype="float32" if half else None)
            return execute(made)  # type: ignore[return-value]

    def _planned(self, method: str, tasks: Sequence[Task], **options: Any) -> Plan:
        own: dict[str, Any] = {"keep": self.keep, "guard": self.guard} if RULES[method].guarded else {}
        own |= self.options if method == self.method else {}
        if "base_curvature" in RULES[method].needs:
            own |= {"base_curvature": self.base_curvature}
        base = as_module(open_checkpoint(self.base)) if self.sides else self.base  # data run through a module
        return prepare(
            base, tasks, method=method, base_weight=self.base_weight, delta0=self.delta0,
            missing_curvature=self.missing_curvature, allow_mismatch=self.allow_mismatch, **own, **options,
        )  # fmt: skip

    def pieces(self) -> Iterator[Piece]:
        """Every tensor that moves, one at a time, in float32 or more; tau of the first task."""
        inputs = self.plan.inputs
        task, prior = inputs.tasks[0], inputs.base_curvature
        gradients = [
            store.beside(GRADIENT) if isinstance(store, CurvatureStore) else None
            for store in (prior, task.mean)
        ]
        h0 = Prior.of(prior, self.base_weight, self.delta0)
        for step in self.plan.steps:
            if not step.merged:
                continue
            theta0 = _whole(inputs.store, step.name, step)
            mean0 = None if prior is None else _mean(prior, step, theta0)
            mean = None if task.mean is None else _mean(task.mean, step, theta0)
            yield Piece(
                step.name, theta0, _whole(task.store, step.name, step) - theta0,
                h0.at(torch.zeros_like(theta0) if mean0 is None else mean0), mean0, mean, *(_gradient(store, step) for store in gradients),
            )  # fmt: skip

    def largest_alpha(self, share: float) -> float:
        """The largest alpha at which at most `share` of the coordinates is clamped; inf where none limits."""
        return largest_alpha(self.plan, (share,))[share]


def _whole(store: Store, name: str, step: Step) -> Tensor:
    """A tensor in its shape, in the dtype of the arithmetic; a view of its file where that is how it is stored."""
    return store.block(name, 0, step.spec.numel).to(torch_dtype(step.compute)).reshape(step.spec.shape)


def _mean(curvature: CurvatureStore | float, step: Step, like: Tensor) -> Tensor:
    """A curvature per example, (*s,): as stored, the same number everywhere, or 0 where it is taken as flat."""
    if not isinstance(curvature, CurvatureStore):
        return torch.full_like(like, curvature)
    return _whole(curvature, step.name, step) if step.name in curvature else torch.zeros_like(like)


def _gradient(store: CurvatureStore | None, step: Step) -> Tensor | None:
    """The measured gradient per example, or None."""
    if store is None or step.name not in store:
        return None
    return store.block(step.name, 0, step.spec.numel).reshape(step.spec.shape) / store.num_examples
