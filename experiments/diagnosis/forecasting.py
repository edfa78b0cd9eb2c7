"""Stage: forecasts of merges before they are evaluated, against what they turn out to cost, and closed-form weights."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from estimators import Curvature, estimate
from experiments.models import batches, load_classifier, load_split, subset
from gradmatch import Task, merge
from gradmatch.diagnosis.auto import make_directions
from gradmatch.diagnosis.evidence import accuracy_of
from gradmatch.diagnosis.forecast import Products, best_coefficients, spearman
from gradmatch.diagnosis.objective import Objective
from gradmatch.diagnosis.products import curvature_products, dot, measure_products, save_products

Weights = Mapping[str, torch.Tensor]
# The rules whose merges are forecast: name -> (method, options). Weights are those of the config.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "FA": ("fisher", {}),
    "GM": ("gradient_matching", {}),
    "GM, H0 x 0.1": ("gradient_matching", {"base_weight": 0.1}),
    "TIES": ("ties", {}),
}


def forecast(
    out: Path,
    *,
    data: Path,
    base: Path,
    tasks: Mapping[str, Path],
    base_curvature: Path,
    curvatures: Mapping[str, Path],
    examples: int,
    kfac: int,
    test: int,
    grid: Sequence[float],
    draws: int,
    seed: int,
    delta0: float,
) -> None:
    """Measure products on validation examples, forecast merges, evaluate them on test examples, and try a grid of weights.

    Writes `out/forecast.json` (everything that the report prints) and `out/products.json`.
    """
    module = load_classifier(base / "model")
    theta0 = {name: value.clone() for name, value in module.state_dict().items()}
    thetas = {t: dict(load_classifier(folder / "model").state_dict()) for t, folder in tasks.items()}
    fishers = {t: Curvature.load(folder / "curvature.safetensors") for t, folder in curvatures.items()}
    h0 = Curvature.load(base_curvature / "curvature.safetensors")
    held = {t: _objective(module, data, t, "validation", examples, seed) for t in tasks}
    tested = {t: _objective(module, data, t, "test", test, seed) for t in tasks}

    taus, places = make_directions(theta0, thetas)
    terms, _ = make_directions(
        theta0,
        thetas,
        span="preconditioned",
        curvatures=fishers,
        base_curvature=h0,
        curvature_weight=0.1,
        delta0=delta0,
    )
    merges = made_merges(theta0, thetas, fishers, h0, delta0)
    directions: dict[str, Weights] = dict(taus)
    directions |= {f"gm:{t}": terms[t] for t in tasks}
    directions |= {name: _difference(theta, theta0, taus) for name, theta in merges.items()}
    start = time.perf_counter()
    exact = [
        measure_products(t, held[t], thetas[t], directions, places[t]) for t in tqdm(tasks, desc="products")
    ]
    seconds = time.perf_counter() - start
    save_products(exact, out / "products.json")
    factors = {t: kronecker(module, held[t], thetas[t], kfac) for t in tasks}
    kron = [
        curvature_products(t, factors[t], directions, places[t], gradient=held[t].gradient(thetas[t]))
        for t in tasks
    ]
    diagonal = [
        curvature_products(t, fishers[t], directions, places[t], gradient=held[t].gradient(thetas[t]))
        for t in tasks
    ]

    coordinates = {name: {name: 1.0} for name in merges} | random_weights(list(tasks), draws, seed)
    best = {
        "closed form, tau": best_coefficients(exact, free=list(tasks)).coefficients,
        "closed form, preconditioned": best_coefficients(exact, free=[f"gm:{t}" for t in tasks]).coefficients,
        "Kronecker, tau": best_coefficients(kron, free=list(tasks), upper=2.0).coefficients,
        "diagonal, tau": best_coefficients(diagonal, free=list(tasks), upper=2.0).coefficients,
    }
    coordinates |= best
    own = {t: float(objective.losses(thetas[t]).mean()) for t, objective in tested.items()}
    rows = []
    for name, c in tqdm(coordinates.items(), desc="merges"):
        theta = {**theta0, **_moved(theta0, directions, c)}
        vector = np.array([c.get(d, 0.0) for d in directions])
        for t, objective in tested.items():
            losses, confusion = objective.evaluate(theta)
            assert confusion is not None
            rows.append(
                {
                    "merge": name,
                    "task": t,
                    "measured": float(losses.mean()) - own[t],
                    "accuracy": accuracy_of(confusion),
                    **{
                        kind: _of(products, t).rise(vector) / _of(products, t).num_examples
                        for kind, products in (("exact", exact), ("kronecker", kron), ("diagonal", diagonal))
                    },
                    "trusted": _of(exact, t).trusted(vector),
                }
            )
    start = time.perf_counter()
    tried = grid_search(theta0, directions, tested, list(tasks), grid)
    content = {
        "rows": rows,
        "weights": best,
        "grid": tried,
        "grid_seconds": time.perf_counter() - start,
        "products_seconds": seconds * len(tasks) / len(directions),  # of the task vectors alone
        "correlations": correlations(rows),
        "norms": {t: dot(u, u) ** 0.5 for t, u in taus.items()},
        "quadratic": {  # tau_t' H_t tau_t, nats
            kind: {p.task: float(p.curvature[i, i]) for i, p in enumerate(products)}
            for kind, products in (("exact", exact), ("kronecker", kron), ("diagonal", diagonal))
        },
    }
    (out / "forecast.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def kronecker(module: Any, objective: Objective, theta: Weights, examples: int) -> Curvature:
    """Kronecker factors at a fine-tune, from the first `examples` of its training examples."""
    module.load_state_dict(dict(theta))
    raw, seen = [], 0
    for batch in objective.batches:
        if seen < examples:
            raw.append({**batch.kwargs, "labels": batch.labels})
            seen += batch.size
    return estimate(module, raw, method="kfac", num_examples=objective.num_examples, progress=False)


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
    objectives: Mapping[str, Objective],
    tasks: Sequence[str],
    grid: Sequence[float],
) -> list[dict[str, Any]]:
    """Evaluate every combination of weights: what a closed form saves."""
    tried = []
    for point in tqdm(list(product(grid, repeat=len(tasks))), desc="grid"):
        c = dict(zip(tasks, point, strict=True))
        theta = {**theta0, **_moved(theta0, directions, c)}
        accuracies = [objective.accuracy(theta) or 0.0 for objective in objectives.values()]
        tried.append({"weights": c, "accuracy": sum(accuracies) / len(accuracies)})
    return tried


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of forecast and measured rise over merges: the mean over tasks, and each task alone."""
    found: dict[str, dict[str, float]] = {}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    chosen = [row for row in rows if not row["merge"].startswith(("closed", "Kronecker", "diagonal"))]
    names = list(dict.fromkeys(row["merge"] for row in chosen))
    for kind in ("exact", "kronecker", "diagonal"):
        by_task = {
            t: spearman(
                [row[kind] for row in chosen if row["task"] == t],
                [row["measured"] for row in chosen if row["task"] == t],
            )
            for t in tasks
        }
        sums = [
            [sum(row[key] for row in chosen if row["merge"] == name) for name in names]
            for key in (kind, "measured")
        ]
        pooled = spearman([row[kind] for row in chosen], [row["measured"] for row in chosen])
        found[kind] = {**by_task, "all tasks together": pooled, "mean of the tasks": spearman(*sums)}
    return found


def _objective(module: Any, data: Path, domain: str, split: str, examples: int, seed: int) -> Objective:
    rows = load_split(data, domain, split)
    chosen = [batch for _, batch in batches(subset(rows, examples, seed), 32)]
    return Objective(module, chosen, num_examples=len(rows))


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


def _of(products: Sequence[Products], task: str) -> Products:
    return next(p for p in products if p.task == task)
