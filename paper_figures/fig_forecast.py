"""Figure: each task's forecast rise of the loss against the measured one, a panel per kind of curvature."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from experiments.statistics import rank_interval
from paper_figures.style import caption, look, save

KINDS = {"exact": "exact GGN products", "kronecker": "Kronecker factors", "diagonal": "diagonal Fisher"}


def draw(records: Sequence[Record], folder: Path, name: str = "fig_forecast") -> list[Path]:
    """A point per merge, task and seed: nats per example, measured on the examples that the forecast saw.

    The rank correlation over all of them is the records' own, mean over seeds. Raises ValueError where nothing was forecast.
    """
    forecasts = of_kind(records, "forecast")
    rows = [row for record in forecasts for row in record["rows"]]
    if not rows:
        raise ValueError("no record of a forecast: run configs/forecast.yaml first")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    styles = look(tasks)
    figure, panels = plt.subplots(
        1, len(KINDS), figsize=(7.2, 2.9), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        for task in tasks:
            points = [(row["seen"], row[kind]) for row in rows if row["task"] == task]
            axes.plot(
                *zip(*points, strict=True), linestyle="none", markersize=3.5, label=task, **styles[task]
            )
        axes.axline((0, 0), slope=1, color="#999999", linewidth=0.8, linestyle="--")
        rhos = [record["correlations"]["seen"][kind]["all pairs"] for record in forecasts]
        low, high = rank_interval(
            fmean(rhos), len(forecasts[0]["rows"])
        )  # of one seed's points: seeds share tasks
        axes.set_title(f"{title}\nSpearman {fmean(rhos):.2f} ({low:.2f} to {high:.2f})")
        axes.set_xlabel("measured rise (nats / example)")
    panels[0].set_ylabel("forecast rise (nats / example)")
    panels[0].legend(fontsize=7)
    caption(
        figure,
        "a mark a merge and task, both losses on the examples that the forecast was made from; dashes: forecast = measured\n"
        "Spearman: mean over seeds, 95 % interval over one seed's marks (Bonett and Wright)",
    )
    return save(figure, folder, name)
