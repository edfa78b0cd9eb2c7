"""Gradient mismatch: how far a merged model is from one where every task's gradient is what it was (Eqs. 6 and 10).

Pure functions on gradients first; `gradient_mismatch` measures the gradients with a module and data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gradmatch.common.layers import group_norms, total_norm
from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from torch import Tensor

Vector = Mapping[str, "Tensor"]


def task_mismatch(at_merged: Tensor, at_task: Tensor) -> Tensor:
    """m_t = grad l_t(theta) - grad l_t(theta_t) (Eq. 6 of Daheim et al. 2024).

    Args:
        at_merged: (*s,), gradient of the summed loss at the merged model, in nats per unit of weight.
        at_task: (*s,), gradient of the same loss at the fine-tuned model.

    Returns:
        (*s,), same units.
    """
    return at_merged - at_task


def total_mismatch(mismatches: Sequence[Tensor], alpha: Sequence[float]) -> Tensor:
    """sum_t alpha_t m_t (Eq. 6, right-hand side up to its sign). T tensors (*s,) -> (*s,)."""
    total = torch.zeros_like(mismatches[0])
    for mismatch, weight in zip(mismatches, alpha, strict=True):
        total.add_(mismatch, alpha=weight)
    return total


def preconditioned_mismatch(total: Tensor, h0: Tensor | float) -> Tensor:
    """H0^-1 sum_t alpha_t m_t (Eq. 10): minus the error of task arithmetic, in units of weight.

    Args:
        total: (*s,), the total mismatch.
        h0: (*s,) diagonal of the base's curvature of the summed loss with its floor added, or a plain number.

    Raises:
        ValueError: h0 is not positive everywhere.
    """
    bad = int((torch.as_tensor(h0) <= 0).sum())
    if bad:
        raise GradmatchError(
            f"the base curvature is zero or negative on {bad} weights; give a delta0 > 0 so that it can be inverted",
            "not_positive",
        )
    return total / h0


@dataclass(frozen=True)
class Mismatch:
    """Norms of the gradient mismatch of one merged model, by tensor.

    Attributes:
        tasks: task -> tensor -> ||m_t||, nats per unit of weight (losses summed over N_t examples).
        total: tensor -> ||sum_t alpha_t m_t||, same units.
        preconditioned: tensor -> ||H0^-1 sum_t alpha_t m_t||, units of weight.
        alpha: task -> weight used.
        num_examples: task -> N_t.
        vectors: tensor -> sum_t alpha_t m_t itself, where it was asked for.
    """

    tasks: dict[str, dict[str, float]]
    total: dict[str, float]
    preconditioned: dict[str, float]
    alpha: dict[str, float]
    num_examples: dict[str, int]
    vectors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def total_norm(self) -> float:
        """||sum_t alpha_t m_t|| over all weights, nats per unit of weight."""
        return total_norm(self.total)

    def preconditioned_norm(self) -> float:
        """||H0^-1 sum_t alpha_t m_t|| over all weights, units of weight."""
        return total_norm(self.preconditioned)

    def task_norms(self) -> dict[str, float]:
        """Task -> ||m_t|| over all weights, nats per unit of weight."""
        return {task: total_norm(norms) for task, norms in self.tasks.items()}

    def per_example(self) -> float:
        """Total norm divided by the number of examples of all tasks: comparable between data sets of other sizes."""
        return self.total_norm() / sum(self.num_examples.values())

    def layers(self) -> dict[str, dict[str, float]]:
        """Task -> layer group -> ||m_t|| in that group; the rows "total" and "preconditioned" stand beside the tasks'."""
        rows = {task: group_norms(norms) for task, norms in self.tasks.items()}
        rows["total"] = group_norms(self.total)
        rows["preconditioned"] = group_norms(self.preconditioned)
        return rows


def mismatch_of(
    at_merged: Mapping[str, Vector],
    at_task: Mapping[str, Vector],
    alpha: Mapping[str, float],
    num_examples: Mapping[str, int],
    *,
    h0: Vector | float = 1.0,
    delta0: float = 0.0,
    keep_vectors: bool = False,
) -> Mismatch:
    """Norms of Eqs. 6 and 10 from gradients of summed losses.

    Args:
        at_merged: task -> tensor -> grad l_t(theta).
        at_task: task -> tensor -> grad l_t(theta_t).
        alpha: task -> weight.
        num_examples: task -> N_t that its loss sums over.
        h0: the base's curvature of the summed loss by tensor, or a number for an isotropic one. Tensors that it lacks
            take `delta0` alone.
        delta0: floor added to h0.
        keep_vectors: keep the total mismatch itself, not its norms only.

    Raises:
        ValueError: no task, gradients of other tensors, or an h0 + delta0 that cannot be inverted (tensor named).
    """
    if not at_merged:
        raise GradmatchError("no task: a mismatch needs at least one", "bad_data")
    per_task: dict[str, dict[str, float]] = {task: {} for task in at_merged}
    total: dict[str, float] = {}
    preconditioned: dict[str, float] = {}
    vectors: dict[str, Tensor] = {}
    names = list(next(iter(at_merged.values())))
    for name in names:
        mismatches = []
        for task, gradient in at_merged.items():
            if name not in gradient or name not in at_task[task]:
                raise GradmatchError(
                    f"task {task!r} has no gradient of {name!r}; measure both with the same module",
                    "bad_data",
                    name,
                )
            mismatches.append(task_mismatch(gradient[name], at_task[task][name].to(gradient[name])))
            per_task[task][name] = float(mismatches[-1].double().norm())
        summed = total_mismatch(mismatches, [alpha[task] for task in at_merged])
        total[name] = float(summed.double().norm())
        block = h0 if isinstance(h0, int | float) else h0[name].to(summed) if name in h0 else 0.0
        try:
            preconditioned[name] = float(preconditioned_mismatch(summed, block + delta0).double().norm())
        except ValueError as error:
            raise GradmatchError(f"{name}: {error}", getattr(error, "code", "bad_data"), name) from error
        if keep_vectors:
            vectors[name] = summed
    return Mismatch(per_task, total, preconditioned, dict(alpha), dict(num_examples), vectors)


def gradient_mismatch(
    merged: Vector,
    tasks: Mapping[str, Vector],
    gradient: Callable[[str, Vector], Vector],
    alpha: Mapping[str, float],
    num_examples: Mapping[str, int],
    *,
    stored: Mapping[str, Vector] | None = None,
    h0: Vector | float = 1.0,
    delta0: float = 0.0,
    keep_vectors: bool = False,
) -> Mismatch:
    """Measure the gradient mismatch of a merged model (Eqs. 6 and 10): one backward pass over each task's data.

    Args:
        merged: theta by name.
        tasks: task -> theta_t by name.
        gradient: (task, weights) -> grad l_t(weights) by name, summed over N_t examples with true labels;
            `Objective.gradient` is one.
        alpha: task -> weight of the merge.
        num_examples: task -> N_t.
        stored: task -> grad l_t(theta_t) by name where it was stored with the curvature; saves that task's second pass.
        h0: the base's curvature of the summed loss by tensor, or a number.
        delta0: floor added to h0.
        keep_vectors: keep the total mismatch itself.

    Raises:
        ValueError: as `mismatch_of`.
    """
    stored = stored or {}
    at_merged = {task: gradient(task, merged) for task in tasks}
    at_task = {task: stored[task] if task in stored else gradient(task, tasks[task]) for task in tasks}
    return mismatch_of(
        at_merged, at_task, alpha, num_examples, h0=h0, delta0=delta0, keep_vectors=keep_vectors
    )
