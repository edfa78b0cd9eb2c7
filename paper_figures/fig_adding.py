"""Figure: mismatch against test error as tasks are added (as the paper's Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import BARS, BINOMIAL, caption, half_interval, look, plain_log, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_adding") -> list[Path]:
    """A panel per number of tasks, a marker per rule, a point per subset and seed; thin lines join those of one subset.

    Raises ValueError where no subset was measured.
    """
    cells = of_kind(records, "subset")
    if not cells:
        raise ValueError("no record of a subset: run an adding config first")
    models = list(dict.fromkeys(record["model"] for record in cells))
    styles = look(models)
    sizes = sorted({len(record["tasks"]) for record in cells})
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3.2 * len(sizes), 3.0), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, size in zip(panels[0], sizes, strict=True):
        of_size = [record for record in cells if len(record["tasks"]) == size]
        for subset in dict.fromkeys((record["seed"], tuple(record["tasks"])) for record in of_size):
            points = [point(r) for r in of_size if (r["seed"], tuple(r["tasks"])) == subset]
            axes.plot(*zip(*sorted(points), strict=True), color="#bbbbbb", linewidth=0.7, zorder=1)
        for model in models:
            own = [record for record in cells if (record["model"], len(record["tasks"])) == (model, size)]
            for index, record in enumerate(own):
                label = model if index == 0 else None
                bar = half_interval(record["metrics"], record["tasks"])
                axes.errorbar(
                    *point(record), bar, linestyle="none", markersize=5, label=label, **BARS, **styles[model]
                )
        plain_log(axes.xaxis)
        axes.set_title(f"{size} tasks")
        axes.set_xlabel("gradient mismatch $\\|\\sum_t m_t\\|\\,/\\,n$")
    panels[0][0].set_ylabel("test error on the tasks (%)")
    marks: dict[str, Any] = {}  # some rules merge pairs alone
    for axes in panels[0]:
        marks |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    panels[0][-1].legend(marks.values(), marks, loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption(figure, f"a mark a merge of a subset and seed, a line a subset; bars: {BINOMIAL}")
    return save(figure, folder, name)


def point(record: Record) -> tuple[float, float]:
    """Mismatch per training example, and test error in per cent."""
    return record["mismatch"]["per_example"], 100 * (1 - record["metrics"]["macro"]["accuracy"])
