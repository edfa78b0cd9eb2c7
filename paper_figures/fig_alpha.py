"""Figure: accuracy of each merge over the weight alpha, and its loss against the forecast: how much the choice of alpha matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from experiments.records import Record, mean_over_seeds, of_kind
from paper_figures.style import half_interval, look, plain_log, save

BAND = ("95 % over the test examples", "$\\pm$ 1 s.d. over seeds")  # of one seed, of several
Point = dict[str, Any]


def draw(records: Sequence[Record], folder: Path, name: str = "fig_alpha") -> list[Path]:
    """Mean accuracy on the tasks over alpha: a line a merge (mean over seeds), a band of 1 s.d. (of one seed, of 95 %).

    Where the sweeps were forecast, beside it the mean loss on the tasks: measured (lines) and forecast (hollow markers).
    Each merge is drawn thinner than the one below it, so that none hides another. Draws nothing, and returns no path,
    where no merge was swept.
    """
    sweeps = of_kind(records, "sweep")
    if not sweeps:
        return []
    forecast = all("forecast" in point for record in sweeps for point in record["points"])
    figure, panels = plt.subplots(1, 1 + forecast, figsize=(4.2 * (1 + forecast), 3.0), squeeze=False)
    accuracy, *rest = panels[0]
    models = list(dict.fromkeys(record["model"] for record in sweeps))
    styles, seeds = look(models), len({record["seed"] for record in sweeps})
    for index, model in enumerate(models):
        own = [record for record in sweeps if record["model"] == model]
        thick = 1 - index / len(models)
        style = {**styles[model], "markersize": 3 + 5 * thick, "linewidth": 0.8 + 2 * thick}
        style["linestyle"] = ("-", "--", "-.", ":")[index % 4]
        alphas, means, spread = curve(own, lambda point: 100 * point["metrics"]["tasks"]["accuracy"])
        accuracy.plot(alphas, means, label=model, **style)
        if seeds == 1:
            spread = [half_interval(point["metrics"], ["tasks"]) for point in own[0]["points"]]
        if any(spread):
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            accuracy.fill_between(alphas, low, high, color=style["color"], alpha=0.15, linewidth=0)
        for loss in rest:
            loss.plot(*curve(own, lambda point: point["metrics"]["tasks"]["nll"])[:2], **style)
            told = {**style, "linestyle": "", "markerfacecolor": "none"}
            loss.plot(*curve(own, lambda point: point["forecast"]["mean"])[:2], **told)
    accuracy.set_ylabel("accuracy on the tasks (%)")
    for loss in rest:
        if min(loss.dataLim.y0, loss.dataLim.y1) > 0:  # a quadratic may foresee less than nothing
            plain_log(loss.yaxis)
        loss.set_ylabel("loss on the tasks (nats)")
        hollow = {"linestyle": "", "markerfacecolor": "none"}
        lines = [Line2D([], [], color="#666666", marker="o", markersize=5, **own) for own in ({}, hollow)]
        loss.legend(lines, ["measured, test examples", "forecast, training examples"])
    accuracy.legend(title=f"band: {BAND[seeds > 1]}", title_fontsize=7, alignment="left")
    for axes in panels[0]:
        axes.set_xlabel("weight $\\alpha$ of every task")
    return save(figure, folder, name)


def curve(
    own: Sequence[Record], value: Callable[[Point], float]
) -> tuple[list[float], list[float], list[float]]:
    """Alphas, and at each the mean and the standard deviation over seeds of a value of the points."""
    alphas = [point["alpha"] for point in own[0]["points"]]
    found = [mean_over_seeds(own, partial(_of, value, i)) for i in range(len(alphas))]
    known = [(alpha, *pair) for alpha, pair in zip(alphas, found, strict=True) if pair is not None]
    return [a for a, _, _ in known], [m for _, m, _ in known], [s for _, _, s in known]


def _of(value: Callable[[Point], float], place: int, record: Record) -> float:
    return value(record["points"][place])
