"""Figure: accuracy of a fine-tune of which a share of the task vector was dropped, with and without rescaling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import caption, look, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_redundancy") -> list[Path]:
    """A panel per source of models, a colour per task; solid: the rest divided by 1 - p, dashed: left as it was.

    Raises ValueError where no curve was measured.
    """
    points = of_kind(records, "redundancy")
    if not points:
        raise ValueError("no record of a dropped task vector: run a redundancy config first")
    sources = list(dict.fromkeys(record["source"] for record in points))
    figure, panels = plt.subplots(
        1, len(sources), figsize=(3.6 * len(sources), 2.9), squeeze=False, layout="constrained"
    )
    for axes, source in zip(panels[0], sources, strict=True):
        own = [record for record in points if record["source"] == source]
        tasks = list(dict.fromkeys(record["task"] for record in own))
        shares = sorted({record["dropped"] for record in own})
        for task, style in look(tasks).items():
            for kind, dashes in (("rescaled", "-"), ("plain", "--")):
                found = [
                    [100 * r[kind] for r in own if (r["task"], r["dropped"]) == (task, share)]
                    for share in shares
                ]
                label, places = task if kind == "rescaled" else None, range(len(shares))
                axes.plot(
                    places, list(map(fmean, found)), linestyle=dashes, markersize=4, label=label, **style
                )
                low, high = ([end(values) for values in found] for end in (min, max))
                axes.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set_xticks(range(len(shares)), [f"{share:g}" for share in shares], fontsize=7)
        axes.set_xlabel("dropped share p of the task vector")
        axes.set_title(source)
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("accuracy on the own task (%)\nsolid: rescaled, dashed: not")
    caption(figure, "mean over seeds, bands: smallest to largest")
    return save(figure, folder, name)
