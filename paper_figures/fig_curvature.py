"""Figure: accuracy of the merge against the seconds that its curvature took, one marker per estimate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import look, plain_log, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_curvature") -> list[Path]:
    """Mean over seeds, whiskers from the smallest to the largest; task arithmetic, which needs none, is the dashed line.

    Raises ValueError where no merge was measured.
    """
    merges = of_kind(records, "merge")
    if not merges:
        raise ValueError("no record of a merge: run a curvature config first")
    figure, axes = plt.subplots(figsize=(4.4, 3.2), layout="constrained")
    names = [name for name in dict.fromkeys(record["estimate"] for record in merges) if name != "TA"]
    styles = look(names)
    for estimate in names:
        own = [record for record in merges if record["estimate"] == estimate]
        y = [accuracy(record) for record in own]
        x = max(fmean(record["estimate_seconds"] for record in own), 0.1)  # optimizer states cost no pass
        axes.vlines(x, min(y), max(y), color=styles[estimate]["color"], linewidth=0.8)
        axes.plot(x, fmean(y), linestyle="none", label=estimate, **styles[estimate])
    arithmetic = [accuracy(record) for record in merges if record["estimate"] == "TA"]
    if arithmetic:
        axes.axhline(fmean(arithmetic), color="#666666", linestyle="--", linewidth=1, label="TA")
    plain_log(axes.xaxis)
    axes.set_xlabel("seconds for all curvatures of one merge (0.1: none)")
    axes.set_ylabel("accuracy on the tasks (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    return save(figure, folder, name)


def accuracy(record: Record) -> float:
    """Mean accuracy on the tasks in per cent."""
    return 100 * float(record["metrics"]["macro"]["accuracy"])
