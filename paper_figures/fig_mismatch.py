"""Figure: gradient mismatch of each merge against its test error (as the paper's Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.records import Record, models_in_order, of_kind
from paper_figures.style import BARS, BINOMIAL, caption, half_interval, look, plain_log, save


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
        bars = [
            half_interval(record["metrics"], record["domains"][1:]) for record in points
        ]  # the first is the base's
        axes.errorbar(x, y, bars, linestyle="none", markersize=6, label=model, **BARS, **styles[model])
    for axis in (axes.xaxis, axes.yaxis):
        plain_log(axis)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xlabel("gradient mismatch $\\|\\sum_t m_t\\|\\,/\\,n$ (training data)")
    axes.set_ylabel("test error on the tasks (%)")
    axes.margins(0.12)
    seeds = len({record["seed"] for record in measured})
    caption(
        figure,
        f"a point a merge{' and seed' if seeds > 1 else ''}; bars: {BINOMIAL}",
    )
    return save(figure, folder, name)


def error(record: Record) -> float:
    """Error on the tasks in per cent: each task counts alike, the base's own domain is left out."""
    return 100 * (1 - float(record["metrics"]["tasks"]["accuracy"]))
