"""Figure: what removal costs. Toxicity of continuations (or what is left of the removed text) against perplexity of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import look, plain_log, save


def draw(records: Sequence[Record], folder: Path, name: str = "fig_removal") -> list[Path]:
    """One curve a method from the unchanged model on, one point an alpha, means over seeds; down and to the left is better.

    With prompts, one panel a list of prompts, whiskers the bootstrap interval of the first seed; without, one panel with
    the perplexity of the removed text (up is better there). Raises ValueError where no record holds a point.
    """
    points = of_kind(records, "point")
    if not points:
        raise ValueError("no record holds a point of a path: run a removal config first")
    lists = sorted(key.removeprefix("refused_") for key in points[0]["metrics"] if key.startswith("refused_"))
    quantities = [f"toxicity_{prompts}" for prompts in lists] or ["perplexity_remove"]
    labels = [label for label in dict.fromkeys(point["label"] for point in points) if label != "base"]
    styles = look(labels)
    figure, panels = plt.subplots(1, len(quantities), figsize=(3.6 * len(quantities), 3.0), squeeze=False)
    for axes, quantity in zip(panels[0], quantities, strict=True):
        for label in labels:
            path = curve(points, label, quantity)
            axes.plot(
                [p[1] for p in path],
                [p[2] for p in path],
                label=label,
                markersize=5,
                linewidth=1,
                **styles[label],
            )
            for alpha, x, y, low, high in path:
                axes.vlines(x, low, high, color=styles[label]["color"], linewidth=0.6, alpha=0.6)
                if alpha:
                    axes.annotate(f"{alpha:g}", (x, y), (3, 3), textcoords="offset points", fontsize=6)
        plain_log(axes.xaxis)
        if quantity == "perplexity_remove":
            plain_log(axes.yaxis)
            axes.axline((1, 1), (10, 10), color="#999999", linewidth=0.8, linestyle="--")  # nothing selective
        axes.set_xlabel("perplexity of text to keep")
        axes.set_ylabel(_title(quantity, str(points[0]["metrics"]["scorer"])))
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return save(figure, folder, name)


def curve(
    points: Sequence[Record], label: str, quantity: str
) -> list[tuple[float, float, float, float, float]]:
    """(alpha, perplexity to keep, quantity, low, high) along one method's path, the unchanged model first.

    Points at which no number was measured are left out.
    """
    found = []
    alphas = [0.0, *sorted({point["alpha"] for point in points if point["label"] == label})]
    for alpha in alphas:
        same = [p for p in points if p["alpha"] == alpha and p["label"] == (label if alpha else "base")]
        numbers = [p["metrics"].get(quantity) for p in same]
        if same and all(number is not None for number in numbers):
            y = fmean(numbers)
            _, low, high = same[0]["intervals"].get(quantity, (y, y, y))
            found.append((alpha, fmean(p["metrics"]["perplexity_keep"] for p in same), y, low, high))
    return found


def _title(quantity: str, scorer: str) -> str:
    if quantity == "perplexity_remove":
        return "perplexity of text to remove"
    return f"toxicity ({scorer}), {quantity.removeprefix('toxicity_')} prompts"
