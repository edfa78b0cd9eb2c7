"""The diagnosis for a terminal: causes first, then the few numbers that they rest on."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

WIDTH = 100


def describe(report: Mapping[str, Any]) -> str:
    """Ranked causes, losses with forecasts, and notes, as plain text; from the values of `gradmatch.diagnosis.report.report_of`."""
    causes = report["causes"]
    lines = []
    if causes:
        lines.append(
            "1 cause found:" if len(causes) == 1 else f"{len(causes)} causes found, the most important first:"
        )
        for place, cause in enumerate(causes, 1):
            lines += cause_lines(place, cause)
    else:
        lines += textwrap.wrap(report["verdict"], WIDTH)
    for what, told in (("Looked at", report["looked_at"]), ("Not looked at", report["not_looked_at"])):
        if told:
            lines += textwrap.wrap(f"{what}: {'; '.join(told)}.", WIDTH)
    lines += loss_table(report)
    if report["mismatch"]:
        total, each, moved = (
            float(report["mismatch"][key]) for key in ("total", "per_example", "preconditioned")
        )
        lines.append(
            f"gradient mismatch: total {total:.4g} ({each:.3g} per example), preconditioned {moved:.4g} (units of weight)"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def cause_lines(place: int, cause: Mapping[str, Any]) -> list[str]:
    """A cause in three paragraphs: what it is and costs, evidence, remedy."""
    cost = ""
    if isinstance(cause["cost"], str):  # "Infinity"
        cost = " (the merge is useless)"
    elif cause["cost"] is not None:
        cost = f" (costs {cause['cost']:,.0f} nats, {cause['source']})"
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="   ", subsequent_indent="   ")
    head = f"{place}. {cause['name'].replace('_', ' ')} - {cause['subject']}{cost}"
    return [head, *wrap.wrap(cause["evidence"]), *wrap.wrap(f"Remedy: {cause['remedy']}")]


def loss_table(report: Mapping[str, Any]) -> list[str]:
    """Loss of every task at the base, its fine-tune and the merge, with the forecast and the best weights; perplexities below."""
    rows = {(row["model"], row["task"]): row for row in report["losses"]}
    if not rows:
        return []
    forecasts = {row["task"]: row for row in report["forecasts"]}
    tasks = [task["name"] for task in report["tasks"] if ("base", task["name"]) in rows]
    own = {task: task for task in tasks} | ({"base": ""} if ("base", "base") in rows else {})
    shown = {task: "the base's data" if task == "base" and not own[task] else task for task in own}
    width = max(map(len, shown.values())) + 2
    extra = f"{'forecast':>10}{'best weight':>13}" if forecasts else ""
    lines = [
        "",
        f"{'task':<{width}}{'base':>8}{'own':>8}{'merge':>8}{'95 % interval':>18}{'accuracy':>10}{extra}",
    ]
    for task, fine_tune in own.items():
        merged = rows.get(("merged", task))
        line = f"{shown[task]:<{width}}"
        for row in (rows["base", task], rows.get((fine_tune, task)), merged):
            line += f"{_values(row)[0]:>8.3f}" if row else f"{'-':>8}"
        low, high = _values(merged)[1:] if merged else ("NaN", "NaN")
        line += f"{f'{float(low):.3f} to {float(high):.3f}':>18}" if merged and low == low else f"{'-':>18}"
        line += f"{merged['accuracy']:>10.1%}" if merged and merged["accuracy"] is not None else f"{'-':>10}"
        if task in forecasts and fine_tune:
            found, start = forecasts[task], rows[task, task]
            loss = (float(start["nll"]) + float(found["forecast"])) / start["predictions"]
            line += f"{loss:>9.3f}{' ' if found['trusted'] else '?'}{found['best_weight']:>13.2f}"
        lines.append(line)
    tokens = [task for task in own if rows["base", task]["perplexity"]]
    for task in tokens:
        models = {"base": "base", "own": own[task], "merge": "merged"}
        told = [
            f"{what} {p[0]:.4g} ({p[1]:.4g} to {p[2]:.4g})"
            for what, model in models.items()
            if (row := rows.get((model, task))) and (p := [float(value) for value in row["perplexity"]])
        ]
        lines.append(f"perplexity of {shown[task]}: {', '.join(told)}")
    unit = "nats per token" if len(tokens) == len(own) else "nats per example"
    unit += (
        f"; of {', '.join(shown[task] for task in tokens)} per token" if 0 < len(tokens) < len(own) else ""
    )
    note = "; forecast: from exact curvature at the fine-tunes, '?' where it is out of its region"
    return [*lines, f"({unit}{note if forecasts else ''})"]


def _values(row: Mapping[str, Any]) -> list[float]:
    """Mean, low and high of a loss: per token where an example has several."""
    return [float(value) for value in row["per_prediction"] or [row["nll"], *row["interval"]]]
