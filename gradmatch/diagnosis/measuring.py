"""Everything about a merge that needs data: losses, products, mismatch, paths, redundancy, barriers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from gradmatch.measure import health
from gradmatch.measure.barrier import POINTS, barrier_height
from gradmatch.measure.mismatch import gradient_mismatch
from gradmatch.measure.products import measure_products, stored_gradient, task_vector
from gradmatch.measure.redundancy import redundancy_curve

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.diagnosis.evidence import Evidence
    from gradmatch.diagnosis.found import Found
    from gradmatch.measure.objective import Objective

DROPS = (0.0, 0.5, 0.9, 0.99)
FEW = 64  # examples of each task for redundancy curves: their shape is what is looked at


def worse_than_base(evidence: Evidence) -> list[str]:
    """Tasks whose loss at the merge is above the base's by more than two standard errors of the difference."""
    found = []
    for task, merged in evidence.losses.get("merged", {}).items():
        difference = merged - evidence.losses["base"][task]
        error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        if float(difference.mean()) > 2 * error:
            found.append(
                f"{task!r} is worse off than at the base: {float(merged.mean()):.3f} against "
                f"{float(evidence.losses['base'][task].mean()):.3f} nats per example"
            )
    return found


def measure(result: Found, forecast: bool, mismatch: bool, thorough: bool) -> None:
    """Losses, mismatch, products, paths: everything that needs data."""
    evidence = result.evidence
    broken = {model for model, found in evidence.scan.nonfinite.items() if found}
    broken |= {model for model, shapes in evidence.scan.shapes.items() if shapes}
    module = next(iter(evidence.objectives.values())).module
    needed = {name for name, _ in module.named_parameters() if name in evidence.base}
    broken |= {model for model, missing in evidence.scan.missing.items() if needed & set(missing)}
    if "base" in broken or broken & set(evidence.tasks):
        evidence.notes.append(f"losses were not measured: {', '.join(sorted(broken))} cannot be run")
        return
    models: dict[str, Mapping[str, Tensor]] = {"base": evidence.base, **evidence.tasks}
    if evidence.merged is not None and "merged" not in broken:
        models["merged"] = evidence.merged
    for model, weights in models.items():
        evidence.losses[model] = {}
        for task, objective in evidence.objectives.items():
            evidence.losses[model][task], confusion = objective.evaluate(weights)
            if confusion is not None:
                evidence.confusions.setdefault(model, {})[task] = confusion
    evidence.uniform = {task: objective.uniform_loss() for task, objective in evidence.objectives.items()}
    overflowing = [model for model, found in evidence.losses.items() if not _finite(found)]
    if set(overflowing) - {"merged"}:
        evidence.notes.append(f"outputs of {', '.join(overflowing)} are not finite: nothing was forecast")
        return
    complete = set(evidence.objectives) == set(evidence.tasks)
    if forecast and complete and not evidence.products:
        directions = {task: task_vector(evidence.base, model) for task, model in evidence.tasks.items()}
        evidence.products = [
            measure_products(
                task,
                objective,
                evidence.tasks[task],
                directions,
                {task: 1.0},
                gradient=_gradient_of(evidence, task),
            )
            for task, objective in evidence.objectives.items()
        ]
    if not evidence.measured or evidence.merged is None:
        return
    if overflowing:
        evidence.notes.append("the merge's outputs are not finite: no mismatch was measured")
    elif complete and mismatch:
        measure_mismatch(evidence)
    _measure_batchnorm(evidence)
    for share in POINTS[1:-1] if thorough else (0.5,):
        at = evidence.measure(evidence.along_path(share))
        evidence.path[share] = {task: float(losses.mean()) for task, losses in at.items()}
    for share, model in ((0.0, "base"), (1.0, "merged")):
        evidence.path[share] = {t: float(losses.mean()) for t, losses in evidence.losses[model].items()}
    if thorough:
        _measure_redundancy(result)
        _measure_barriers(result)


def _finite(losses: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(values).all()) for values in losses.values())


def measure_mismatch(evidence: Evidence) -> None:
    """Gradient mismatch at the merge, with the base's curvature as preconditioner where there is one."""
    h0: dict[str, Tensor] | float = 1.0
    delta0 = 0.0
    base = evidence.base_curvature
    if isinstance(base, int | float):
        h0 = float(base) * evidence.base_weight
    elif base is not None:
        h0 = {name: base.total(name) * evidence.base_weight for name in base}
    if base is not None:
        delta0 = max(evidence.delta0, 1e-12)
    stored = {task: _gradient_of(evidence, task) for task in evidence.objectives}
    assert evidence.merged is not None
    evidence.mismatch = gradient_mismatch(
        evidence.merged,
        evidence.tasks,
        lambda task, weights: evidence.objectives[task].gradient(weights),
        evidence.alpha,
        {task: objective.num_examples for task, objective in evidence.objectives.items()},
        stored=stored,
        h0=h0,
        delta0=delta0,
    )


def _gradient_of(evidence: Evidence, task: str) -> dict[str, Tensor]:
    """The gradient at a fine-tune, measured once.

    The stored one of its curvature, where that is its own and covers every parameter of the module, saves the pass.
    """
    if task not in evidence.gradients:
        objective, curvature = evidence.objectives[task], evidence.curvatures.get(task)
        if curvature is not None and curvature.has_gradient and evidence.fingerprints.get(task, task) == task:
            gradient = stored_gradient(curvature)
            if {name for name, _ in objective.module.named_parameters()} <= set(gradient):
                evidence.gradients[task] = gradient
        if task not in evidence.gradients:
            evidence.gradients[task] = objective.gradient(evidence.tasks[task])
    return evidence.gradients[task]


def _measure_batchnorm(evidence: Evidence) -> None:
    """Statistics of the merge's activations over all tasks' data, and how far the stored ones are off."""
    assert evidence.merged is not None
    module = next(iter(evidence.objectives.values())).module
    if not any(isinstance(layer, health.BATCH_NORMS) for layer in module.modules()):
        return
    runs = [(batch.args, batch.kwargs) for o in evidence.objectives.values() for batch in o.batches]
    evidence.batchnorm_repair = health.batchnorm_statistics(module, evidence.merged, runs)
    evidence.batchnorm = health.batchnorm_shift(evidence.merged, evidence.batchnorm_repair)


def _measure_redundancy(result: Found) -> None:
    evidence = result.evidence
    if any(whole.first(FEW).seen < whole.seen for whole in evidence.objectives.values()):
        evidence.notes.append(f"redundancy curves: on the first {FEW} or so examples of each task")
    for task, whole in evidence.objectives.items():
        objective = whole.first(FEW)
        tau = {
            name: value
            for name, value in task_vector(evidence.base, evidence.tasks[task]).items()
            if name in evidence.scan.tensors
        }

        def score(weights: Mapping[str, Tensor], o: Objective = objective, t: str = task) -> float:
            return float(o.losses({**evidence.tasks[t], **weights}).mean())

        result.redundancy[task] = redundancy_curve(evidence.base, tau, score, DROPS)


def _measure_barriers(result: Found) -> None:
    """Half-way between each two fine-tunes, the mean loss of both tasks against the mean of the ends."""
    evidence = result.evidence
    for a, b in combinations(evidence.objectives, 2):
        middle = evidence.pair_losses(a, b, 0.5, 0.5)
        ends = [sum(float(evidence.losses[m][t].mean()) for t in (a, b)) / 2 for m in (a, b)]
        half = sum(float(losses.mean()) for losses in middle.values()) / 2
        result.barriers[a, b] = barrier_height([(0.0, ends[0]), (0.5, half), (1.0, ends[1])])
