"""Figure: accuracy of each merge over the weight alpha: how much the choice of alpha matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.records import Record, mean_over_seeds, of_kind
from paper_figures.style import look, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_alpha") -> list[Path]:
    """Mean accuracy on the tasks over alpha: a line per merge (mean over seeds), a band of one standard deviation.

    Draws nothing, and returns no path, where no merge was swept.
    """
    sweeps = of_kind(records, "sweep")
    if not sweeps:
        return []
    models = list(dict.fromkeys(record["model"] for record in sweeps))
    styles = look(models)
    figure, axes = plt.subplots(figsize=(4.2, 3.0))
    for index, model in enumerate(models):
        own = [record for record in sweeps if record["model"] == model]
        alphas = [point["alpha"] for point in own[0]["points"]]
        found = [mean_over_seeds(own, lambda record, i=i: accuracy(record, i)) for i in range(len(alphas))]
        curve = [value for value in found if value is not None]
        means, spread = [mean for mean, _ in curve], [deviation for _, deviation in curve]
        dashes = ("-", "--", "-.", ":")[index % 4]
        axes.plot(alphas, means, linestyle=dashes, markersize=4, label=model, **styles[model])
        if any(spread):
            low, high = ([m + sign * s for m, s in curve] for sign in (-1, 1))
            axes.fill_between(alphas, low, high, color=styles[model]["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel("weight $\\alpha$ of every task")
    axes.set_ylabel("accuracy on the tasks (%)")
    axes.legend()
    return save(figure, folder, name)


def accuracy(record: Record, index: int) -> float:
    """Mean accuracy on the tasks in per cent at the index-th alpha."""
    return 100 * float(record["points"][index]["metrics"]["tasks"]["accuracy"])
