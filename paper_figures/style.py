"""One look for all figures: readable in print, in grey (markers and dashes tell apart, not hue alone), and in colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "gradmatch",  # the same bytes for the same records
    }
)
# From dark to light in grey too (Okabe and Ito's colours, ordered by luminance), each with its own marker.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def look(names: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each name, by its position; from the ninth on, the markers are hollow."""
    return {
        name: {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        | ({"markerfacecolor": "none"} if index >= len(COLOURS) else {})
        for index, name in enumerate(names)
    }


def plain_log(axis: Any) -> None:
    """A logarithmic axis with plain numbers: at 1, 1.5, 2, 3, 5 and 7 of each decade, fewer of a long axis, equal steps on a short one."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 20 else (1.0, 3.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(AutoLocator() if high / low < 3 else LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


BARS = {"elinewidth": 0.7, "ecolor": "#bbbbbb", "zorder": 1.5}  # of an interval: behind its mark
BINOMIAL = "95 % over the test examples (binomial)"


def half_interval(metrics: Mapping[str, Any], domains: Iterable[str]) -> float:
    """Half the 95 % interval of a mean error over the test examples: 1.96 sqrt(sum_d p_d (1 - p_d) / n_d) / D, in per cent."""
    own = [metrics[name] for name in domains]
    variance = sum(part["accuracy"] * (1 - part["accuracy"]) / part["n"] for part in own)
    return 196 * float(variance) ** 0.5 / max(1, len(own))


def caption(figure: Any, text: str) -> None:
    """A small line below the panels: what marks and whiskers are."""
    figure.supxlabel(text, fontsize=7, color="#444444")


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write `name` as PNG (200 dpi) and SVG into a folder; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=200, bbox_inches="tight")
    figure.savefig(paths[1], bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return paths
