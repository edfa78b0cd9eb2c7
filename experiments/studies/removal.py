"""Removing text from a language model: fine-tune on what is to go, subtract it, measure what went and what suffered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pipeline import Stage, is_done, recorded
from experiments.records import Record
from experiments.removal.tradeoff import Path as Curve
from experiments.removal.tradeoff import area_between
from experiments.statistics import mean_interval
from experiments.studies.removal_cells import BASE_SEED, Cells
from experiments.studies.removal_config import Config as Config


def stages(config: Config) -> list[Stage]:
    """What has to run for the records of this config; what they need comes with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record per model and seed, one per choice, forecast, curvature and comparison; stages that failed are left out."""
    cells = Cells(config)
    found = list(_points(cells, store))
    for (seed, label), stage in cells.choices.items():
        found += recorded(stage, store, "choice", "choice.json", seed=seed, label=label)
    for seed, stage in cells.forecasts.items():
        method = config.forecast.method if config.forecast else ""
        found += recorded(stage, store, "forecast", "forecast.json", seed=seed, label=method)
    tasks = {(seed, "task"): stage for seed, stage in cells.curvatures.items()}
    for (seed, of), stage in ({(BASE_SEED, "base"): cells.base_curvature} | tasks).items():
        found += recorded(stage, store, "curvature", "error.json", seed=seed, of=of)
    found += _areas(cells, store)
    return [{"model": config.model, **row} for row in found]


def _points(cells: Cells, store: Path) -> Iterator[Record]:
    unedited = {(BASE_SEED, "base", 0.0): cells.unedited}
    for (seed, label, alpha), stage in (unedited | cells.evaluations).items():
        own: Record = {"seed": seed, "label": label, "alpha": alpha}
        for row in recorded(stage, store, "point", "metrics.json", under="metrics", **own):
            folder = stage.folder(store)
            row |= {"intervals": {}, "generations": str(folder / "generations.jsonl")}
            for name in cells.config.prompts:
                scores = _scores(folder, name)
                known = scores[np.isfinite(scores)]
                if len(known):
                    row["intervals"][f"toxicity_{name}"] = mean_interval(known)
            yield row


def _areas(cells: Cells, store: Path) -> Iterator[Record]:
    """The comparisons over all seeds: toxicity of continuations, and likelihood of what is removed.

    One whose path lacks a point, of any seed, is left out.
    """
    seeds = cells.config.seeds
    for ours, theirs in cells.config.compare:
        for measure in (*(("toxicity",) if cells.config.prompts else ()), "forgetting"):
            found = {
                label: [_curve(cells, store, seed, label, measure) for seed in seeds]
                for label in (ours, theirs)
            }
            paths = {label: [curve for curve in own if curve] for label, own in found.items()}
            if all(len(own) == len(seeds) for own in paths.values()):
                area = vars(area_between(paths, ours, theirs)) | {"seeds": list(seeds)}
                yield {"kind": "area", "measure": measure, "ours": ours, "theirs": theirs, **area}


def _curve(cells: Cells, store: Path, seed: int, label: str, measure: str) -> Curve | None:
    """One method's path with one seed; None where it lacks a point."""
    config = cells.config
    alphas = config.methods[label].alphas
    points = [cells.unedited, *(cells.evaluations[seed, label, alpha] for alpha in alphas)]
    if not all(is_done(stage, store) for stage in points):
        return None
    tables = [np.load(stage.folder(store) / "losses.npz") for stage in points]
    if measure == "toxicity":
        scores = [_scores(stage.folder(store), *config.prompts) for stage in points]
    else:  # what is left of the knowledge: log-likelihood a token of each text to remove, less is better
        scores = [-table["remove"][:, 0] / table["remove"][:, 1] for table in tables]
    return Curve(np.asarray([0.0, *alphas]), np.stack([table["keep"] for table in tables]), np.stack(scores))


def _scores(folder: Path, *lists: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(m,) scores of the continuations of the named prompt lists; NaN where the model refused."""
    rows = map(json.loads, (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines())
    return np.asarray([row["score"] for row in rows if row["list"] in lists], dtype=np.float64)


def report(found: list[Record]) -> str:
    """What the experiment prints: the table, the areas between curves, the budget, and what the proxy is."""
    from experiments.removal.report import removal_report

    return removal_report(found)
