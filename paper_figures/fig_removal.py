"""Figure: what removal costs. Toxicity of continuations (or what is left of the removed text) against perplexity of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from experiments.removal.report import spread
from paper_figures.style import caption, look, plain_log, save

FAR = 30  # times the lowest perplexity: what lies beyond is drawn at the edge, with its number


def draw(records: Sequence[Record], folder: Path, name: str = "fig_removal") -> list[Path]:
    """One curve a method from the unedited model on, one point an alpha, means over seeds.

    With prompts, one panel a list of prompts: toxicity (down and to the left is better), whiskers the bootstrap interval over
    prompts, or the range of several seeds. Without, one panel: how much less likely the removed text is than the kept one, in nats a token (up
    is better). Raises ValueError where no record holds a point.
    """
    points = of_kind(records, "point")
    if not points:
        raise ValueError("no record holds a point of a path: run a removal config first")
    lists = sorted(key.removeprefix("refused_") for key in points[0]["metrics"] if key.startswith("refused_"))
    quantities = [f"toxicity_{prompts}" for prompts in lists] or ["perplexity_remove"]
    methods = [label for label in dict.fromkeys(point["label"] for point in points) if label != "base"]
    star = {
        "color": "black",
        "marker": "*",
        "markerfacecolor": "white",
        "markersize": 10,
        "linestyle": "none",
    }
    styles = look(methods) | {"base": star}
    edge = FAR * min(point["metrics"]["perplexity_keep"] for point in points)
    figure, panels = plt.subplots(
        1, len(quantities), figsize=(2.0 + 2.9 * len(quantities), 3.0), squeeze=False, layout="constrained"
    )
    for axes, quantity in zip(panels[0], quantities, strict=True):
        for label, style in styles.items():
            path = curve(points, label, quantity)
            if quantity == "perplexity_remove":  # a difference of losses: log perplexity is nats a token
                path = [(alpha, x, *(log(y / x) for y in ys)) for alpha, x, *ys in path]
            own = [index for index, p in enumerate(path) if p[0] or label == "base"]
            alphas = ", ".join(f"{path[index][0]:g}" for index in own)
            axes.plot(
                [min(p[1], edge) for p in path],
                [p[2] for p in path],
                label="unedited model" if label == "base" else f"{label}, $\\alpha$ = {alphas}",
                linewidth=1,
                markevery=own,
                **{"markersize": 5, **style},
            )
            for _, x, y, low, high in (path[index] for index in own):
                if x > edge:
                    axes.text(edge, y, f"outside, at {x:.0f} →  ", ha="right", va="center", fontsize=7)
                else:
                    axes.vlines(x, low, high, color=style["color"], linewidth=0.6, alpha=0.6)
        plain_log(axes.xaxis)
        grey = {"color": "#777777", "linewidth": 0.8}
        if lists:
            seeds = len({point["seed"] for point in points})
            label = f"range of {seeds} seeds" if seeds > 1 else f"95 % interval, seed {points[0]['seed']}"
            axes.plot([], [], "|", markersize=12, label=label, **grey)
        else:
            for _, _, y, *_ in path:  # of the unedited model, the last drawn
                axes.axhline(y, linestyle="--", label="both equally less likely", **grey)
        axes.set_xlabel("perplexity of text to keep")
        axes.set_ylabel(_title(quantity, str(points[0]["metrics"]["scorer"])))
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, labelspacing=0.8)
    caption(figure, "the values of $\\alpha$ are those of a curve's marks, in order from the star on")
    return save(figure, folder, name)


def curve(
    points: Sequence[Record], label: str, quantity: str
) -> list[tuple[float, float, float, float, float]]:
    """(alpha, perplexity to keep, quantity, low, high) along one method's path, the unchanged model first.

    Points at which no number was measured are left out.
    """
    found = []
    alphas = sorted({0.0, *(point["alpha"] for point in points if point["label"] == label)})
    for alpha in alphas:
        same = [p for p in points if p["alpha"] == alpha and p["label"] == (label if alpha else "base")]
        numbers = [p["metrics"].get(quantity) for p in same]
        if same and all(number is not None for number in numbers):
            y = fmean(numbers)
            low, high = spread(same, quantity) or (y, y)
            found.append((alpha, fmean(p["metrics"]["perplexity_keep"] for p in same), y, low, high))
    return found


def _title(quantity: str, scorer: str) -> str:
    if quantity == "perplexity_remove":
        return "log perplexity: removed text\nminus kept text (nats / token)"
    return f"toxicity ({scorer}), {quantity.removeprefix('toxicity_')} prompts"
