"""The diagnosis as plain values, ready for JSON: `gradmatch diagnose --json` writes them, the page and the terminal show them.

Losses are nats per example, with the ends of 95 % intervals; where an example has several predictions (a language model's tokens),
also per prediction and as perplexity. `cost` is nats that a repair saves over all tasks' N examples. Numbers that are not finite
are the strings "Infinity", "-Infinity" and "NaN". Pairs of tasks are keys "a | b".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from gradmatch.diagnosis.causes_losses import doubts
from gradmatch.diagnosis.causes_sizes import best_weights
from gradmatch.diagnosis.evidence import accuracy_of
from gradmatch.measure.forecast import calibrate
from gradmatch.measure.health import fisher_noise
from gradmatch.measure.intervals import mean_interval

if TYPE_CHECKING:
    from gradmatch.diagnosis.cause import Cause
    from gradmatch.diagnosis.evidence import Evidence

SCHEMA_VERSION = 1  # keys may be added under it; none changes its meaning
SCALES = tuple(index / 10 for index in range(16))  # of the update, for the forecast curves


def report_of(causes: Sequence[Cause], evidence: Evidence) -> dict[str, Any]:
    """Everything that a diagnosis found.

    Keys: schema_version, gradmatch_version, method, healthy, verdict, looked_at, not_looked_at, causes (most important first; rank 0:
    values are broken, 1: an input is not what it claims to be, 2: a choice, 3: what the merge does), notes, tasks, residual (share
    of the merge's update outside the span of the task vectors), losses, forecasts, mismatch (Eqs. 6 and 10), layers, cosines,
    conflicts (share of weights that two tasks moved in opposite directions), weighted_conflicts (the same by curvature), overlaps
    (of curvatures), path ((share of the way from the base, task -> loss)), barriers, redundancy (task -> (share dropped, loss, loss
    rescaled)), batchnorm (layer -> shift in standard deviations).
    """
    try:
        release = version("gradmatch")
    except PackageNotFoundError:  # run from a checkout that is not installed
        release = ""
    scan = evidence.scan
    seen, unseen = looked(evidence)
    content = {
        "schema_version": SCHEMA_VERSION,
        "gradmatch_version": release,
        "method": evidence.method,
        "healthy": not causes,
        "verdict": verdict(causes, evidence),
        "looked_at": seen,
        "not_looked_at": unseen,
        "causes": [vars(cause) for cause in causes],
        "notes": evidence.notes,
        "tasks": _tasks(evidence),
        "residual": None if evidence.merged is None or not scan.tensors else scan.projection()[1],
        "losses": _losses(evidence),
        "forecasts": _forecasts(evidence),
        "mismatch": _mismatch(evidence),
        "layers": _layers(evidence),
        "cosines": scan.cosines().tolist(),
        "conflicts": scan.conflict_rates().tolist(),
        "weighted_conflicts": _pairs(evidence.weighted_conflicts),
        "overlaps": _pairs(evidence.overlaps),
        "path": sorted(evidence.path.items()),
        "barriers": _pairs(evidence.barriers),
        "redundancy": {
            task: [(p.dropped, p.plain, p.rescaled) for p in curve]
            for task, curve in evidence.redundancy.items()
        },
        "batchnorm": evidence.batchnorm,
    }
    plain: dict[str, Any] = _plain(content)
    return plain


def verdict(causes: Sequence[Cause], evidence: Evidence) -> str:
    """The finding in a sentence; where nothing was found, it says in what, and what still gives pause."""
    if causes:
        first, count = causes[0], len(causes)
        what = f"{first.name.replace('_', ' ')} ({first.subject})"
        return f"One cause found: {what}." if count == 1 else f"{count} causes found. The first is {what}."
    known = [task for task in evidence.tasks if task in evidence.losses.get("merged", {})]
    if not known:
        return "Nothing wrong was found in the weights; what the merge does to the losses was not looked at."
    pause = doubts(evidence)
    if pause:
        return f"No cause was found, but {'; '.join(pause)}."
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
    if "base" in evidence.losses.get("merged", {}):
        seen.append("the base's loss on data of its own")
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


def _tasks(evidence: Evidence) -> list[dict[str, Any]]:
    """Each task as it went into the merge: weight asked for, coefficient of its task vector by least squares, norm, curvature, N."""
    norms, used = evidence.scan.norms(), evidence.coefficients()
    rows = []
    for task in evidence.tasks:
        curvature, objective = evidence.curvatures.get(task), evidence.objectives.get(task)
        known = objective or curvature
        info = curvature.info if curvature is not None else {}
        rows.append(
            {
                "name": task,
                "weight": evidence.alpha[task],
                "coefficient": used[task],
                "norm": norms[task],
                "curvature": f"{info.get('estimator', '?')}, {info.get('examples_seen', '?')} examples"
                if info
                else "",
                "noise": None if curvature is None else fisher_noise(curvature),
                "num_examples": known.num_examples if known else None,
            }
        )
    return rows


def _losses(evidence: Evidence) -> list[dict[str, Any]]:
    """One row a model ("base", a task, "merged") and task (or "base": its own data)."""
    rows = []
    for model, by_task in evidence.losses.items():
        for task, losses in by_task.items():
            nll, *ends = mean_interval(losses)
            counts = evidence.predictions.get(task)
            per = None if counts is None else mean_interval(losses, counts)
            confusion = evidence.confusions.get(model, {}).get(task)
            rows.append(
                {
                    "model": model,
                    "task": task,
                    "nll": nll,
                    "interval": ends,
                    "accuracy": None if confusion is None else accuracy_of(confusion),
                    "per_prediction": per,
                    "perplexity": None if per is None else [math.exp(min(value, 700.0)) for value in per],
                    "predictions": 1.0 if counts is None else float(counts.mean()),
                    "examples": len(losses),
                }
            )
    return rows


def _forecasts(evidence: Evidence) -> list[dict[str, Any]]:
    """Forecasts at the merge (its least-squares coordinates) and along the line from the base through it, nats per example.

    kind: ggn (exact products), kronecker or diagonal; trusted: whether the quadratic can hold that far from the fine-tune; scale:
    measured rise / forecast rise, least squares over the path before the merge.
    """
    import numpy as np

    products = [p for p in evidence.products if p.task in evidence.tasks]
    if not products or set(products[0].directions) != set(evidence.tasks):
        return []
    used = evidence.coefficients()
    at = np.array([used[task] for task in products[0].directions])
    best = best_weights(evidence)
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
            {
                "task": p.task,
                "kind": p.kind,
                "forecast": p.rise(at) / n,
                "measured": measured,
                "trusted": p.trusted(at),
                "scale": calibrate(p, probes).scale if probes else None,
                "best_weight": best.coefficients[p.task],
                "at_best": best.rises[p.task] / n,
                "curve": [(scale, p.rise(scale * at) / n) for scale in SCALES],
                "measured_curve": curve,
            }
        )
    return rows


def _mismatch(evidence: Evidence) -> dict[str, Any] | None:
    """Norms of Eqs. 6 and 10: total in nats per unit of weight, preconditioned in units of weight, by task and by layer group."""
    found = evidence.mismatch
    if found is None:
        return None
    return {
        "total": found.total_norm(),
        "per_example": found.per_example(),
        "preconditioned": found.preconditioned_norm(),
        "tasks": found.task_norms(),
        "layers": found.layers(),
    }


def _layers(evidence: Evidence) -> list[dict[str, Any]]:
    """Task vectors by layer group, in the order of the tasks: norms, shares of their squared length, mean effective rank."""
    scan = evidence.scan
    totals = scan.gram().diagonal().clamp(min=1e-300)
    rows = []
    for group, names in scan.groups().items():
        squares = scan.gram(names).diagonal()
        matrices = [scan.tensors[name].rank for name in names if any(scan.tensors[name].rank)]
        rows.append(
            {
                "layer": group,
                "weights": sum(scan.tensors[name].numel for name in names),
                "norms": [math.sqrt(max(0.0, value)) for value in squares.tolist()],
                "shares": (squares / totals).tolist(),
                "ranks": [sum(column) / len(matrices) for column in zip(*matrices, strict=True)],
            }
        )
    return rows


def _pairs(values: Mapping[tuple[str, str], float]) -> dict[str, float]:
    return {" | ".join(pair): value for pair, value in values.items()}


def _plain(value: Any) -> Any:
    """Tuples as lists, and numbers that JSON has no spelling for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
