"""What is removed from what, and how: read tensor by tensor, checked before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from estimators.curvature import Curvature
from gradmatch.checkpoint import open_checkpoint
from gradmatch.names import nearest
from gradmatch.plan.request import REMOVALS
from gradmatch.rules.removal import GUARDS, ewr, fisher_negation, removal
from gradmatch.subtraction import largest_alpha
from gradmatch.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.checkpoint import Checkpoint
    from gradmatch.diagnosis.objective import Objective
    from gradmatch.task import Model


@dataclass(frozen=True)
class Piece:
    """One tensor of the problem: theta0, tau, curvatures of the summed losses, per-example means, gradients (or None)."""

    name: str
    theta0: Tensor
    tau: Tensor
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
        task: fine-tuned from it on what is to be removed, with its curvature.
        base_curvature: of the base, on what must stay.
        method: one of REMOVALS.
        base_weight, delta0: H0 = base_weight * N0 F0 + delta0.
        keep: what must remain of H0 - alpha H_t, as a share of H0.
        guard: how, one of `gradmatch.rules.removal.GUARDS`.
        retain: data that must stay (an `Objective` on the base's module), or None.
        remove: data to be removed, or None.

    Raises:
        ValueError: unknown method or guard, a task without curvature, or a tokenizer that is not the base's.
    """

    base: Model
    task: Task
    base_curvature: Curvature | str | os.PathLike[str]
    method: str = "removal"
    base_weight: float = 1.0
    delta0: float = 1e-6
    keep: float = 0.1
    guard: str = "floor"
    retain: Objective | None = None
    remove: Objective | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        if self.method not in REMOVALS:
            raise ValueError(
                f"unknown way to remove {self.method!r}{nearest(self.method, REMOVALS)}; known: {', '.join(REMOVALS)}"
            )
        if self.guard not in GUARDS:
            raise ValueError(f"guard is {self.guard!r}; choose one of {', '.join(GUARDS)}")
        if self.task.curvature is None:
            raise ValueError(
                f"task {self.task.name or 'to remove'!r} has no curvature; estimate it at its weights on what is to be removed"
            )
        for curvature in (self.base_curvature, self.task.curvature):
            opened(curvature)  # a file that is absent or is none: only its head is read
        check_tokenizers(self.base, self.task.model)

    def pieces(self) -> Iterator[Piece]:
        """Every tensor with curvature, one at a time, in float32 or more.

        Raises:
            ValueError: a tensor that the task lacks or that has another shape there, or no curvature of the task.
        """
        base, base_curvature, curvature = (
            open_checkpoint(self.base),
            opened(self.base_curvature),
            opened(self.task.curvature),
        )
        model = open_checkpoint(self.task.model, base=base)
        for name in base_curvature:
            if name not in model or name not in curvature or name not in base:
                raise ValueError(
                    f"{name!r} has a curvature of the base, but the base, the task or its curvature lacks it"
                )
            theta0, theta = at_least_single(base[name]), at_least_single(model[name])
            if theta.shape != theta0.shape:
                raise ValueError(
                    f"{name!r} is {list(theta0.shape)} in the base and {list(theta.shape)} in the task, which therefore was not "
                    "fine-tuned from it; align them first (embeddings='intersect' of merge), or fine-tune this base"
                )
            mean0, mean = base_curvature.mean(name).to(theta0), curvature.mean(name).to(theta0)
            yield Piece(
                name, theta0, theta - theta0, self.base_weight * base_curvature.num_examples * mean0 + self.delta0,
                curvature.num_examples * mean, mean0, mean, mean_gradient(base_curvature, name), mean_gradient(curvature, name),
            )  # fmt: skip

    def largest_alpha(self, share: float) -> float:
        """The largest alpha at which at most `share` of the coordinates is clamped; inf where none limits."""
        task = replace(self.task, weight=1.0)
        options = {"keep": self.keep, "base_weight": self.base_weight, "delta0": self.delta0}
        return largest_alpha(self.base, [task], self.base_curvature, shares=(share,), **options)[share]

    def displacement(self, piece: Piece, alpha: float) -> Tensor:
        """theta(alpha) - theta0 of one tensor, in its shape."""
        tau, h = piece.tau[None], piece.h[None]
        weight = torch.full((1,) * tau.dim(), alpha, dtype=tau.dtype)
        if self.method == "negation":
            return -alpha * piece.tau
        if self.method == "removal":
            return removal(piece.theta0, tau, weight, piece.h0, h, self.keep, self.guard) - piece.theta0
        rule = ewr if self.method == "ewr" else fisher_negation
        return rule(piece.theta0, tau, weight, piece.h0, h) - piece.theta0

    def clamped(self, piece: Piece, alpha: float) -> int:
        """Coordinates of one tensor where the guard steps in: H0 - alpha H_t < keep H0."""
        if self.method != "removal":
            return 0
        return int((piece.h0 - alpha * piece.h < self.keep * piece.h0).sum())


def at_least_single(value: Tensor) -> Tensor:
    """float32 where the storage is coarser; float64 stays."""
    return value if value.dtype == torch.float64 else value.float()


def opened(curvature: Curvature | str | os.PathLike[str] | None) -> Curvature:
    """A curvature, loaded where it is a path."""
    assert curvature is not None  # Problem checks the task's
    return curvature if isinstance(curvature, Curvature) else Curvature.load(curvature)


def mean_gradient(curvature: Curvature, name: str) -> Tensor | None:
    """The measured gradient per example, or None."""
    gradient = curvature.gradient(name)
    return None if gradient is None else gradient / curvature.num_examples


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
