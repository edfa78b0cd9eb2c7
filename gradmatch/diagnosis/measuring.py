"""Everything about a merge that needs data: losses, products, mismatch, paths, redundancy, barriers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from gradmatch.estimators.curvature import Curvature
from gradmatch.measure import health
from gradmatch.measure.barrier import POINTS, barrier_height
from gradmatch.measure.mismatch import gradient_mismatch
from gradmatch.measure.products import measure_products, stored_gradient, task_vector
from gradmatch.measure.redundancy import redundancy_curve
from gradmatch.measure.seats import Seats
from gradmatch.models.batchnorm import BATCH_NORMS, batchnorm_statistics
from gradmatch.models.curvatures import Prior

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.diagnosis.evidence import Evidence
    from gradmatch.measure.objective import Objective

DROPS = (0.0, 0.5, 0.9, 0.99)
FEW = 64  # examples of each task for redundancy curves: their shape is what is looked at


def passes(tasks: int, forecast: bool, mismatch: bool, thorough: bool) -> int:
    """Forward passes over all data that `measure` takes, counted so: a backward pass is two, a forward-mode derivative three.

    What repairs save is measured beside these, one pass for each cause that is suspected.
    """
    return (
        tasks + 2  # every model
        + (3 * tasks + 4 if forecast else 0)
        + (3 if forecast else 6) * mismatch
        + (len(POINTS) - 2 + 2 * len(DROPS) + tasks - 1 if thorough else 1)
    )  # fmt: skip


def measure(
    evidence: Evidence, forecast: bool, mismatch: bool, thorough: bool, tick: Callable[[int], object] = int
) -> None:
    """Losses, mismatch, products, paths: everything that needs data. `tick` is told of passes done, as `passes` counts them."""
    broken = {model for model, found in evidence.scan.nonfinite.items() if found}
    broken |= {model for model, shapes in evidence.scan.shapes.items() if shapes}
    losses = dict(evidence.objectives)
    if evidence.base_objective is not None:
        losses["base"] = evidence.base_objective
    module = next(iter(losses.values())).module
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
        for task, objective in losses.items():
            evidence.losses[model][task], confusion = objective.evaluate(weights)
            if confusion is not None:
                evidence.confusions.setdefault(model, {})[task] = confusion
        tick(1)
    evidence.uniform = {task: objective.uniform_loss() for task, objective in losses.items()}
    counts = {task: objective.predictions() for task, objective in losses.items()}
    evidence.predictions = {task: found for task, found in counts.items() if found is not None}
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
        tick(3 * len(evidence.tasks) + 4)
    if not evidence.measured or evidence.merged is None:
        return
    if overflowing:
        evidence.notes.append("the merge's outputs are not finite: no mismatch was measured")
    elif complete and mismatch:
        measure_mismatch(evidence)
        tick(3 if forecast else 6)
    _measure_batchnorm(evidence)
    for share in POINTS[1:-1] if thorough else (0.5,):
        at = evidence.measure(evidence.along_path(share))
        evidence.path[share] = {task: float(values.mean()) for task, values in at.items()}
        tick(1)
    for share, model in ((0.0, "base"), (1.0, "merged")):
        evidence.path[share] = {t: float(evidence.losses[model][t].mean()) for t in evidence.objectives}
    if thorough:
        _measure_redundancy(evidence)
        tick(2 * len(DROPS))
        _measure_barriers(evidence)
        tick(len(evidence.tasks) - 1)


def _finite(losses: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(values).all()) for values in losses.values())


def measure_mismatch(evidence: Evidence) -> None:
    """Gradient mismatch at the merge, with the base's curvature as preconditioner where there is one."""
    base = evidence.base_curvature
    prior = Prior.of(1.0) if base is None else Prior.of(base, evidence.base_weight)
    h0 = {name: prior.at(base.mean(name)) for name in base} if isinstance(base, Curvature) else prior.number
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
        delta0=0.0 if base is None else max(evidence.delta0, 1e-12),
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
    if not evidence.objectives:
        return
    module = next(iter(evidence.objectives.values())).module
    if not any(isinstance(layer, BATCH_NORMS) for layer in module.modules()):
        return
    runs = [(batch.args, batch.kwargs) for o in evidence.objectives.values() for batch in o.batches]
    evidence.batchnorm_repair = batchnorm_statistics(module, Seats(module).placed(evidence.merged), runs)
    evidence.batchnorm = health.batchnorm_shift(evidence.merged, evidence.batchnorm_repair)


def _measure_redundancy(evidence: Evidence) -> None:
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

        evidence.redundancy[task] = redundancy_curve(evidence.base, tau, score, DROPS)


def _measure_barriers(evidence: Evidence) -> None:
    """Half-way between each two fine-tunes, the mean loss of both tasks against the mean of the ends."""
    for a, b in combinations(evidence.objectives, 2):
        middle = evidence.pair_losses(a, b, 0.5, 0.5)
        ends = [sum(float(evidence.losses[m][t].mean()) for t in (a, b)) / 2 for m in (a, b)]
        half = sum(float(losses.mean()) for losses in middle.values()) / 2
        evidence.barriers[a, b] = barrier_height([(0.0, ends[0]), (0.5, half), (1.0, ends[1])])
