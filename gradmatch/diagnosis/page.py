"""The report as one self-contained HTML page: no script, no network, readable on screen and in print. The text is page.html's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmatch.diagnosis.charts import heat_map, line_charts, matrices, number
from gradmatch.diagnosis.report import SCALES

MOST_COLUMNS = 60  # of a heat map; more layers are told in bins
MOST_CHARTS = 12
RANKS = ("broken values", "not what it claims to be", "a choice", "what the merge does")


def page(report: Mapping[str, Any]) -> str:
    """The whole page, from the values of `gradmatch.diagnosis.report.report_of`."""
    return _rendered(
        "page.html", report, curves=curves, mismatch=mismatch, vectors=vectors, redundancy=redundancy
    )


def summary(report: Mapping[str, Any]) -> str:
    """Verdict, causes and losses as a piece of HTML, for a notebook."""
    return _rendered("summary.html", report)


def _rendered(name: str, report: Mapping[str, Any], **drawings: Any) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    finite = [cause["cost"] for cause in report["causes"] if isinstance(cause["cost"], float)]
    drawn = {key: draw(report) for key, draw in drawings.items()}
    return environment.get_template(name).render(
        r=report,
        ranks=RANKS,
        largest=max(finite, default=0.0),
        losses={(row["model"], row["task"]): row for row in report["losses"]},
        forecasts={row["task"]: row for row in report["forecasts"]},
        **drawn,
    )


def curves(report: Mapping[str, Any]) -> str:
    """Forecast and measured loss along the line from the base through the merge, one small chart a task."""
    panels = {}
    for row in report["forecasts"][:MOST_CHARTS]:
        top = max([y for _, y in _finite(row["measured_curve"])], default=math.inf)
        near = [
            (x, y) for x, y in _finite(row["curve"]) if y <= 2.5 * max(top, 0.05)
        ]  # a parabola far out would flatten the rest
        panels[row["task"]] = {"forecast": near, "measured": _finite(row["measured_curve"])}
    if not panels:
        return ""
    return line_charts(
        panels, "share of the merge's update", "rise, nats per example", dots=["measured"], end=SCALES[-1]
    )


def mismatch(report: Mapping[str, Any]) -> str:
    """Heat map task x layer of the gradient mismatch."""
    found = report["mismatch"]
    if found is None:
        return ""
    columns = list(next(iter(found["layers"].values())))
    rows = [[float(layers.get(c, 0.0)) for c in columns] for layers in found["layers"].values()]
    binned, values = bins(columns, rows)
    return heat_map(list(found["layers"]), short_names(binned), values)


def vectors(report: Mapping[str, Any]) -> dict[str, str]:
    """Task vectors: cosines, sign conflicts and curvatures of pairs, and where each task moved the weights."""
    names = [task["name"] for task in report["tasks"]]
    drawn = {"pairs": "", "layers": ""}
    if len(names) > 1:
        panels = {
            "Cosine: 0 is unrelated, negative pulls apart": (report["cosines"], -1.0, 0.0, 1.0),
            "Weights moved in opposite directions: 0.5 is chance": (report["conflicts"], 0.0, 0.5, 1.0),
            "The same, counted by curvature": (
                square(names, report["weighted_conflicts"]),
                0.0,
                0.5,
                1.0,
            ),
            "Overlap of curvatures: 1 where the same weights matter": (
                square(names, report["overlaps"]),
                -1.0,
                0.0,
                1.0,
            ),
        }
        known = {
            title: panel
            for title, panel in panels.items()
            if any(map(math.isfinite, itertools.chain(*panel[0])))
        }
        drawn["pairs"] = matrices(names, known)
    if report["layers"]:
        columns = [layer["layer"] for layer in report["layers"]]
        shares = [[layer["shares"][i] for layer in report["layers"]] for i in range(len(names))]
        binned, summed = bins(columns, shares, total=True)
        drawn["layers"] = heat_map(names, short_names(binned), summed)
    return drawn


def redundancy(report: Mapping[str, Any]) -> str:
    """Loss against the share of the task vector that is dropped."""
    panels = {}
    for task, curve in list(report["redundancy"].items())[:MOST_CHARTS]:
        top = 3 * max((plain for _, plain in _finite([(d, plain) for d, plain, _ in curve])), default=0.0)
        panels[task] = {
            "the rest as it is": _finite([(d, plain) for d, plain, _ in curve]),
            # what explodes when rescaled leaves the chart
            "rescaled by 1/(1-p)": [
                (d, y) for d, y in _finite([(d, scaled) for d, _, scaled in curve]) if y <= top
            ],
        }
    return line_charts(panels, "share dropped", "nats per example") if panels else ""


def square(names: Sequence[str], pairs: Mapping[str, float]) -> list[list[float]]:
    """'a | b' -> value as a symmetric matrix; NaN where it is not known."""
    return [[float(pairs.get(f"{a} | {b}", pairs.get(f"{b} | {a}", math.nan))) for b in names] for a in names]


def bins(
    columns: Sequence[str], values: Sequence[Sequence[float]], *, total: bool = False
) -> tuple[list[str], list[list[float]]]:
    """At most MOST_COLUMNS columns: neighbours are put together, by their root of summed squares (or their sum)."""
    if len(columns) <= MOST_COLUMNS:
        return list(columns), [list(row) for row in values]
    edges = [round(i * len(columns) / MOST_COLUMNS) for i in range(MOST_COLUMNS + 1)]
    spans = list(itertools.pairwise(edges))
    names = [columns[a] if b - a == 1 else f"{columns[a]} +{b - a - 1}" for a, b in spans]

    def joined(part: Sequence[float]) -> float:
        return sum(part) if total else math.sqrt(sum(v * v for v in part))

    return names, [[joined(row[a:b]) for a, b in spans] for row in values]


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without what all of them share at the front: bert.encoder.layer.3 -> layer.3."""
    return [".".join(name.split(".")[-2:]) if name.count(".") > 1 else name for name in names]


def _finite(points: Sequence[Sequence[float | str]]) -> list[tuple[float, float]]:
    """Points without those that are not finite."""
    numbers = [
        (float(x), float(y)) for x, y in points
    ]  # those of a report that are not finite stand there as text
    return [(x, y) for x, y in numbers if math.isfinite(x) and math.isfinite(y)]
