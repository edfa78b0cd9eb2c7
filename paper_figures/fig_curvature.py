"""Figure: what cheap curvature costs and what the merge loses by it, a row per estimate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from experiments.statistics import t_interval
from paper_figures.style import COLOURS, caption, plain_log, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_curvature") -> list[Path]:
    """Correlation of logarithms with the exact GGN, seconds, and the accuracy of the merge (a point per seed or model).

    Raises ValueError where nothing was merged.
    """
    merges, wrong = of_kind(records, "merge"), of_kind(records, "error")
    if not merges:
        raise ValueError("no record of a merge by an estimate: run configs/curvature.yaml first")
    names = list(dict.fromkeys(record["estimate"] for record in merges))
    parts = set(merges[0]["metrics"]) - {"macro", "per_example", "tasks"}
    figure, panels = plt.subplots(
        1, 3, figsize=(7.0, 1.1 + 0.24 * len(names)), sharey=True, layout="constrained"
    )
    columns = (
        ("correlation of log F with\nthe exact GGN's", wrong, lambda record: record["log_correlation"]),
        (
            f"seconds for the base\nand {len(parts)} tasks",
            merges,
            lambda record: record["estimate_seconds"] or None,
        ),
        ("merge: accuracy on\nthe tasks (%)", merges, lambda r: 100 * r["metrics"]["macro"]["accuracy"]),
    )
    for axes, (title, rows, value) in zip(panels, columns, strict=True):
        for place, estimate in enumerate(names):
            by_seed: dict[int, list[float]] = {}
            for record in (record for record in rows if record["estimate"] == estimate):
                if (number := value(record)) is not None:
                    by_seed.setdefault(record["seed"], []).append(number)
            points = [number for own in by_seed.values() for number in own]
            if points:
                axes.plot(points, [place] * len(points), "o", color=COLOURS[6], markersize=3.5)
                axes.plot([fmean(points)], [place], "|", color=COLOURS[0], markersize=11, markeredgewidth=1.6)
            if len(by_seed) > 1:
                mean, half = t_interval([fmean(own) for own in by_seed.values()])
                axes.plot([mean - half, mean + half], [place] * 2, color=COLOURS[0], linewidth=0.8)
        axes.set_xlabel(title)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    plain_log(panels[1].xaxis)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    caption(
        figure,
        "numbers: examples per model; Monte-Carlo Fisher, one sampled label each, unless said otherwise\n"
        "dots: a seed each (on the left a seed and model), black bars: their mean with its 95 % interval over seeds (Student's t)",
    )
    return save(figure, folder, name)
