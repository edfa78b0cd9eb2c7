"""What is removed from what, and how: read tensor by tensor, checked before anything is read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.curvature import GRADIENT, Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.header import ITEM_SIZE
from gradmatch.estimators.names import choose
from gradmatch.merging import execute, prepare
from gradmatch.models.curvatures import CurvatureStore, Prior, open_curvature
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import torch_dtype
from gradmatch.models.task import Task
from gradmatch.models.tokenizers import check_tokenizers
from gradmatch.models.views import as_module
from gradmatch.rules import RULES, removals
from gradmatch.rules.removal import GUARDS
from gradmatch.subtraction import largest_alpha, scaled

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.measure.objective import Objective
    from gradmatch.merging import Merged
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
        mean0, mean: (*s,), curvatures of the base and of the task per example, without weight and floor.
        gradient0, gradient: (*s,), measured, per example, or None.
    """

    name: str
    theta0: Tensor
    tau: Tensor
    h0: Tensor
    mean0: Tensor
    mean: Tensor
    gradient0: Tensor | None
    gradient: Tensor | None


@dataclass(frozen=True)
class Problem:
    """A base, one task to remove, and how: everything that the functions here share.

    Attributes:
        base: the model that knows too much; path, hub id, state dict or module.
        task: fine-tuned from it on what is to be removed, with its curvature; alpha multiplies its own weight.
        base_curvature: of the base, on what must stay; or a number for an isotropic one.
        method: a rule that removes.
        base_weight, delta0: H0 = base_weight * N0 F0 + delta0.
        keep: what must remain of H0 - alpha H_t, as a share of H0.
        guard: how, one of `gradmatch.rules.removal.GUARDS`.
        retain: data that must stay (an `Objective` on the base's module), or None.
        remove: data to be removed, or None.
        missing_curvature, allow_mismatch: as for `merge`.

    Raises:
        ValueError: unknown method or guard, a task without curvature, or a tokenizer that is not the base's.
        TypeError: a task that is no Task.
    """

    base: Model | Checkpoint
    task: Task
    base_curvature: Curvature | str | os.PathLike[str] | float
    method: str = "removal"
    base_weight: float = 1.0
    delta0: float = 1e-6
    keep: float = 0.1
    guard: str = "floor"
    retain: Objective | None = None
    remove: Objective | None = None
    missing_curvature: str = "error"
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        choose("method", self.method, removals())
        choose("guard", self.guard, GUARDS)
        if not isinstance(self.task, Task):
            raise TypeError(
                f"a budget is of one task, a Task(model, curvature), not {type(self.task).__name__}"
            )
        if self.task.curvature is None:
            raise GradmatchError(
                f"task {self.task.name or 'to remove'!r} has no curvature; estimate it at its weights on what is to be removed",
                "bad_curvature",
                self.task.name,
            )
        for curvature in (self.base_curvature, self.task.curvature):
            if not isinstance(curvature, (int, float)):
                open_curvature(curvature)  # a file that is absent or is none: only its head is read
        check_tokenizers(self.base, self.task.model)

    @cached_property
    def plan(self) -> Plan:
        """What Eq. 13 would do to each tensor at alpha = 1; from headers and fingerprints alone.

        Raises:
            ValueError: whatever `gradmatch.subtract` refuses: a task that was not fine-tuned from this base, a curvature of
                another model, options out of range.
        """
        return self._planned("removal", self.task)

    def at(self, alpha: float) -> Merged:
        """The model with this alpha, as `gradmatch.subtract` makes it, in memory; half precision is widened, not rounded to.

        Raises:
            ValueError: whatever the merge refuses, such as a base's curvature that is negative somewhere.
        """
        base = self.plan.inputs.base
        half = any(spec.floating and ITEM_SIZE[spec.dtype] < 4 for spec in map(base.spec, base))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a path tries what it warns of
            made = self._planned(self.method, scaled(self.task, alpha), dtype="float32" if half else None)
            return execute(made)  # type: ignore[return-value]

    def _planned(self, method: str, task: Task, **options: Any) -> Plan:
        own: dict[str, Any] = {"keep": self.keep, "guard": self.guard} if RULES[method].guarded else {}
        measured = self.retain is not None or self.remove is not None
        base = as_module(open_checkpoint(self.base)) if measured else self.base  # data run through a module
        return prepare(
            base, [task], method=method, base_curvature=self.base_curvature, base_weight=self.base_weight, delta0=self.delta0,
            missing_curvature=self.missing_curvature, allow_mismatch=self.allow_mismatch, **own, **options,
        )  # fmt: skip

    def pieces(self) -> Iterator[Piece]:
        """Every tensor that moves, one at a time, in float32 or more."""
        inputs = self.plan.inputs
        (task,), prior = inputs.tasks, inputs.base_curvature
        assert task.mean is not None  # Eq. 13 needs both, so the plan has them
        assert prior is not None
        gradients = [
            store.beside(GRADIENT) if isinstance(store, CurvatureStore) else None
            for store in (prior, task.mean)
        ]
        h0 = Prior.of(prior, self.base_weight, self.delta0)
        for step in self.plan.steps:
            if not step.merged:
                continue
            theta0 = _whole(inputs.store, step.name, step)
            mean0 = _mean(prior, step, theta0)
            yield Piece(
                step.name, theta0, _whole(task.store, step.name, step) - theta0, h0.at(mean0), mean0,
                _mean(task.mean, step, theta0), *(_gradient(store, step) for store in gradients),
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
