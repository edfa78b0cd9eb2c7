"""Figure: what removal costs. Toxicity of continuations (or what is left of the removed text) against perplexity of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind, seeds_of, spread
from paper_figures.style import caption, look, plain_log, save

FAR = 30  # times the lowest perplexity: what lies beyond is drawn at the edge, with its number


def draw(records: Sequence[Record], folder: Path, name: str = "fig_removal") -> list[Path]:
    """One curve a method from the unedited model on, one point an alpha, means over seeds.

    With prompts, one panel a list of prompts: toxicity (down and to the left is better). Without, one panel: how much less
    likely the removed text is than the kept one, in nats a token (up is better). Whiskers: the range of several seeds, both
    ways, else of toxicity the bootstrap interval over prompts. Raises ValueError where no record holds a point.
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
    seeds = len(seeds_of(points))
    edge = FAR * min(point["metrics"]["perplexity_keep"] for point in points)
    figure, panels = plt.subplots(
        1, len(quantities), figsize=(2.0 + 2.9 * len(quantities), 3.0), squeeze=False, layout="constrained"
    )
    for axes, quantity in zip(panels[0], quantities, strict=True):
        for label, style in styles.items():
            path = curve(points, label, quantity)
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
            for alpha, x, y, low, high in (path[index] for index in own):
                if x > edge:
                    axes.text(edge, y, f"outside, at {x:.0f} →  ", ha="right", va="center", fontsize=7)
                else:
                    thin = {"color": style["color"], "linewidth": 0.6, "alpha": 0.6}
                    axes.vlines(x, low, high, **thin)
                    axes.hlines(y, *_reach(points, label, alpha), **thin)
        plain_log(axes.xaxis)
        grey = {"color": "#777777", "linewidth": 0.8}
        interval = "95 % interval over prompts"
        whiskers = [f"range of {seeds} seeds"] if seeds > 1 else []
        if lists:
            whiskers = [f"{whiskers[0]} (unedited: {interval})" if whiskers else f"{interval}, one seed"]
        for label in whiskers:
            axes.plot([], [], "|", markersize=12, label=label, **grey)
        if not lists:
            for _, _, y, *_ in path:  # of the unedited model, the last drawn
                axes.axhline(y, linestyle="--", label="both equally less likely", **grey)
        axes.set_xlabel("perplexity of text to keep")
        axes.set_ylabel(_title(quantity, str(points[0]["metrics"]["scorer"])))
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, labelspacing=0.8)
    note = (
        "; a mark is the mean of the seeds at one $\\alpha$, whose perplexities differ" if seeds > 1 else ""
    )
    caption(figure, f"the values of $\\alpha$ are those of a curve's marks, in order from the star on{note}")
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
        numbers = [_number(p["metrics"], quantity) for p in same]
        known = [number for number in numbers if number is not None]
        if not same or len(known) < len(same):
            continue
        whole = (min(known), max(known))
        low, high = whole if quantity == "perplexity_remove" else spread(same, quantity) or whole
        x = fmean(p["metrics"]["perplexity_keep"] for p in same)
        found.append((alpha, x, fmean(known), low, high))
    return found


def _reach(points: Sequence[Record], label: str, alpha: float) -> tuple[float, float]:
    """Least and largest perplexity of what must stay, over the seeds of one point."""
    same = [p["metrics"]["perplexity_keep"] for p in points if (p["label"], p["alpha"]) == (label, alpha)]
    return min(same), max(same)


def _number(metrics: Mapping[str, Any], quantity: str) -> float | None:
    """What is drawn of a point; of the removed text the difference of losses, log perplexity being nats a token."""
    if quantity == "perplexity_remove":
        return log(metrics[quantity] / metrics["perplexity_keep"])
    return metrics.get(quantity)


def _title(quantity: str, scorer: str) -> str:
    if quantity == "perplexity_remove":
        return "log perplexity: removed text\nminus kept text (nats / token)"
    return f"toxicity ({scorer}), {quantity.removeprefix('toxicity_')} prompts"
