"""Drawings of the report as inline SVG, by matplotlib: small line charts, heat maps, matrices. No scripts, no network."""

from __future__ import annotations

import io
import math
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#c8553d", "#5b8c3e", "#7d4f9e")
INK, MUTED, RULE = "#1d2733", "#566474", "#e4e8ed"
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5, "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "text.color": INK, "axes.titlecolor": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": "#97a3b0", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": RULE,
    "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
Line = Sequence[tuple[float, float]]


def line_charts(
    panels: Mapping[str, Mapping[str, Line]],
    x_label: str,
    y_label: str,
    *,
    dots: Sequence[str] = (),
    end: float = 0.0,
) -> str:
    """One small chart a panel (title -> series -> points), three in a row, with one legend.

    Args:
        panels: points that are not finite are left out.
        x_label: of every chart.
        y_label: of every chart.
        dots: series that are drawn as dots alone.
        end: what every x axis covers in any case, so that the charts can be compared.
    """
    with _styled():
        rows, columns = math.ceil(len(panels) / 3), min(3, len(panels))
        figure, axes = _grid(rows, columns, 3.3 * columns, 2.3 * rows + 0.35)
        for ax, (title, lines) in zip(axes, panels.items(), strict=False):
            for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
                kept = [point for point in points if all(map(math.isfinite, point))]
                xs, ys = [x for x, _ in kept], [y for _, y in kept]
                if name in dots:
                    ax.plot(xs, ys, color=colour, label=name, ls="", marker="o", mfc="white", ms=4.5)
                else:
                    ax.plot(xs, ys, color=colour, label=name, lw=1.6)
            ax.axhline(0, color="#97a3b0", lw=0.8)
            ax.set(title=shortened(title, 34), xlabel=x_label, ylabel=y_label)
            ax.set_xlim(0, max([end, *(x for points in lines.values() for x, _ in points)]) * 1.02)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return _svg(figure)


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """One cell per row and column; darker is more. Each row has its own scale, from 0 to its largest value, written beside it."""
    with _styled():
        figure, (ax,) = _grid(1, 1, 10, 0.32 * len(rows) + 1.5)
        largest = [max((v for v in row if math.isfinite(v)), default=0.0) for row in values]
        shares = [
            [math.sqrt(max(0.0, v) / top) if top > 0 else 0.0 for v in row]
            for row, top in zip(values, largest, strict=True)
        ]
        ax.pcolormesh(
            shares, cmap=_colours("#f4f7f9", "#08405c"), vmin=0, vmax=1, edgecolors="white", linewidth=0.6
        )
        if len(columns) <= 14:
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    ink = "white" if shares[i][j] > 0.6 else INK
                    ax.text(
                        j + 0.5, i + 0.5, number(value), ha="center", va="center", color=ink, fontsize=7.5
                    )
        ax.set_xticks(
            [j + 0.5 for j in range(len(columns))],
            [shortened(c, 24) for c in columns],
            rotation=45,
            ha="right",
        )
        ax.set_yticks([i + 0.5 for i in range(len(rows))], [shortened(r, 26) for r in rows])
        for i, top in enumerate(largest):
            ax.text(len(columns) + 0.2, i + 0.5, f"max {number(top)}", va="center", color=MUTED)
        _bare(ax)
        return _svg(figure)


def matrices(
    names: Sequence[str], panels: Mapping[str, tuple[Sequence[Sequence[float]], float, float, float]]
) -> str:
    """Squares of numbers between tasks, two in a row: title -> (values, low, middle, high), blue over white to rust."""
    from matplotlib.colors import TwoSlopeNorm

    size = max(2.6, min(5.0, 0.62 * len(names) + 1.1))
    with _styled():
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure, axes = _grid(rows, columns, 5 * columns, size * rows)
        labels = [shortened(name, 18) for name in names]
        for ax, (title, (values, low, middle, high)) in zip(axes, panels.items(), strict=False):
            own = [
                [math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(values)
            ]
            norm = TwoSlopeNorm(middle, low, high)
            ax.set_facecolor("#f2f4f6")
            ax.pcolormesh(
                own,
                cmap=_colours("#5b9dbd", "#ffffff", "#d9806b"),
                norm=norm,
                edgecolors="white",
                linewidth=0.8,
            )
            if len(names) <= 12:
                for i, row in enumerate(own):
                    for j, value in enumerate(row):
                        if math.isfinite(value):
                            ax.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8)
            ticks = [i + 0.5 for i in range(len(names))]
            ax.set_xticks(ticks, labels, rotation=40, ha="right")
            ax.set_yticks(ticks, labels)
            ax.set_aspect("equal")
            ax.set_title(textwrap.fill(title, 36), loc="left")
            _bare(ax)
        return _svg(figure)


def number(value: float | str) -> str:
    """A number with three figures and a real minus sign."""
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "\u2212")


def shortened(text: str, length: int) -> str:
    """At most `length` characters; the end is kept, where names differ."""
    return text if len(text) <= length else "\u2026" + text[1 - length :]


def _styled() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with rows x columns axes, in reading order (inches)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _bare(ax: Axes) -> None:
    """First row on top, no grid, no frame, no tick marks."""
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _colours(*stops: str) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", stops)


def _svg(figure: Figure) -> str:
    """The drawing as an svg element whose ids are its own: a page may hold several."""
    for ax in figure.axes:
        if not ax.has_data():
            ax.set_axis_off()
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("\n", " ")
    mark = f"drawing-{zlib.crc32(text.encode()):x}-"
    for reference in (' id="', "url(#", 'href="#'):
        text = text.replace(reference, reference + mark)
    return text
