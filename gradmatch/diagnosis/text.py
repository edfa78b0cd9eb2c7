"""The diagnosis for a terminal: causes first, then the few numbers that they rest on."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradmatch.diagnosis.cause import Cause
    from gradmatch.diagnosis.found import Found
    from gradmatch.diagnosis.report import Report

WIDTH = 100


def describe(diagnosis: Found) -> str:
    """Ranked causes, losses with forecasts, and notes, as plain text."""
    from gradmatch.diagnosis.report import report_of

    report = report_of(diagnosis)
    lines = []
    if diagnosis.causes:
        count = len(diagnosis.causes)
        lines.append("1 cause found:" if count == 1 else f"{count} causes found, the most important first:")
        for place, cause in enumerate(diagnosis.causes, 1):
            lines += cause_lines(place, cause)
    else:
        lines.append(report.verdict)
    for what, told in (("Looked at", report.looked_at), ("Not looked at", report.not_looked_at)):
        if told:
            lines += textwrap.wrap(f"{what}: {'; '.join(told)}.", WIDTH)
    lines += loss_table(report)
    if report.mismatch:
        m = report.mismatch
        lines.append(
            f"gradient mismatch: total {m.total:.4g} ({m.per_example:.3g} per example), preconditioned {m.preconditioned:.4g}"
        )
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def cause_lines(place: int, cause: Cause) -> list[str]:
    """A cause in three paragraphs: what, evidence, remedy."""
    head = f"{place}. {cause.name.replace('_', ' ')} - {cause.subject}{cost_text(cause.cost, cause.source)}"
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="   ", subsequent_indent="   ")
    return [head, *wrap.wrap(cause.evidence), *wrap.wrap(f"Remedy: {cause.remedy}")]


def cost_text(cost: float | None, source: str) -> str:
    """What a cause costs, in brackets after a space; empty where that is not known."""
    if cost is None:
        return ""
    return " (the merge is useless)" if math.isinf(cost) else f" (costs {cost:,.0f} nats, {source})"


def loss_table(report: Report) -> list[str]:
    """Loss of every task at the base, its fine-tune and the merge, with the forecast and the best weights."""
    nll = {(row.model, row.task): row.nll for row in report.losses}
    accuracy = {(row.model, row.task): row.accuracy for row in report.losses}
    if not nll:
        return []
    forecasts = {row.task: row for row in report.forecasts}
    width = max(len(task.name) for task in report.tasks) + 2
    extra = f"{'forecast':>10}{'best weight':>13}" if forecasts else ""
    lines = ["", f"{'task':<{width}}{'base':>8}{'own':>8}{'merge':>8}{'accuracy':>10}{extra}"]
    for task in report.tasks:
        name = task.name
        if ("base", name) not in nll:
            continue
        row = f"{name:<{width}}{nll['base', name]:>8.3f}{nll[name, name]:>8.3f}"
        merged = nll.get(("merged", name))
        row += f"{merged:>8.3f}" if merged is not None else f"{'-':>8}"
        share = accuracy.get(("merged", name))
        row += f"{share:>10.1%}" if share is not None else f"{'-':>10}"
        if name in forecasts:
            found = forecasts[name]
            mark = " " if found.trusted else "?"
            row += f"{nll[name, name] + found.forecast:>9.3f}{mark}{found.best_weight:>13.2f}"
        lines.append(row)
    told = "; forecast: from exact curvature at the fine-tunes, '?' where it is out of its region"
    lines.append(f"(nats per example{told if forecasts else ''})")
    return lines
