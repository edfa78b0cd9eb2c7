"""Removal judged at equal cost: every way to remove on the same base, as toxic text or as facts of invented people (a small TOFU)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record
from experiments.removal.names import GENERATIONS, POINTS
from experiments.removal.tradeoff import Path as Curve
from experiments.removal.tradeoff import area_between
from experiments.studies.unlearning_cells import Cells
from experiments.studies.unlearning_config import Config as Config


def stages(config: Config) -> list[Stage]:
    """What has to run for the records of this config; what they need comes with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record a point (`path`), a way (`way`), a reference, the judge, and a comparison; stages that failed are left out."""
    cells = Cells(config)
    found: list[Record] = []
    if cells.judge and is_done(cells.judge, store):
        found.append(
            {"kind": "judge", **result(cells.judge, store, "judge.json"), **origin(cells.judge, store)}
        )
    for (seed, name), stage in cells.references.items():
        if is_done(stage, store):
            told = _summary(result(stage, store, "known.json"), None)
            found.append({"kind": "reference", "seed": seed, "label": name, **told, **origin(stage, store)})
    for (seed, bad, label), stage in cells.paths.items():
        if is_done(stage, store):
            found += _of_way(cells, store, seed, bad, label, stage)
    for ours, theirs in config.compare:
        found += _compared(cells, store, ours, theirs)
    return [{"model": config.model, **record} for record in found]


def _truth(cells: Cells, store: Path, seed: int) -> dict[str, Any] | None:
    """What the retrained model knows."""
    stage = cells.references.get((seed, "retrained"))
    return result(stage, store, "known.json") if stage and is_done(stage, store) else None


def _summary(point: Mapping[str, Any], truth: Mapping[str, Any] | None) -> dict[str, Any]:
    """Numbers of one model's facts: forget quality against the retrained one, utility of what is kept, and the rest as measured."""
    from experiments.removal.forgetting import forget_quality, utility

    if "forget" not in point:
        return {}
    told: dict[str, Any] = {}
    for group in ("forget", "keep"):
        told |= {
            f"{group} {name}": value for name, value in point[group].items() if not isinstance(value, list)
        }
        told[f"{group} truth ratio"] = float(np.mean(point[group]["truth ratio"]))
    kept = np.maximum(0, 1 - np.asarray(point["keep"]["truth ratio"]))
    told["utility"] = utility(
        {
            "probability": point["keep"]["probability"],
            "truth": float(kept.mean()),
            "extraction": point["keep"]["extraction"],
        }
    )
    if truth:
        ratios = (np.asarray(one["forget"]["truth ratio"]) for one in (point, truth))
        told["forget quality"] = forget_quality(*ratios)
    return told


def _of_way(cells: Cells, store: Path, seed: int, bad: int, label: str, stage: Stage) -> Iterator[Record]:
    own = {"seed": seed, "bad": bad, "label": label}
    card, tables = result(stage, store, "card.json"), _tables(stage, store)
    start = {side: _per_token(tables[f"{side}/0"]) for side in ("keep", "beside", "remove")}
    truth = _truth(cells, store, seed)
    for number, point in enumerate(card["points"]):
        rises = {side: _per_token(tables[f"{side}/{number}"]) - start[side] for side in start}
        budget = 0.0 if not number else sorted(cells.config.budgets)[number - 1]
        plain = {key: value for key, value in point.items() if not isinstance(value, dict)}
        yield {
            "kind": "path", **own, "budget": budget, **plain, **_summary(point, truth),
            "rise": rises, "loss": {side: start[side] + rise for side, rise in rises.items()}, **origin(stage, store),
        }  # fmt: skip
    yield {
        "kind": "way", **own, **{key: card[key] for key in ("way", "options", "tried", "moved", "distance")},
        "after": card.get("after", {}), "generations": str(stage.folder(store) / GENERATIONS), **origin(stage, store),
    }  # fmt: skip


def _tables(stage: Stage, store: Path) -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = np.load(stage.folder(store) / POINTS)
    return loaded


def _per_token(table: Any) -> float:
    return float(table[:, 0].sum() / table[:, 1].sum())


def _lines(stage: Stage, store: Path) -> list[dict[str, Any]]:
    text = (stage.folder(store) / GENERATIONS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _compared(cells: Cells, store: Path, ours: str, theirs: str) -> Iterator[Record]:
    """Area between two ways' curves by each scorer (or of what is left of the removed text), at equal cost of each kind."""
    pairs = [(seed, bad) for seed in cells.config.seeds for bad in range(cells.config.bad)]
    found = {label: [cells.paths[seed, bad, label] for seed, bad in pairs] for label in (ours, theirs)}
    if not all(is_done(stage, store) for own in found.values() for stage in own):
        return
    first = _lines(found[ours][0], store)
    scorers = [name for name in ("words", "judge") if first and name in first[0]]
    for measure in (*scorers, "forgetting"):
        for cost in ("keep", "beside", "both"):
            paths = {
                label: [_curve(stage, store, measure, cost) for stage in own] for label, own in found.items()
            }
            area = vars(area_between(paths, ours, theirs)) | {"pairs": [list(pair) for pair in pairs]}
            yield {"kind": "area", "measure": measure, "cost": cost, "ours": ours, "theirs": theirs, **area}


def _curve(stage: Stage, store: Path, measure: str, cost: str) -> Curve:
    """One path: losses of what must stay (`cost`: of one side, or the larger rise of both), and scores."""
    tables, lines = _tables(stage, store), _lines(stage, store)
    numbers = range(len([name for name in tables if name.startswith("keep/")]))
    sides = ("keep", "beside") if cost == "both" else (cost,)
    losses = [np.stack([tables[f"{side}/{number}"] for number in numbers]) for side in sides]
    if measure == "forgetting":
        removed = [tables[f"remove/{number}"] for number in numbers]
        scores = np.stack([-table[:, 0] / table[:, 1] for table in removed])
    else:
        by = [[line[measure] for line in lines if line["point"] == number] for number in numbers]
        scores = np.asarray(by, dtype=np.float64)
        scores = np.where(np.isfinite(scores), scores, np.nanmean(scores, axis=1, keepdims=True))
    strengths = [0.0, *(float(number) for number in numbers if number)]
    return Curve(np.asarray(strengths), losses[0], scores, losses[1] if len(losses) > 1 else None)


def report(found: list[Record]) -> str:
    """The table at each budget, negation first; what survives; the areas; the judge; where the continuations lie."""
    from experiments.removal.told import told

    return told(found)
