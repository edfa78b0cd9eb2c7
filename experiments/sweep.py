"""Stage: one merge at many weights alpha, each forecast from training examples and evaluated on the test examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor
from tqdm import tqdm

from experiments.evaluate import measure, predict, with_averages
from experiments.merging import Metrics, chosen_options, merged_model
from experiments.mismatch import objective
from experiments.models import load_classifier, load_split
from gradmatch.measure.objective import Objective

Weights = Mapping[str, Tensor]


def sweep(
    out: Path,
    *,
    method: str,
    alphas: Sequence[float],
    options: Mapping[str, Any],
    data: Path,
    domains: Sequence[str],
    seed: int = 0,
    forecast: int = 0,
    choice: Path | None = None,
    **sources: Any,
) -> None:
    """Metrics, and forecasts from `forecast` training examples of each task (0: none), at every alpha: `out/sweep.json`.

    An option chosen on validation examples (at alpha = 1) is kept fixed. No merge is written.
    """
    model = load_classifier(sources["base"] / "model")
    rows = {domain: load_split(data, domain, "test") for domain in domains}
    tasks = sources["tasks"] if forecast else {}
    losses = {task: objective(data, folder, task, forecast, seed) for task, folder in tasks.items()}

    def score(weights: Weights) -> Metrics:
        model.load_state_dict(dict(weights))
        return with_averages({domain: measure(*predict(model, rows[domain])) for domain in domains})

    write_sweep(out, method, alphas, options, choice, score, losses, **sources)


def write_sweep(
    out: Path,
    method: str,
    alphas: Sequence[float],
    options: Mapping[str, Any],
    choice: Path | None,
    score: Callable[[Weights], Metrics],
    losses: Mapping[str, Objective],
    **sources: Any,
) -> None:
    """`out/sweep.json`: the metrics, and the forecast by `losses`, of the merge at every alpha.

    choice: the folder of a `choose` stage. losses: by task, each on the module of its fine-tune; none: no forecast.
    sources: as `merging.merged_model` takes them.
    """
    chosen = chosen_options(choice)
    points = []
    for alpha in tqdm(alphas, desc="alpha"):
        weights = dict(merged_model(method, alpha, {**options, **chosen}, **sources))
        told = {"forecast": forecast_losses(weights, losses)} if losses else {}
        points.append({"alpha": alpha, "metrics": score(weights), **told})
    found = {"chosen": chosen, "points": points}
    (out / "sweep.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


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
