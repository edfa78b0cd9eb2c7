"""Stage: one merge at one weight alpha, forecast from training examples and evaluated on the test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.evaluate import Weights, scorer
from experiments.files import write_json
from experiments.merging import chosen_options, merged_model
from experiments.mismatch import objective
from experiments.rows import Views
from gradmatch.measure.objective import Objective


def point(
    out: Path,
    *,
    method: str,
    alpha: float,
    options: Mapping[str, Any],
    data: Views,
    domains: Sequence[str],
    seed: int = 0,
    forecast: int = 0,
    choice: Path | None = None,
    **sources: Any,
) -> None:
    """Metrics at one alpha, and the forecasts from `forecast` training examples of each task (0: none): `out/point.json`.

    An option chosen on validation examples (at alpha = 1) is kept fixed. No merge is written.
    """
    chosen = chosen_options(choice)
    weights = dict(merged_model(method, alpha, {**options, **chosen}, **sources))
    tasks = sources["tasks"] if forecast else {}
    losses = {task: objective(data, folder, task, forecast, seed) for task, folder in tasks.items()}
    told = {"forecast": forecast_losses(weights, losses)} if losses else {}
    metrics = scorer(sources["base"], data, domains, "test")(weights)
    write_json(out / "point.json", {"chosen": chosen, "alpha": alpha, "metrics": metrics, **told})


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
