"""The diagnosis as data: a pydantic schema (`gradmatch diagnose --json` writes it, the page draws it)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from gradmatch.diagnosis.evidence import accuracy_of
from gradmatch.measure.health import fisher_noise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradmatch.diagnosis.evidence import Evidence
    from gradmatch.diagnosis.found import Found

SCHEMA_VERSION = 1
SCALES = tuple(index / 10 for index in range(16))  # of the update, for the forecast curves


class Part(BaseModel):
    """A part of the report: no unknown keys; numbers that are not finite are written as strings ("Infinity")."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class CauseReport(Part):
    """One cause, most important first."""

    name: str
    subject: str
    rank: int = Field(
        description="0: values are broken, 1: an input is not what it claims to be, 2: a choice"
    )
    evidence: str
    remedy: str
    cost: float | None = Field(description="nats that the repair saves over all examples; null: not known")
    source: str = Field(description="measured, forecast or empty")
    numbers: dict[str, float]


class TaskReport(Part):
    """One task as it went into the merge."""

    name: str
    weight: float = Field(description="asked for")
    coefficient: float = Field(description="of its task vector in the merge's update, by least squares")
    norm: float = Field(description="length of its task vector")
    curvature: str = Field(description="estimator and examples, or empty")
    noise: float | None = Field(description="relative standard error of the curvature")
    num_examples: int | None = Field(description="N of its summed loss")


class LossReport(Part):
    """One model on one task's data."""

    model: str
    task: str
    nll: float = Field(description="nats per example")
    accuracy: float | None


class ForecastReport(Part):
    """One task's forecast at the merge."""

    task: str
    kind: str = Field(description="ggn (exact products), kronecker or diagonal")
    forecast: float = Field(description="rise of the loss, nats per example")
    measured: float | None = Field(description="the same, measured")
    trusted: bool = Field(description="whether the quadratic can hold that far from the fine-tune")
    scale: float | None = Field(
        description="measured rise / forecast rise, least squares over the path before the merge"
    )
    best_weight: float = Field(description="closed-form weight that minimises the mean of all tasks' losses")
    at_best: float = Field(description="forecast rise at the best weights, nats per example")
    curve: list[tuple[float, float]] = Field(
        description="(scale of the merge's update, forecast rise in nats per example)"
    )
    measured_curve: list[tuple[float, float]] = Field(description="the same, measured")


class MismatchReport(Part):
    """Gradient mismatch at the merge (Eqs. 6 and 10)."""

    total: float = Field(description="norm of sum_t alpha_t m_t, nats per unit of weight")
    per_example: float = Field(description="total divided by the number of examples of all tasks")
    preconditioned: float = Field(description="norm of H0^-1 sum_t alpha_t m_t, units of weight")
    tasks: dict[str, float]
    layers: dict[str, dict[str, float]] = Field(
        description="task (or total, preconditioned) -> layer group -> norm"
    )


class LayerReport(Part):
    """Task vectors in one layer group; lists in the order of the tasks."""

    layer: str
    weights: int
    norms: list[float]
    shares: list[float] = Field(description="of each task vector's squared length")
    ranks: list[float] = Field(description="mean effective rank of its matrices")


class Report(Part):
    """Everything that a diagnosis found."""

    schema_version: int = SCHEMA_VERSION
    gradmatch_version: str
    method: str
    healthy: bool
    verdict: str = Field(description="one sentence: that nothing was found, and in what")
    looked_at: list[str]
    not_looked_at: list[str]
    causes: list[CauseReport]
    notes: list[str]
    tasks: list[TaskReport]
    residual: float | None = Field(
        description="share of the merge's update outside the span of the task vectors"
    )
    losses: list[LossReport]
    forecasts: list[ForecastReport]
    mismatch: MismatchReport | None
    layers: list[LayerReport]
    cosines: list[list[float]]
    conflicts: list[list[float]] = Field(
        description="share of weights that both tasks moved in opposite directions"
    )
    weighted_conflicts: dict[str, float] = Field(
        description="'a | b' -> the same, each weight counted by the sum of both tasks' curvatures"
    )
    overlaps: dict[str, float] = Field(description="'a | b' -> overlap of their curvatures")
    path: list[tuple[float, dict[str, float]]] = Field(
        description="(share of the way, task -> nats per example)"
    )
    barriers: dict[str, float] = Field(description="'a | b' -> height of the loss half-way, nats per example")
    redundancy: dict[str, list[tuple[float, float, float]]] = Field(
        description="task -> (share dropped, loss as it is, loss rescaled), nats per example"
    )
    batchnorm: dict[str, float] = Field(description="layer -> shift of its inputs in standard deviations")


def report_of(diagnosis: Found) -> Report:
    """Bring a diagnosis into the schema."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("gradmatch")
    except PackageNotFoundError:  # run from a checkout that is not installed
        release = ""
    evidence = diagnosis.evidence
    scan = evidence.scan
    residual = None if evidence.merged is None or not scan.tensors else scan.projection()[1]
    seen, unseen = looked(evidence)
    return Report(
        gradmatch_version=release,
        method=evidence.method,
        healthy=diagnosis.healthy,
        verdict=verdict(diagnosis),
        looked_at=seen,
        not_looked_at=unseen,
        causes=[CauseReport(**vars(cause)) for cause in diagnosis.causes],
        notes=evidence.notes,
        tasks=_tasks(evidence),
        residual=residual,
        losses=[
            LossReport(
                model=model, task=task, nll=float(losses.mean()), accuracy=_accuracy(evidence, model, task)
            )
            for model, by_task in evidence.losses.items()
            for task, losses in by_task.items()
        ],
        forecasts=_forecasts(evidence),
        mismatch=_mismatch(evidence),
        layers=_layers(evidence),
        cosines=scan.cosines().tolist(),
        conflicts=scan.conflict_rates().tolist(),
        weighted_conflicts={" | ".join(pair): rate for pair, rate in diagnosis.weighted_conflicts.items()},
        overlaps={" | ".join(pair): value for pair, value in diagnosis.overlaps.items()},
        path=sorted(evidence.path.items()),
        barriers={" | ".join(pair): value for pair, value in diagnosis.barriers.items()},
        redundancy={
            task: [(p.dropped, p.plain, p.rescaled) for p in curve]
            for task, curve in diagnosis.redundancy.items()
        },
        batchnorm=evidence.batchnorm,
    )


def verdict(diagnosis: Found) -> str:
    """The finding in a sentence; where nothing was found, it says in what."""
    evidence = diagnosis.evidence
    if diagnosis.causes:
        first, count = diagnosis.causes[0], len(diagnosis.causes)
        what = f"{first.name.replace('_', ' ')} ({first.subject})"
        return f"One cause found: {what}." if count == 1 else f"{count} causes found. The first is {what}."
    known = [task for task in evidence.tasks if task in evidence.losses.get("merged", {})]
    if not known:
        return "Nothing wrong was found in the weights; what the merge does to the losses was not looked at."
    if len(known) < len(evidence.tasks):
        return f"Nothing wrong was found with this merge, as far as the losses of {_listed(known)} tell."
    return "Nothing wrong was found with this merge."


def looked(evidence: Evidence) -> tuple[list[str], list[str]]:
    """What the causes were looked for in, and what they were not."""
    count = len(evidence.tasks)
    models = ["the base", "1 task" if count == 1 else f"{count} tasks"]
    seen, unseen = [], []
    if evidence.merged is None:
        unseen.append("the merge")
    else:
        models.append("the merge")
    seen.append(f"the weights of {', '.join(models[:-1])} and {models[-1]}")
    held = list(evidence.curvatures)
    if evidence.base_curvature is not None and not isinstance(evidence.base_curvature, int | float):
        held.insert(0, "the base")
    if held:
        seen.append(f"the curvature of {_listed(held)}")
    else:
        unseen.append("curvature (none given)")
    known = [task for task in evidence.tasks if task in evidence.losses.get("merged", {})]
    if known:
        seen.append(f"the losses of {_listed(known)}")
    for why, chosen in (
        ("no data", [task for task in evidence.tasks if task not in evidence.objectives]),
        ("they cannot be measured", [task for task in evidence.objectives if task not in known]),
    ):
        if chosen:
            unseen.append(f"the losses of {_listed(chosen)} ({why}), and with them what anything costs")
    return seen, unseen


def _listed(names: Sequence[str], most: int = 6) -> str:
    """Names with commas, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _tasks(evidence: Evidence) -> list[TaskReport]:
    norms, used = evidence.scan.norms(), evidence.coefficients()
    rows = []
    for task in evidence.tasks:
        curvature = evidence.curvatures.get(task)
        objective = evidence.objectives.get(task)
        text = ""
        if curvature is not None:
            text = (
                f"{curvature.info.get('estimator', '?')}, {curvature.info.get('examples_seen', '?')} examples"
            )
        rows.append(
            TaskReport(
                name=task,
                weight=evidence.alpha[task],
                coefficient=used[task],
                norm=norms[task],
                curvature=text,
                noise=None if curvature is None else fisher_noise(curvature),
                num_examples=objective.num_examples
                if objective
                else curvature.num_examples
                if curvature
                else None,
            )
        )
    return rows


def _accuracy(evidence: Evidence, model: str, task: str) -> float | None:
    confusion = evidence.confusions.get(model, {}).get(task)
    return None if confusion is None else accuracy_of(confusion)


def _forecasts(evidence: Evidence) -> list[ForecastReport]:
    """Forecasts at the merge (its least-squares coordinates) and along the line from the base through it."""
    import numpy as np

    from gradmatch.measure.forecast import best_coefficients, calibrate

    products = [p for p in evidence.products if p.task in evidence.tasks]
    if not products or set(products[0].directions) != set(evidence.tasks):
        return []
    used = evidence.coefficients()
    at = np.array([used[task] for task in products[0].directions])
    best = best_coefficients(products)
    rows = []
    for p in products:
        n = p.num_examples
        measured = None
        curve, probes = [], []
        if evidence.measured and p.task in evidence.losses["merged"]:
            measured = evidence.rise(evidence.losses["merged"], p.task)
            own = float(evidence.losses[p.task][p.task].mean())
            curve = [(share, losses[p.task] - own) for share, losses in sorted(evidence.path.items())]
            probes = [(share * at, rise * n) for share, rise in curve if share < 1]
        rows.append(
            ForecastReport(
                task=p.task,
                kind=p.kind,
                forecast=p.rise(at) / n,
                measured=measured,
                trusted=p.trusted(at),
                scale=calibrate(p, probes).scale if probes else None,
                best_weight=best.coefficients[p.task],
                at_best=best.rises[p.task] / n,
                curve=[(scale, p.rise(scale * at) / n) for scale in SCALES],
                measured_curve=curve,
            )
        )
    return rows


def _mismatch(evidence: Evidence) -> MismatchReport | None:
    found = evidence.mismatch
    if found is None:
        return None
    return MismatchReport(
        total=found.total_norm(),
        per_example=found.per_example(),
        preconditioned=found.preconditioned_norm(),
        tasks=found.task_norms(),
        layers=found.layers(),
    )


def _layers(evidence: Evidence) -> list[LayerReport]:
    scan = evidence.scan
    totals = scan.gram().diagonal().clamp(min=1e-300)
    rows = []
    for group, names in scan.groups().items():
        squares = scan.gram(names).diagonal()
        matrices = [scan.tensors[name].rank for name in names if any(scan.tensors[name].rank)]
        ranks = [sum(column) / len(matrices) for column in zip(*matrices, strict=True)] if matrices else []
        rows.append(
            LayerReport(
                layer=group,
                weights=sum(scan.tensors[name].numel for name in names),
                norms=[math.sqrt(max(0.0, value)) for value in squares.tolist()],
                shares=(squares / totals).tolist(),
                ranks=ranks,
            )
        )
    return rows


def schema() -> dict[str, Any]:
    """JSON Schema of the report."""
    return Report.model_json_schema()
