"""Stage: one merge at many weights alpha, each forecast from training examples and evaluated on the test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from experiments.evaluate import Weights, scorer
from experiments.files import write_json
from experiments.merging import chosen_options, merged_model
from experiments.mismatch import objective
from experiments.rows import Views
from gradmatch.measure.objective import Objective


def sweep(
    out: Path,
    *,
    method: str,
    alphas: Sequence[float],
    options: Mapping[str, Any],
    data: Views,
    domains: Sequence[str],
    seed: int = 0,
    forecast: int = 0,
    choice: Path | None = None,
    **sources: Any,
) -> None:
    """Metrics, and forecasts from `forecast` training examples of each task (0: none), at every alpha: `out/sweep.json`.

    An option chosen on validation examples (at alpha = 1) is kept fixed. No merge is written.
    """
    score, chosen = scorer(sources["base"], data, domains, "test"), chosen_options(choice)
    tasks = sources["tasks"] if forecast else {}
    losses = {task: objective(data, folder, task, forecast, seed) for task, folder in tasks.items()}
    points = []
    for alpha in tqdm(alphas, desc="alpha"):
        weights = dict(merged_model(method, alpha, {**options, **chosen}, **sources))
        told = {"forecast": forecast_losses(weights, losses)} if losses else {}
        points.append({"alpha": alpha, "metrics": score(weights), **told})
    write_json(out / "sweep.json", {"chosen": chosen, "points": points})


def forecast_losses(weights: Weights, losses: Mapping[str, Objective]) -> dict[str, float]:
    """Each task's loss at `weights` as its own fine-tune foresees it, and the `mean` over the tasks, nats per example.

    l_t(theta_t) + g_t'd + d'H_t d / 2 with d = weights - theta_t, gradient and GGN exact on the examples of `losses`.
    """
    found = {}
    for task, loss in losses.items():
        own = dict(loss.module.named_parameters())
        step = {name: weights[name].to(value) - value.detach() for name, value in own.items()}
        value, slope, bend = loss.expand(own, step)
        found[task] = (value + slope + bend / 2) / loss.num_examples
    return {**found, "mean": fmean(found.values())}
