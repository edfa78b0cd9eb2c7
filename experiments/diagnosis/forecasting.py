"""Stage: forecasts of merges before they are evaluated, against what they turn out to cost, and closed-form weights."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from experiments.diagnosis.loading import Run, Weights, examples, fast, load_run
from experiments.diagnosis.scores import correlations, scales
from experiments.rows import Views, load_split
from gradmatch import Task, merge
from gradmatch.choosing.auto import make_directions
from gradmatch.diagnosis.evidence import accuracy_of
from gradmatch.estimators import Curvature, estimate
from gradmatch.measure.forecast import Products, best_coefficients
from gradmatch.measure.objective import Objective
from gradmatch.measure.products import curvature_products, dot, measure_products, save_products

# The rules whose merges are forecast: name -> (method, options). Weights are those of the config.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "FA": ("fisher", {}),
    "GM": ("gradient_matching", {}),
    "GM, H0 x 0.1": ("gradient_matching", {"base_weight": 0.1}),
    "TIES": ("ties", {}),
}
UPPER = 2.0  # largest weight that is tried and chosen, as in `merge(..., weights="auto")`


def forecast(
    out: Path,
    *,
    data: Views,
    base: Path,
    tasks: Mapping[str, Path],
    base_curvature: Path,
    curvatures: Mapping[str, Path],
    split: str,
    count: int,
    kfac: int,
    test: int,
    grid: Sequence[float],
    draws: int,
    seed: int,
    delta0: float,
) -> None:
    """Measure products on `count` examples of a split, forecast merges, evaluate them there and on test examples, try a grid.

    Writes `out/forecast.json` (everything that the report prints) and `out/products.json`.
    """
    run = load_run(base, tasks, base_curvature, curvatures)
    seen = {t: _objective(run, data, t, split, count, seed) for t in tasks}
    tested = {t: _objective(run, data, t, "test", test, seed) for t in tasks}
    directions, places = all_directions(run, delta0)
    start = time.perf_counter()
    exact = [
        measure_products(t, seen[t], run.tasks[t], directions, places[t])
        for t in tqdm(tasks, desc="products")
    ]
    seconds = time.perf_counter() - start
    save_products(exact, out / "products.json")
    gradients = {t: seen[t].gradient(run.tasks[t]) for t in tasks}

    def from_files(files: Mapping[str, Curvature]) -> list[Products]:
        return [curvature_products(t, files[t], directions, places[t], gradient=gradients[t]) for t in tasks]

    products = {
        "exact": exact,
        "kronecker": from_files({t: kronecker(run, seen[t], t, kfac) for t in tasks}),
        "diagonal": from_files(run.curvatures),
    }
    names = list(tasks)
    best = {
        "closed form, tau": best_coefficients(exact, free=names, upper=UPPER),
        "closed form, preconditioned": best_coefficients(exact, free=[f"gm:{t}" for t in names], upper=UPPER),
        "Kronecker, tau": best_coefficients(products["kronecker"], free=names, upper=UPPER),
        "diagonal, tau": best_coefficients(products["diagonal"], free=names, upper=UPPER),
    }
    chosen = {name: found.coefficients for name, found in best.items()}
    merges = {name: {name: 1.0} for name in RULES} | random_weights(names, draws, seed) | chosen
    rows = evaluated(run, directions, merges, products, seen, tested)
    start = time.perf_counter()
    halves = [{t: _objective(run, data, t, "test", test, seed, half) for t in tasks} for half in (0, 1)]
    tried = grid_search(run.base, directions, halves, names, grid)
    factors = scales(products, rows)
    for row in rows:
        del row["coordinates"]
    content = {
        "rows": rows,
        "weights": chosen,
        "grid": tried,
        "grid_seconds": time.perf_counter() - start,
        "products_seconds": seconds * len(names) / len(directions),  # the share of the task vectors alone
        "scales": factors,
        "correlations": correlations(rows, factors),
        "norms": {t: dot(directions[t], directions[t]) ** 0.5 for t in names},
        "quadratic": {  # tau_t' H_t tau_t, nats
            kind: {p.task: float(p.curvature[i, i]) for i, p in enumerate(each)}
            for kind, each in products.items()
        },
    }
    (out / "forecast.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def all_directions(run: Run, delta0: float) -> tuple[dict[str, Weights], dict[str, dict[str, float]]]:
    """Task vectors, terms of Eq. 12 ("gm:<task>"), updates of the merges of RULES; and where every fine-tune is."""
    taus, places = make_directions(run.base, run.tasks)
    h0 = run.curvatures["base"]
    curvatures = {t: run.curvatures[t] for t in run.tasks}
    terms, _ = make_directions(
        run.base,
        run.tasks,
        span="preconditioned",
        curvatures=curvatures,
        base_curvature=h0,
        curvature_weight=0.1,
        delta0=delta0,
    )
    directions: dict[str, Weights] = dict(taus)
    directions |= {f"gm:{t}": terms[t] for t in run.tasks}
    merges = made_merges(run.base, run.tasks, curvatures, h0, delta0)
    directions |= {name: _difference(theta, run.base, taus) for name, theta in merges.items()}
    return directions, places


def evaluated(
    run: Run,
    directions: Mapping[str, Weights],
    merges: Mapping[str, Mapping[str, float]],
    products: Mapping[str, Sequence[Products]],
    seen: Mapping[str, Objective],
    tested: Mapping[str, Objective],
) -> list[dict[str, Any]]:
    """Forecast and measured rise of every task's loss at every merge, nats per example."""
    with fast():
        own = {t: [float(o[t].losses(run.tasks[t]).mean()) for o in (seen, tested)] for t in run.tasks}
    rows = []
    for name, c in tqdm(merges.items(), desc="merges"):
        theta = {**run.base, **_moved(run.base, directions, c)}
        vector = np.array([c.get(d, 0.0) for d in directions])
        for position, t in enumerate(run.tasks):
            with fast():
                before = float(seen[t].losses(theta).mean())
                losses, confusion = tested[t].evaluate(theta)
            assert confusion is not None
            told = {kind: each[position] for kind, each in products.items()}
            rows.append(
                {
                    "merge": name,
                    "task": t,
                    "coordinates": vector.tolist(),
                    "seen": before - own[t][0],
                    "measured": float(losses.mean()) - own[t][1],
                    "accuracy": accuracy_of(confusion),
                    **{kind: p.rise(vector) / p.num_examples for kind, p in told.items()},
                    "trusted": told["exact"].trusted(vector),
                }
            )
    return rows


def kronecker(run: Run, objective: Objective, task: str, count: int) -> Curvature:
    """Kronecker factors at a fine-tune, from the first `count` of the examples that are seen."""
    run.module.load_state_dict(run.tasks[task])
    raw, read = [], 0
    for batch in objective.batches:
        if read < count:
            raw.append({**batch.kwargs, "labels": batch.labels})
            read += batch.size
    return estimate(run.module, raw, method="kfac", num_examples=objective.num_examples, progress=False)


def made_merges(
    theta0: Weights,
    thetas: Mapping[str, Weights],
    fishers: Mapping[str, Curvature],
    h0: Curvature,
    delta0: float,
) -> dict[str, Weights]:
    """Merges that lie outside the span of the task vectors."""
    tasks = [Task(theta, fishers[t], 1.0, t) for t, theta in thetas.items()]
    return {
        name: merge(
            theta0,
            tasks,
            method=method,
            base_curvature=h0,
            delta0=delta0,
            **{"missing_curvature": "zero", **options},
        )
        for name, (method, options) in RULES.items()
    }


def random_weights(tasks: Sequence[str], draws: int, seed: int) -> dict[str, dict[str, float]]:
    """Averages, task arithmetic at several scales, single tasks, and weights drawn uniformly from [0, 1.2]."""
    made = {f"TA {scale:g}": dict.fromkeys(tasks, scale) for scale in (0.0, 0.2, 0.5, 0.7, 1.0, 1.2)}
    made["AM"] = dict.fromkeys(tasks, 1 / len(tasks))
    made |= {f"only {t}": {t: 1.0} for t in tasks}
    rng = np.random.default_rng(seed)
    for index in range(draws):
        made[f"random {index}"] = dict(zip(tasks, rng.uniform(0, 1.2, len(tasks)).tolist(), strict=True))
    return made


def grid_search(
    theta0: Weights,
    directions: Mapping[str, Weights],
    halves: Sequence[Mapping[str, Objective]],
    tasks: Sequence[str],
    grid: Sequence[float],
) -> list[dict[str, Any]]:
    """Evaluate every combination of weights on both halves of the test examples: what a closed form saves.

    The best of many merges on the examples that chose it is too good: chosen on one half, its accuracy is that on the other.
    """
    tried = []
    for point in tqdm(list(product(grid, repeat=len(tasks))), desc="grid"):
        c = dict(zip(tasks, point, strict=True))
        theta = {**theta0, **_moved(theta0, directions, c)}
        with fast():
            accuracies = [
                fmean(objective.accuracy(theta) or 0.0 for objective in half.values()) for half in halves
            ]
        tried.append({"weights": c, "accuracy": fmean(accuracies), "halves": accuracies})
    return tried


def _objective(
    run: Run, data: Views, domain: str, split: str, count: int, seed: int, half: int | None = None
) -> Objective:
    """On `count` examples of a split, or every other one of them."""
    chosen = examples(data, domain, split, count, seed)
    if half is not None:
        parts = [{key: value[half::2] for key, value in batch.items()} for batch in chosen]
        chosen = [part for part in parts if len(part["labels"])]
    return Objective(run.module, chosen, num_examples=len(load_split(data, domain, split)))


def _difference(theta: Weights, theta0: Weights, like: Mapping[str, Weights]) -> dict[str, torch.Tensor]:
    return {name: theta[name].float() - theta0[name].float() for name in next(iter(like.values()))}


def _moved(
    theta0: Weights, directions: Mapping[str, Weights], c: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """theta0 + sum_k c_k u_k over the tensors that the directions move."""
    moved = {}
    for name in next(iter(directions.values())):
        value = theta0[name].float().clone()
        for d, weight in c.items():
            value.add_(directions[d][name], alpha=weight)
        moved[name] = value
    return moved
