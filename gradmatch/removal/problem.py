"""What is removed from what, and how: read tensor by tensor, checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from gradmatch.common.names import nearest
from gradmatch.engine.explain import not_positive
from gradmatch.estimators.curvature import GRADIENT, Curvature
from gradmatch.merging import prepare
from gradmatch.models.curvatures import CurvatureStore, open_curvature
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import torch_dtype
from gradmatch.models.task import Task
from gradmatch.models.tokenizers import check_tokenizers
from gradmatch.models.views import as_module
from gradmatch.rules import RULES, Block, Elementwise, Linear, removals
from gradmatch.rules.removal import GUARDS
from gradmatch.subtraction import largest_alpha

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.measure.objective import Objective
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.stores import Store
    from gradmatch.models.task import Model
    from gradmatch.plan.step import Plan, Step


@dataclass(frozen=True)
class Piece:
    """One tensor of the problem.

    Attributes:
        name: of the tensor.
        theta0, tau: (*s,), the base's weights, and how far the task's lie from them.
        weight: the task's own weight here; alpha multiplies it.
        h0, h: (*s,), curvatures of the summed losses.
        mean0, mean: (*s,), the same per example, without weight and floor.
        gradient0, gradient: (*s,), measured, per example, or None.
    """

    name: str
    theta0: Tensor
    tau: Tensor
    weight: float
    h0: Tensor
    h: Tensor
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
        known = removals()
        if self.method not in known:
            raise ValueError(
                f"unknown way to remove {self.method!r}{nearest(self.method, known)}; known: {', '.join(known)}"
            )
        if self.guard not in GUARDS:
            raise ValueError(f"guard is {self.guard!r}; choose one of {', '.join(GUARDS)}")
        if not isinstance(self.task, Task):
            raise TypeError(
                f"a budget is of one task, a Task(model, curvature), not {type(self.task).__name__}"
            )
        if self.task.curvature is None:
            raise ValueError(
                f"task {self.task.name or 'to remove'!r} has no curvature; estimate it at its weights on what is to be removed"
            )
        for curvature in (self.base_curvature, self.task.curvature):
            if not isinstance(curvature, (int, float)):
                open_curvature(curvature)  # a file that is absent or is none: only its head is read
        check_tokenizers(self.base, self.task.model)

    @cached_property
    def plan(self) -> Plan:
        """What `gradmatch.subtract` would do to each tensor; from headers and fingerprints alone.

        Raises:
            ValueError: whatever `subtract` refuses: a task that was not fine-tuned from this base, a curvature of another
                model, options out of range.
        """
        measured = self.retain is not None or self.remove is not None
        base = as_module(open_checkpoint(self.base)) if measured else self.base  # data run through a module
        return prepare(
            base, [self.task], method="removal", base_curvature=self.base_curvature, base_weight=self.base_weight,
            delta0=self.delta0, keep=self.keep, guard=self.guard, missing_curvature=self.missing_curvature,
            allow_mismatch=self.allow_mismatch,
        )  # fmt: skip

    def pieces(self) -> Iterator[Piece]:
        """Every tensor that moves, one at a time, in float32 or more.

        Raises:
            ValueError: a base's curvature that is negative somewhere.
        """
        inputs = self.plan.inputs
        (task,), prior = inputs.tasks, inputs.base_curvature
        assert task.mean is not None  # Eq. 13 needs both, so the plan has them
        assert prior is not None
        gradients = [
            store.beside(GRADIENT) if isinstance(store, CurvatureStore) else None
            for store in (prior, task.mean)
        ]
        scale0 = self.base_weight * (prior.num_examples if isinstance(prior, CurvatureStore) else 1)
        for step in self.plan.steps:
            if not step.merged:
                continue
            theta0 = _whole(inputs.store, step.name, step)
            tau = _whole(task.store, step.name, step) - theta0
            mean0, mean = _mean(prior, step, theta0), _mean(task.mean, step, theta0)
            h0 = scale0 * mean0 + self.delta0
            if h0.numel() and float(h0.min()) < 0:
                raise ValueError(not_positive(step, int((h0 < 0).sum()), 0, h0.numel()))
            yield Piece(
                step.name, theta0, tau, step.alpha[0], h0, task.mean.num_examples * mean, mean0,
                mean, *(_gradient(store, step) for store in gradients),
            )  # fmt: skip

    def largest_alpha(self, share: float) -> float:
        """The largest alpha at which at most `share` of the coordinates is clamped; inf where none limits."""
        return largest_alpha(self.plan, (share,))[share]

    def displacement(self, piece: Piece, alpha: float) -> Tensor:
        """theta(alpha) - theta0 of one tensor, in its shape."""
        rule, weight = RULES[self.method], alpha * piece.weight
        own = {"keep": self.keep, "guard": self.guard} if rule.guarded else {}
        options = rule.options.changed(self.method, own)
        if isinstance(rule, Linear):
            c0, c, _ = rule.terms([weight], None, options)
            return (c0 + c[0] - 1) * piece.theta0 + c[0] * piece.tau
        if not isinstance(rule, Elementwise):
            raise ValueError(f"what {self.method} costs cannot be forecast: it is no function of each weight")
        column = torch.full((1,) * (piece.tau.dim() + 1), weight, dtype=piece.tau.dtype)
        block = Block(
            theta0=piece.theta0,
            tau=piece.tau[None],
            alpha=column,
            h0=piece.h0,
            h=piece.h[None],
            delta0=self.delta0,
            options=options,
        )
        return rule.elementwise(block) - piece.theta0

    def clamped(self, piece: Piece, alpha: float) -> int:
        """Coordinates of one tensor where the guard steps in: H0 - alpha H_t < keep H0."""
        if not RULES[self.method].guarded:
            return 0
        return int((piece.h0 - alpha * piece.weight * piece.h < self.keep * piece.h0).sum())


def _whole(store: Store, name: str, step: Step) -> Tensor:
    """A tensor in its shape, in the dtype of the arithmetic; a view of its file where that is how it is stored."""
    return store.block(name, 0, step.spec.numel).to(torch_dtype(step.compute)).reshape(step.spec.shape)


def _mean(curvature: CurvatureStore | float, step: Step, like: Tensor) -> Tensor:
    """A curvature per example, (*s,): as stored, the same number everywhere, or 0 where it is taken as flat."""
    if not isinstance(curvature, CurvatureStore):
        return torch.full_like(like, curvature)
    key = curvature.key(step.name)
    return torch.zeros_like(like) if key is None else _whole(curvature, key, step)


def _gradient(store: CurvatureStore | None, step: Step) -> Tensor | None:
    """The measured gradient per example, or None."""
    key = store.key(step.name) if store is not None else None
    if store is None or key is None:
        return None
    return store.block(key, 0, step.spec.numel).reshape(step.spec.shape) / store.num_examples
