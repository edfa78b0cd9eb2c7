"""Figure: the loss on the straight line between two networks from scratch, unaligned and aligned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.records import Record, of_kind
from paper_figures.style import caption, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_barriers") -> list[Path]:
    """A panel per kind of network: the mean over seeds of every line of losses, by method.

    Raises ValueError where no barrier was measured.
    """
    found = of_kind(records, "barriers")
    if not found:
        raise ValueError("no record of barriers: run an alignment config first")
    networks = list(dict.fromkeys(record["network"] for record in found))
    figure, panels = plt.subplots(
        1, len(networks), figsize=(3.0 * len(networks), 2.7), squeeze=False, layout="constrained"
    )
    for axes, network in zip(panels[0], networks, strict=True):
        own = [record["barriers"] for record in found if record["network"] == network]
        for method in own[0]:
            losses = np.mean([record[method]["losses"] for record in own], axis=0)
            axes.plot(own[0][method]["shares"], losses, marker="o", markersize=2.5, label=method)
        axes.set_title(f"{network} ({len(own)} seeds)")
        axes.set_xlabel("share of the second network")
    panels[0][0].set_ylabel("loss (nats per test example)")
    panels[0][0].legend(frameon=False, fontsize=7)
    caption(figure, "mean over seeds; BatchNorm statistics measured at every point")
    return save(figure, folder, name)
