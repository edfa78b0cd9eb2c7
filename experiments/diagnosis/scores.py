"""How good forecasts of merges are: rank correlation and error, as they are and calibrated on a few measured losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.statistics import spearman
from gradmatch.measure.forecast import Products, calibrate

Row = Mapping[str, Any]  # merge, task, seen, measured (rises, nats per example), and a forecast of each kind
KINDS = ("exact", "kronecker", "diagonal")
CALIBRATION = ("TA 0", "AM", "TA 1")  # merges whose losses the scales are set on; they are not scored
CHOSEN = ("closed form", "Kronecker", "diagonal")  # weights that a forecast chose: not scored either


def scales(products: Mapping[str, Sequence[Products]], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Kind -> task -> least-squares factor of the measured rises over the forecasts, at the CALIBRATION merges.

    products: kind -> one per task. The rises are those on the forecast's own examples.
    """
    found: dict[str, dict[str, float]] = {}
    for kind, each in products.items():
        found[kind] = {}
        for p in each:
            probes = [
                (np.array(row["coordinates"]), row["seen"] * p.num_examples)
                for row in rows
                if row["task"] == p.task and row["merge"] in CALIBRATION
            ]
            found[kind][p.task] = calibrate(p, probes).scale
    return found


def correlations(
    rows: Sequence[Row], factors: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Where it was measured -> forecast -> Spearman's rank correlation over merges, and the mean absolute error.

    For each task alone, for all (merge, task) pairs together, and for the mean over tasks. "seen" are the examples that the
    products come from: there only the quadratic can be wrong. "measured" are test examples: there the choice of examples
    errs as well, and the row "seen" tells how far a perfect forecast of the seen examples would come.
    """
    scored = [row for row in rows if row["merge"] not in CALIBRATION and not row["merge"].startswith(CHOSEN)]
    forecasts: dict[str, list[float]] = {}
    for kind in KINDS:
        forecasts[kind] = [row[kind] for row in scored]
        forecasts[f"{kind}, calibrated"] = [row[kind] * factors[kind][row["task"]] for row in scored]
    found = {}
    for target in ("seen", "measured"):
        truth = [row[target] for row in scored]
        told = forecasts if target == "seen" else {**forecasts, "seen": [row["seen"] for row in scored]}
        found[target] = {name: _scores(scored, values, truth) for name, values in told.items()}
    return found


def _scores(rows: Sequence[Row], forecast: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    tasks, merges = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "merge"))
    place = {(row["merge"], row["task"]): index for index, row in enumerate(rows)}
    scores = {}
    for task in tasks:
        mine = [place[merge, task] for merge in merges]
        scores[task] = spearman([forecast[i] for i in mine], [truth[i] for i in mine])
    sums = [[sum(values[place[m, t]] for t in tasks) for m in merges] for values in (forecast, truth)]
    errors = [abs(f - t) for f, t in zip(forecast, truth, strict=True)]
    return {
        **scores,
        "all pairs": spearman(forecast, truth),
        "mean of tasks": spearman(*sums),
        "error": float(np.mean(errors)),
    }
