"""Figure: how near each way to remove data comes to retraining without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import caption, look, save

METRICS = {  # title of the axis, and its end: what lies beyond must not hide what the others differ by
    "distance": ("distance of weights to retraining\n/ that of the unedited model", 1.5),
    "kl": ("KL of predictions to retraining (nats)", float("inf")),
}


def draw(records: Sequence[Record], folder: Path, name: str = "fig_proof") -> list[Path]:
    """A panel per measure; per problem a point per edit at alpha = 1: mean over seeds, whiskers smallest to largest.

    Raises ValueError where no record holds a proof.
    """
    rows = [record for record in of_kind(records, "proof") if record["edit"] != "retrained"]
    if not rows:
        raise ValueError("no record of a proof: run a removal-proof config first")
    edits = list(dict.fromkeys(record["edit"] for record in rows if record["alpha"] in (0.0, 1.0)))
    styles = look(edits)
    figure, panels = plt.subplots(1, 2, figsize=(8.0, 3.2), layout="constrained")
    for axes, (metric, (title, end)) in zip(panels, METRICS.items(), strict=True):
        problems = list(dict.fromkeys(record["problem"] for record in rows if metric in record))
        for index, edit in enumerate(edits):
            shift = 0.8 / len(edits) * (index - (len(edits) - 1) / 2)
            points = []
            for x, problem in enumerate(problems):
                values = [
                    record[metric]
                    for record in rows
                    if (record["problem"], record["edit"]) == (problem, edit)
                    and record["alpha"] in (0.0, 1.0)
                    and metric in record
                ]
                if not values:
                    continue
                place, mean = x + shift, fmean(values)
                points.append((place, min(mean, end)))
                if mean > end:
                    axes.text(place, end, f"outside, at {mean:.3g} ↑  ", ha="right", va="center", fontsize=7)
                else:
                    axes.vlines(place, min(values), max(values), color=styles[edit]["color"], linewidth=0.8)
            x_y = zip(*points, strict=True) if points else ([], [])
            label = "unedited model" if edit == "base" else edit
            axes.plot(*x_y, linestyle="none", markersize=4.5, label=label, **styles[edit])
        for x in range(1, len(problems)):
            axes.axvline(x - 0.5, color="#dddddd", linewidth=0.6)
        axes.axhline(0, color="#dddddd", linewidth=0.6, zorder=0)
        axes.set_xticks(range(len(problems)), problems)
        axes.set_ylabel(title)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    caption(figure, "edits at $\\alpha$ = 1; marks: mean over seeds, whiskers: smallest to largest")
    return save(figure, folder, name)
