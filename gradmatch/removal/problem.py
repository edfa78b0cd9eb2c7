"""What is removed from what, and how: read tensor by tensor, checked before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from estimators.curvature import Curvature
from gradmatch.engine.explain import not_positive
from gradmatch.inputs.curvatures import CurvatureStore, open_curvature
from gradmatch.inputs.stores import torch_dtype
from gradmatch.names import nearest
from gradmatch.plan.request import REMOVALS
from gradmatch.rules.removal import GUARDS, ewr, fisher_negation, removal
from gradmatch.subtraction import largest_alpha
from gradmatch.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.checkpoint import Checkpoint
    from gradmatch.diagnosis.objective import Objective
    from gradmatch.inputs.stores import Store
    from gradmatch.plan.plan import Plan, Step
    from gradmatch.task import Model


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
        method: one of REMOVALS.
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
        if self.method not in REMOVALS:
            raise ValueError(
                f"unknown way to remove {self.method!r}{nearest(self.method, REMOVALS)}; known: {', '.join(REMOVALS)}"
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
        from gradmatch.merging import prepare

        return prepare(
            self.base, [self.task], method="removal", base_curvature=self.base_curvature, base_weight=self.base_weight,
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
        measured = [
            None if isinstance(given, (int, float)) else open_curvature(given)
            for given in (self.base_curvature, self.task.curvature or 0.0)
        ]
        scale0 = self.base_weight * (prior.num_examples if isinstance(prior, CurvatureStore) else 1)
        for step in self.plan.steps:
            if step.action != "merge":
                continue
            theta0 = _whole(inputs.store, step.name, step)
            tau = _whole(task.store, step.name, step) - theta0
            mean0, mean = _mean(prior, step, theta0), _mean(task.mean, step, theta0)
            h0 = scale0 * mean0 + self.delta0
            if h0.numel() and float(h0.min()) < 0:
                raise ValueError(not_positive(step, int((h0 < 0).sum()), 0, h0.numel()))
            yield Piece(
                step.name, theta0, tau, step.alpha[0], h0, task.mean.num_examples * mean, mean0,
                mean, _gradient(measured[0], prior, step.name), _gradient(measured[1], task.mean, step.name),
            )  # fmt: skip

    def largest_alpha(self, share: float) -> float:
        """The largest alpha at which at most `share` of the coordinates is clamped; inf where none limits."""
        return largest_alpha(self.plan, (share,))[share]

    def displacement(self, piece: Piece, alpha: float) -> Tensor:
        """theta(alpha) - theta0 of one tensor, in its shape."""
        if self.method == "negation":
            return -alpha * piece.weight * piece.tau
        tau, h = piece.tau[None], piece.h[None]
        weight = torch.full((1,) * tau.dim(), alpha * piece.weight, dtype=tau.dtype)
        if self.method == "removal":
            return removal(piece.theta0, tau, weight, piece.h0, h, self.keep, self.guard) - piece.theta0
        rule = ewr if self.method == "ewr" else fisher_negation
        return rule(piece.theta0, tau, weight, piece.h0, h) - piece.theta0

    def clamped(self, piece: Piece, alpha: float) -> int:
        """Coordinates of one tensor where the guard steps in: H0 - alpha H_t < keep H0."""
        if self.method != "removal":
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


def _gradient(curvature: Curvature | None, store: CurvatureStore | float, name: str) -> Tensor | None:
    """The measured gradient per example, or None."""
    key = store.key(name) if isinstance(store, CurvatureStore) else None
    gradient = None if key is None or curvature is None else curvature.gradient(key)
    return None if gradient is None or curvature is None else gradient / curvature.num_examples


def check_tokenizers(base: Model | Checkpoint, model: Model) -> None:
    """Compare the tokenizers of two folders; models without a tokenizer file beside them pass.

    Raises:
        ValueError: they differ: token ids mean other words, and a difference of weights means nothing.
    """
    vocabularies = [_vocabulary(base), _vocabulary(model)]
    if None in vocabularies or vocabularies[0] == vocabularies[1]:
        return
    (size, _), (other, _) = (found for found in vocabularies if found is not None)
    raise ValueError(
        f"the tokenizers of {base!s} ({size} tokens) and {model!s} ({other} tokens) differ, so the task was not fine-tuned "
        "from this base; fine-tune this base, with its own tokenizer"
    )


def _vocabulary(model: Model | Checkpoint) -> tuple[int, str] | None:
    """(number of tokens, hash of the vocabulary) of a model folder with a tokenizer.json, else None."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    file = Path(model) / "tokenizer.json"
    if not file.is_file():
        return None
    vocabulary: Any = json.loads(file.read_text(encoding="utf-8")).get("model", {}).get("vocab", {})
    text = json.dumps(vocabulary, sort_keys=True)
    return len(vocabulary), hashlib.sha256(text.encode()).hexdigest()
