"""The report as one self-contained HTML page: no script, no network, readable on screen and in print."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from gradmatch.diagnosis.charts import Series, heat_map, legend, line_chart, matrix, number
from gradmatch.diagnosis.report import SCALES, CauseReport, Report

MOST_COLUMNS = 60  # of a heat map; more layers are told in bins
RANKS = ("broken values", "not what it claims to be", "a choice")


def page(report: Report) -> str:
    """The whole page."""
    style = resources.files("gradmatch.diagnosis").joinpath("page.css.html").read_text(encoding="utf-8")
    sections = [
        causes(report),
        losses(report),
        curves(report),
        mismatch(report),
        vectors(report),
        redundancy(report),
        notes(report),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>Diagnosis of a merge</title>\n{style}</head>\n<body>\n<main>\n{header(report)}\n{body}\n"
        f"<footer>gradmatch {escape(report.gradmatch_version)}. Losses are in nats; the forecast is a second-order expansion of "
        "each task's loss at its fine-tune.</footer>\n</main>\n</body>\n</html>\n"
    )


def header(report: Report) -> str:
    """Verdict in a sentence, and what was merged."""
    verdict = escape(report.verdict)
    if report.causes:
        name = escape(report.causes[0].name.replace("_", " "))
        verdict = verdict.replace(name, f"<b>{name}</b>", 1)
    tasks = ", ".join(f"{escape(t.name)} &times; {number(t.weight)}" for t in report.tasks[:12])
    more = f" and {len(report.tasks) - 12} more" if len(report.tasks) > 12 else ""
    measured = {row.task for row in report.losses if row.model == "merged"}
    mark = "ill" if report.causes else "ok" if len(measured) == len(report.tasks) else "part"
    looked = "".join(
        f'<p class="sub"><b>{what}</b> {escape("; ".join(told))}.</p>'
        for what, told in (("Looked at", report.looked_at), ("Not looked at", report.not_looked_at))
        if told
    )
    return (
        f'<header><p class="kicker">Diagnosis of a merge</p><h1 class="{mark}">{verdict}</h1>'
        f'<p class="sub">{escape(report.method.replace("_", " "))} of {tasks}{more}</p>{looked}</header>'
    )


def causes(report: Report) -> str:
    """Numbered cards, each with a bar for its share of the largest cost."""
    if not report.causes:
        return ""
    finite = [c.cost for c in report.causes if c.cost is not None and math.isfinite(c.cost)]
    largest = max(finite, default=0.0)
    cards = "".join(_card(place, cause, largest) for place, cause in enumerate(report.causes, 1))
    return f"<section><h2>Why</h2><ol class=causes>{cards}</ol></section>"


def _card(place: int, cause: CauseReport, largest: float) -> str:
    if cause.cost is None:
        cost = '<span class="muted">cost not measured</span>'
    elif math.isinf(cause.cost):
        cost = "<b>the merge is useless</b>"
    else:
        share = 100 * cause.cost / largest if largest > 0 else 0
        cost = f'<b>{number(cause.cost)}</b> nats, {escape(cause.source)}<i class="bar"><i style="width:{share:.0f}%"></i></i>'
    return (
        f'<li><div class="place">{place}</div><div class="what"><h3>{escape(cause.name.replace("_", " "))}'
        f" <span>{escape(cause.subject)}</span></h3><p>{escape(cause.evidence)}.</p>"
        f'<p class="remedy"><b>Remedy</b> {escape(cause.remedy)}.</p></div>'
        f'<div class="cost"><span class="rank">{RANKS[cause.rank]}</span>{cost}</div></li>'
    )


def losses(report: Report) -> str:
    """Table of losses; the forecast and the best weights beside them."""
    nll = {(row.model, row.task): row for row in report.losses}
    if not nll:
        return ""
    forecasts = {row.task: row for row in report.forecasts}
    rows = []
    for task in report.tasks:
        if ("base", task.name) not in nll:
            continue
        cells = [
            f"<th scope=row>{escape(task.name)}</th>",
            f"<td>{number(task.weight)}</td>",
            f"<td>{number(task.coefficient)}</td>",
        ]
        for model in ("base", task.name, "merged"):
            row = nll.get((model, task.name))
            if row is None:
                cells.append("<td>\u2013</td>")
                continue
            right = "" if row.accuracy is None else f' <span class="muted">{row.accuracy:.0%}</span>'
            cells.append(f"<td>{row.nll:.3f}{right}</td>")
        if task.name in forecasts:
            found = forecasts[task.name]
            own = nll[task.name, task.name].nll
            doubt = "" if found.trusted else ' <abbr title="outside the region of the quadratic">?</abbr>'
            cells.append(f"<td>{own + found.forecast:.3f}{doubt}</td><td>{found.best_weight:.2f}</td>")
        elif forecasts:
            cells.append("<td>\u2013</td><td>\u2013</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    extra = "<th>forecast</th><th>best weight</th>" if forecasts else ""
    return (
        "<section><h2>What it costs each task</h2><p class=lead>Loss in nats per example, accuracy beside it. The coefficient is that of "
        "the task vector in the merge, by least squares; the best weights are closed-form.</p><div class=wide><table><thead><tr><th>task</th>"
        f"<th>weight</th><th>coefficient</th><th>base</th><th>own fine-tune</th><th>merge</th>{extra}</tr></thead><tbody>"
        f"{''.join(rows)}</tbody></table></div></section>"
    )


def curves(report: Report) -> str:
    """Forecast and measured loss along the line from the base through the merge, one small chart a task."""
    if not report.forecasts:
        return ""
    charts = []
    for row in report.forecasts[:12]:
        top = max([y for _, y in row.measured_curve], default=math.inf)
        line = [
            (x, y) for x, y in row.curve if y <= 2.5 * max(top, 0.05)
        ]  # a parabola far out would flatten the rest
        charts.append(
            line_chart(
                [
                    Series("forecast", line, colour=0),
                    Series("measured", row.measured_curve, line=False, dots=True, colour=1),
                ],
                "share of the merge's update",
                "rise, nats per example",
                title=row.task,
                x_range=(0.0, SCALES[-1]),
            )
        )
    return (
        "<section><h2>How far to go</h2><p class=lead>Rise of each task's loss over its own fine-tune, from the base (0) through the "
        "merge (1) and beyond: forecast before any merge is evaluated, against what was measured.</p>"
        f"{legend(['forecast', 'measured'], [0, 1], [False, True])}<div class=row>{''.join(charts)}</div></section>"
    )


def mismatch(report: Report) -> str:
    """Heat map task x layer of the gradient mismatch."""
    found = report.mismatch
    if found is None:
        return ""
    columns = list(next(iter(found.layers.values())))
    rows = list(found.layers)
    binned, values = bins(columns, [[found.layers[row].get(c, 0.0) for c in columns] for row in rows])
    return (
        "<section><h2>Gradient mismatch</h2><p class=lead>How much each task's gradient changed between its fine-tune and the merge, by "
        f"layer. In all: total {number(found.total)} nats per unit of weight ({number(found.per_example)} per example), preconditioned "
        f"{number(found.preconditioned)}. Each row has its own scale.</p>"
        f"<div class=wide>{heat_map(rows, short_names(binned), values)}</div></section>"
    )


def vectors(report: Report) -> str:
    """Task vectors: cosines, sign conflicts, share of their length by layer."""
    names = [task.name for task in report.tasks]
    parts = ["<section><h2>Task vectors</h2>"]
    if len(names) > 1:
        parts.append(
            "<div class=row><figure><figcaption>Cosine: 0 is unrelated, negative pulls apart</figcaption>"
            f"{matrix(names, report.cosines, low=-1.0, middle=0.0, high=1.0)}</figure>"
            "<figure><figcaption>Weights moved in opposite directions: 0.5 is chance</figcaption>"
            f"{matrix(names, report.conflicts, low=0.0, middle=0.5, high=1.0)}</figure>"
        )
        if report.weighted_conflicts:
            parts.append(
                "<figure><figcaption>The same, weights counted by their curvature</figcaption>"
                f"{matrix(names, square(names, report.weighted_conflicts), low=0.0, middle=0.5, high=1.0)}</figure>"
            )
        if report.overlaps:
            parts.append(
                "<figure><figcaption>Overlap of curvatures: 1 where the same weights matter</figcaption>"
                f"{matrix(names, square(names, report.overlaps), low=-1.0, middle=0.0, high=1.0)}</figure>"
            )
        parts.append("</div>")
    if report.layers:
        columns = [layer.layer for layer in report.layers]
        values = [[layer.shares[i] for layer in report.layers] for i in range(len(names))]
        binned, summed = bins(columns, values, total=True)
        parts.append(
            "<figure><figcaption>Where each task moved the weights: share of the task vector's squared length by layer</figcaption>"
            f"<div class=wide>{heat_map(names, short_names(binned), summed)}</div></figure>"
        )
    return "".join([*parts, "</section>"])


def square(names: Sequence[str], pairs: Mapping[str, float]) -> list[list[float]]:
    """'a | b' -> value as a symmetric matrix; NaN where it is not known."""

    def value(a: str, b: str) -> float:
        return pairs.get(f"{a} | {b}", pairs.get(f"{b} | {a}", math.nan))

    return [[value(a, b) for b in names] for a in names]


def redundancy(report: Report) -> str:
    """Loss against the share of the task vector that is dropped."""
    if not report.redundancy:
        return ""
    charts = []
    for task, curve in list(report.redundancy.items())[:12]:
        top = 3 * max(plain for _, plain, _ in curve)  # what explodes when rescaled leaves the chart
        charts.append(
            line_chart(
                [
                    Series("the rest as it is", [(d, plain) for d, plain, _ in curve], dots=True, colour=0),
                    Series(
                        "rescaled by 1/(1-p)",
                        [(d, scaled) for d, _, scaled in curve if scaled <= top],
                        dots=True,
                        colour=1,
                    ),
                ],
                "share dropped",
                "nats per example",
                title=task,
            )
        )
    return (
        "<section><h2>Redundancy</h2><p class=lead>Loss of each fine-tune on its own task when a random share of its task vector is "
        f"dropped.</p>{legend(['the rest as it is', 'rescaled by 1/(1-p)'])}<div class=row>{''.join(charts)}</div></section>"
    )


def notes(report: Report) -> str:
    """What else is to be said, and what was not looked at."""
    if not report.notes:
        return ""
    return f"<section><h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in report.notes)}</ul></section>"


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
