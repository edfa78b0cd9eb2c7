"""Figure: gradient mismatch of each merge against its test error (as the paper's Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.records import Record, models_in_order, of_kind
from paper_figures.style import caption, look, plain_log, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_mismatch") -> list[Path]:
    """Total mismatch per training example against the error on the tasks: one marker per merge, one point per seed, with its interval.

    Raises ValueError where no record holds a mismatch.
    """
    measured = [record for record in of_kind(records, "evaluation") if "mismatch" in record]
    if not measured:
        raise ValueError("no record holds a mismatch: run a sentiment config first")
    models = models_in_order(measured)
    styles = look(models)
    figure, axes = plt.subplots(figsize=(4.2, 3.1), layout="constrained")
    for model in models:
        points = [record for record in measured if record["model"] == model]
        x = [record["mismatch"]["per_example"] for record in points]
        y = [error(record) for record in points]
        bars = {"yerr": [half_interval(record) for record in points], "elinewidth": 0.7, "ecolor": "#bbbbbb"}
        axes.errorbar(x, y, linestyle="none", markersize=6, label=model, **bars, **styles[model])
    for axis in (axes.xaxis, axes.yaxis):
        plain_log(axis)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xlabel("gradient mismatch $\\|\\sum_t m_t\\|\\,/\\,n$ (training data)")
    axes.set_ylabel("test error on the tasks (%)")
    axes.margins(0.12)
    seeds = len({record["seed"] for record in measured})
    caption(
        figure,
        f"a point a merge{' and seed' if seeds > 1 else ''}; bars: 95 % over its test examples (binomial)",
    )
    return save(figure, folder, name)


def half_interval(record: Record) -> float:
    """Half the 95 % interval of that error over the test examples: 1.96 sqrt(sum_t p_t (1 - p_t) / n_t) / T, in per cent."""
    tasks = [
        own
        for name, own in record["metrics"].items()
        if name in record["domains"][1:]  # the first is the base's
    ]
    variance = sum(own["accuracy"] * (1 - own["accuracy"]) / own["n"] for own in tasks)
    return 196 * float(variance) ** 0.5 / max(1, len(tasks))


def error(record: Record) -> float:
    """Error on the tasks in per cent: each task counts alike, the base's own domain is left out."""
    return 100 * (1 - float(record["metrics"]["tasks"]["accuracy"]))
