"""Stages: the families of a made zoo, and what each way to choose among its models comes to, for how many evaluations."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate import Metrics, scorer
from experiments.files import write_json
from experiments.rows import Views
from gradmatch.models.opening import open_checkpoint
from gradmatch.zoo.evolving import evolve
from gradmatch.zoo.families import cluster
from gradmatch.zoo.planfile import Planned
from gradmatch.zoo.planning import plan, run
from gradmatch.zoo.selecting import select


def families(out: Path, *, base: Path, models: Mapping[str, Path], threshold: float) -> None:
    """`out/families.json`: the families by weights, why the others are apart, and the seconds it took."""
    started = time.perf_counter()
    found = cluster(
        {name: str(folder / "model") for name, folder in models.items()}, threshold, base=str(base / "model")
    )
    told = {"families": [list(family) for family in found.families], "seconds": time.perf_counter() - started}
    told["apart"] = {name: one.kind for one in found.apart for name in one.members}
    write_json(out / "families.json", told)


class Macro:
    """Mean accuracy over the domains on one split, and how often it was asked for."""

    label = "macro accuracy"

    def __init__(self, base: Path, data: Views, domains: Sequence[str], split: str) -> None:
        self.metrics = scorer(base, data, list(domains), split)
        self.count = 0

    def __call__(self, weights: Any) -> float:
        """One evaluation."""
        self.count += 1
        return self.of(weights)["macro"]["accuracy"]

    def of(self, weights: Any) -> Metrics:
        """All metrics."""
        return self.metrics({name: weights[name] for name in weights})


def choose(
    out: Path,
    *,
    data: Views,
    base: Path,
    models: Mapping[str, Path],
    way: str,
    domains: Sequence[str],
    budget: int,
    trials: int,
    threshold: float,
    seed: int,
) -> None:
    """`out/choice.json`: what one way chooses by validation examples, its price, and its merge on test examples.

    way: "plan" (a budget of evaluations), a strategy of `gradmatch.zoo.select`, "best single" (all evaluated alone), or "cma-es from average",
    "cma-es from random" (so many trials).
    """
    score, judge = Macro(base, data, domains, "validation"), Macro(base, data, domains, "test")
    theta0 = str(base / "model")
    zoo = {name: str(folder / "model") for name, folder in models.items()}
    left_out: Mapping[str, str]
    started = time.perf_counter()
    told: dict[str, Any] = {}
    if way == "best single":
        alone = {name: score(open_checkpoint(folder)) for name, folder in zoo.items()}
        best = max(alone, key=lambda name: (alone[name], name))
        merged: Any = open_checkpoint(zoo[best])
        weights: Mapping[str, Any] = {best: 1.0}
        left_out, value = {}, alone[best]
        told["alone"] = alone
    elif way == "plan":
        made = plan(
            {
                "models": [{"model": folder, "name": name} for name, folder in zoo.items()],
                "base": theta0,
                "budget": budget,
                "threshold": threshold,
            }
        )
        made.families = made.families[:1]
        family: Planned = made.families[0]
        (found,) = run(made, out / "merged", score=score)
        merged, weights, value = open_checkpoint(out / "merged"), found.weights, found.score
        left_out = {**found.left_out, **made.alone}
        told["screened"] = sorted([*family.left_out, *made.alone])
    elif way.startswith("cma-es"):
        picked = evolve(theta0, zoo, score, trials=trials, start=way.rpartition(" ")[2], seed=seed)
        merged, weights, value, left_out = picked.merge(), picked.weights, picked.score, picked.left_out
        told["curve"] = [line["score"][0] if line["score"] else None for line in picked.history]
    else:
        taken = select(theta0, zoo, score, way)
        merged, weights, value, left_out = taken.merge(), taken.weights, taken.score, taken.left_out
    told |= {
        "weights": dict(weights),
        "left_out": sorted(left_out),
        "score": value,
        "evaluations": score.count,
    }
    told |= {"search_seconds": time.perf_counter() - started, "test": judge.of(merged)}
    write_json(out / "choice.json", told)
