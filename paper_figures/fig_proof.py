"""Figure: how near each way to remove data comes to retraining without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import look, save

METRICS = {"distance": "distance of weights to retraining\n(of the unedited model's)", "kl": "KL of predictions to retraining (nats)"}  # fmt: skip


def draw(records: Sequence[Record], folder: Path, name: str = "fig_proof") -> list[Path]:
    """A panel per measure; per problem a point per edit at alpha = 1: mean over seeds, whiskers smallest to largest.

    Raises ValueError where no record holds a proof.
    """
    rows = [record for record in of_kind(records, "proof") if record["edit"] != "retrained"]
    if not rows:
        raise ValueError("no record of a proof: run a removal-proof config first")
    edits = list(dict.fromkeys(record["edit"] for record in rows if record["alpha"] in (0.0, 1.0)))
    styles = look(edits)
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        problems = list(dict.fromkeys(record["problem"] for record in rows if metric in record))
        for index, edit in enumerate(edits):
            shift = 0.08 * (index - (len(edits) - 1) / 2)
            points = []
            for x, problem in enumerate(problems):
                values = [
                    record[metric]
                    for record in rows
                    if (record["problem"], record["edit"]) == (problem, edit)
                    and record["alpha"] in (0.0, 1.0)
                    and metric in record
                ]
                if values:
                    points.append((x + shift, fmean(values)))
                    axes.vlines(
                        x + shift, min(values), max(values), color=styles[edit]["color"], linewidth=0.8
                    )
            x_y = zip(*points, strict=True) if points else ([], [])
            axes.plot(*x_y, linestyle="none", markersize=5, label=edit, **styles[edit])
        axes.set_xticks(range(len(problems)), problems)
        axes.set_ylabel(title)
        if axes.get_ylim()[1] > 5:  # one method far off must not hide what the others differ by
            axes.set_yscale("symlog", linthresh=2, linscale=2)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    return save(figure, folder, name)
