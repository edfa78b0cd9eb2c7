"""Drawings of the report as inline SVG: line charts, heat maps, matrices. Text only, no scripts, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Dark enough on white, told apart in print by dash as well as by colour.
COLOURS = ("#0b6e99", "#c8553d", "#5b8c3e", "#7d4f9e", "#b8860b", "#3c4f76", "#a23b72", "#4a7c7c")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")
INK, MUTED, RULE = "#1d2733", "#667484", "#dfe4ea"


@dataclass(frozen=True)
class Series:
    """One line of a chart: points are drawn as a line, as dots, or as both."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    dots: bool = False
    colour: int = 0


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    width: int = 304,
    height: int = 210,
    title: str = "",
    x_range: Sequence[float] = (),
) -> str:
    """Lines and dots over two axes with round ticks; points that are not finite are left out.

    `x_range` are values that the x axis covers in any case, so that charts side by side can be compared.
    """
    points = [(x, y) for s in series for x, y in s.points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ""
    left, right, top, bottom = 52, 10, 26 if title else 10, 38
    xs, ys = ticks([*(x for x, _ in points), *x_range]), ticks([*(y for _, y in points), 0.0])
    x0, x1, y0, y1 = xs[0], xs[-1], ys[0], ys[-1]

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = [_open_svg(width, height, title or f"{y_label} against {x_label}")]
    if title:
        parts.append(f'<text x="{left}" y="15" class="t">{escape(title)}</text>')
    for y in ys:
        heavy = ' class="axis"' if y == 0 else ""
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"{heavy}/>')
        parts.append(f'<text x="{left - 6}" y="{py(y) + 3.5:.1f}" text-anchor="end">{number(y)}</text>')
    for x in xs:
        parts.append(
            f'<text x="{px(x):.1f}" y="{height - bottom + 15}" text-anchor="middle">{number(x)}</text>'
        )
    parts.append(
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text transform="translate(10 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for s in series:
        colour, dash = COLOURS[s.colour % len(COLOURS)], DASHES[s.colour % len(DASHES)]
        kept = [(px(x), py(y)) for x, y in s.points if math.isfinite(x) and math.isfinite(y)]
        if s.line and len(kept) > 1:
            path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in kept)
            parts.append(
                f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"><title>{escape(s.name)}</title></path>'
            )
        if s.dots:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="#fff" stroke="{colour}" stroke-width="2"><title>{escape(s.name)}</title></circle>'
                for x, y in kept
            ]
    return "".join([*parts, "</svg>"])


def legend(
    names: Sequence[str], colours: Sequence[int] | None = None, dots: Sequence[bool] | None = None
) -> str:
    """What each line and dot means, as a row of HTML."""
    items = []
    for index, name in enumerate(names):
        colour = index if colours is None else colours[index]
        c, dash = COLOURS[colour % len(COLOURS)], DASHES[colour % len(DASHES)]
        mark = (
            f'<circle cx="13" cy="6" r="3.6" fill="#fff" stroke="{c}" stroke-width="2"/>'
            if dots and dots[index]
            else f'<line x1="0" x2="26" y1="6" y2="6" style="stroke:{c};stroke-width:2;stroke-dasharray:{dash or "none"}"/>'
        )
        items.append(
            f'<span><svg width="26" height="12" aria-hidden="true">{mark}</svg> {escape(name)}</span>'
        )
    return f'<div class="legend">{"".join(items)}</div>'


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *, unit: str = ""
) -> str:
    """One cell per row and column; darker is more, on a scale from 0 to the largest finite value of each row.

    Rows are scaled one by one (the scale is written beside each), so that a row of small numbers can be read as well.
    """
    label = min(210, 16 + 8 * max((len(r) for r in rows), default=0))
    slant = 16 + int(5.2 * max((len(c) for c in columns), default=0))
    cell = max(9, min(72, 740 // max(1, len(columns))))
    high = 26
    width, height = label + cell * len(columns) + 110, slant + high * len(rows) + 6
    parts = [_open_svg(width, height, f"heat map {unit}", fixed=False)]
    for j, column in enumerate(columns):
        x = label + j * cell + cell / 2 + 3
        parts.append(f'<text transform="translate({x:.1f} {slant - 5}) rotate(-48)">{escape(column)}</text>')
    for i, row in enumerate(rows):
        y = slant + i * high
        finite = [v for v in values[i] if math.isfinite(v)]
        largest = max(finite, default=0.0)
        parts.append(
            f'<text x="{label - 7}" y="{y + high / 2 + 4:.0f}" text-anchor="end" class="t">{escape(clip(row, 26))}</text>'
        )
        for j, value in enumerate(values[i]):
            share = value / largest if largest > 0 and math.isfinite(value) else 0.0
            fill = sequential(share) if math.isfinite(value) else "#e2b7ae"
            x = label + j * cell
            tip = f"{row}, {columns[j]}: {number(value)} {unit}".strip()
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{high - 2}" fill="{fill}"><title>{escape(tip)}</title></rect>'
            )
        parts.append(
            f'<text x="{label + cell * len(columns) + 6}" y="{y + high / 2 + 4:.0f}">max {number(largest)}</text>'
        )
    return "".join([*parts, "</svg>"])


def matrix(
    names: Sequence[str], values: Sequence[Sequence[float]], *, low: float, middle: float, high: float
) -> str:
    """A square of numbers between tasks, coloured from `low` (blue) over `middle` (white) to `high` (rust)."""
    label = min(150, 14 + 7 * max((len(n) for n in names), default=0))
    cell = 46 if len(names) <= 8 else max(16, 368 // len(names))
    slant = 12 + int(5 * max((len(n) for n in names), default=0))
    width, height = label + cell * len(names) + slant, slant + cell * len(names) + 4
    parts = [_open_svg(width, height, "matrix", fixed=True)]
    for i, name in enumerate(names):
        x, y = label + i * cell + cell / 2, slant + i * cell
        parts.append(
            f'<text transform="translate({x:.0f} {slant - 6}) rotate(-40)">{escape(clip(name, 20))}</text>'
        )
        parts.append(
            f'<text x="{label - 7}" y="{y + cell / 2 + 4:.0f}" text-anchor="end">{escape(clip(name, 20))}</text>'
        )
        for j, value in enumerate(values[i]):
            fill = "#f2f4f6" if i == j else diverging(value, low, middle, high)
            told = f"{value:.3f}" if math.isfinite(value) else "not known"
            parts.append(
                f'<rect x="{label + j * cell}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{fill}"><title>{escape(names[i])}, {escape(names[j])}: {told}</title></rect>'
            )
            if cell >= 30 and i != j and math.isfinite(value):
                parts.append(
                    f'<text x="{label + j * cell + cell / 2:.0f}" y="{y + cell / 2 + 4:.0f}" text-anchor="middle" class="v">{value:.2f}</text>'
                )
    return "".join([*parts, "</svg>"])


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below the smallest value to above the largest."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number with three figures and a real minus sign."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "\u2212")
    return (
        f"{value:.3g}".replace("-", "\u2212") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "\u2212")
    )


def sequential(share: float) -> str:
    """White to deep blue for 0 .. 1, with a square root so that small values can be seen."""
    return mix("#f4f7f9", "#08405c", math.sqrt(min(1.0, max(0.0, share))))


def diverging(value: float, low: float, middle: float, high: float) -> str:
    """Blue below the middle, rust above."""
    if not math.isfinite(value):
        return "#dddddd"
    if value < middle:
        return mix("#ffffff", "#5b9dbd", min(1.0, (middle - value) / max(1e-12, middle - low)))
    return mix("#ffffff", "#d9806b", min(1.0, (value - middle) / max(1e-12, high - middle)))


def mix(start: str, end: str, share: float) -> str:
    """A colour between two, as #rrggbb."""
    a, b = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (start, end))
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(a, b, strict=True))


def clip(text: str, length: int) -> str:
    """At most `length` characters; the end is kept, where names differ."""
    return text if len(text) <= length else "\u2026" + text[-length + 1 :]


def _open_svg(width: float, height: float, label: str, fixed: bool = True) -> str:
    size = (
        f'width="{width:.0f}" height="{height:.0f}"'
        if fixed
        else f'style="width:100%;max-width:{width:.0f}px"'
    )
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" {size} role="img" aria-label="{escape(label)}">'
