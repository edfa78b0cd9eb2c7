"""Repairs: the merge as it would be without a fault. Costs are what they save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from gradmatch.diagnosis.evidence import Evidence, Saving


def saving_of(
    evidence: Evidence, repair: Callable[..., Mapping[str, Tensor]], *arguments: Any
) -> Saving | None:
    """What a repair saves of the kept tasks' losses and of the base's on data of its own, where losses can be measured."""
    base = [] if evidence.base_objective is None else ["base"]
    return (
        evidence.saving(repair(evidence, *arguments), [*evidence.kept, *base]) if evidence.measured else None
    )


def saving_of_others(evidence: Evidence, task: str) -> Saving | None:
    """What the other tasks save without this one; its own data carries other labels and does not count."""
    others = [other for other in evidence.objectives if other != task]
    return evidence.saving(without(evidence, task), others) if evidence.measured else None


def with_floor(evidence: Evidence, delta0: float) -> dict[str, Tensor]:
    """The merge by Eq. 12 with another floor; only where there is a base's curvature."""
    from gradmatch.measure.products import preconditioned_vectors, task_vector

    assert evidence.base_curvature is not None
    taus = {task: task_vector(evidence.base, model) for task, model in evidence.tasks.items()}
    terms = preconditioned_vectors(
        taus, evidence.curvatures, evidence.base_curvature, evidence.alpha,
        base_weight=evidence.base_weight, delta0=delta0,
    )  # fmt: skip
    repaired: dict[str, Tensor] = dict(evidence.merged or {})
    for name in evidence.scan.tensors:
        update = sum(evidence.alpha[task] * terms[task][name] for task in evidence.tasks)
        repaired[name] = evidence.base[name].float() + update
    return repaired


def without(evidence: Evidence, task: str, names: list[str] | None = None) -> dict[str, Tensor]:
    """The merge without a task's share: theta - c_t tau_t, in all tensors or some."""
    c = evidence.coefficients()[task]
    removed = evidence.with_changes({task: -c})
    if names is None:
        return removed
    assert evidence.merged is not None
    return {name: removed[name] if name in names else evidence.merged[name] for name in evidence.merged}


def restored(evidence: Evidence, model: str, names: list[str]) -> dict[str, Tensor]:
    """The merge with some tensors of a model ("merged", or a task) as the base's: without that task's share, or the base's own."""
    if model != "merged":
        return without(evidence, model, [name for name in names if name in evidence.scan.tensors])
    assert evidence.merged is not None
    return {name: evidence.base[name] if name in names else evidence.merged[name] for name in evidence.merged}


def replaced(evidence: Evidence, task: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The merge with some tensors of a task replaced: theta + c_t (theta'_t - theta_t)."""
    assert evidence.merged is not None
    c = evidence.coefficients()[task]
    changed = {
        name: evidence.merged[name].float() + c * (value.float() - evidence.tasks[task][name].float())
        for name, value in tensors.items()
        if name in evidence.merged
    }
    return {**evidence.merged, **changed}


def scaled_back(evidence: Evidence, task: str, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """The merge with some tensors of a task divided by a number each."""
    return replaced(evidence, task, {n: evidence.tasks[task][n].float() / c for n, c in factors.items()})


def turned_back(evidence: Evidence, task: str, names: list[str]) -> dict[str, Tensor]:
    """The merge with some matrices of a task transposed."""
    return replaced(evidence, task, {n: evidence.tasks[task][n].transpose(0, 1) for n in names})


def rolled(evidence: Evidence, task: str, name: str, offset: int) -> dict[str, Tensor]:
    """The merge with a task's rows of one tensor put back by `offset`."""
    return replaced(evidence, task, {name: evidence.tasks[task][name].roll(offset, 0)})


def averaged(evidence: Evidence) -> dict[str, Tensor]:
    """Plain averaging: what needs no curvature."""
    return evidence.at_coefficients(dict.fromkeys(evidence.tasks, 1 / len(evidence.tasks)))


def exact(evidence: Evidence) -> dict[str, Tensor]:
    """theta0 + sum_t alpha_t tau_t in float32: what was asked for, unrounded."""
    return evidence.at_coefficients(evidence.alpha)


def planned_update(evidence: Evidence) -> float:
    """||sum_t alpha_t tau_t||^2: the update that the weights ask for."""
    alpha = torch.tensor([evidence.alpha[task] for task in evidence.scan.tasks], dtype=torch.float64)
    return float(alpha @ evidence.scan.gram() @ alpha)
