"""Figure: cosines between task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import caption, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_cosines") -> list[Path]:
    """A matrix per source of models, mean over seeds, the numbers written in.

    Raises ValueError where no cosine was measured.
    """
    found = of_kind(records, "cosines")
    if not found:
        raise ValueError("no record of cosines: run a redundancy config first")
    sources = list(dict.fromkeys(record["source"] for record in found))
    figure, panels = plt.subplots(
        1, len(sources), figsize=(2.9 * len(sources), 2.7), squeeze=False, layout="constrained"
    )
    for axes, source in zip(panels[0], sources, strict=True):
        own = [record for record in found if record["source"] == source]
        tasks = own[0]["tasks"]
        matrix = [
            [fmean(record["cosines"][i][j] for record in own) for j in range(len(tasks))]
            for i in range(len(tasks))
        ]
        axes.imshow(matrix, cmap="Greys", vmin=0, vmax=1)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                colour = "white" if value > 0.5 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
                same = [record["cosines"][i][j] for record in own]
                if len(own) > 1 and i != j:
                    told = f"{min(same):.2f} to {max(same):.2f}"
                    axes.text(j, i + 0.3, told, ha="center", va="center", color=colour, fontsize=6)
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_title(f"{source}: cosines of task vectors")
    caption(figure, "mean over seeds, below it smallest to largest")
    return save(figure, folder, name)
