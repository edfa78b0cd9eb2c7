"""Table: accuracy of every model on every domain, averages, likelihood, calibration, mismatch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.records import Record, columns, mean_over_seeds, models_in_order, of_kind, write_atomically
from paper_figures.style import save

ROLES = {"base": "base and fine-tunes", "task": "base and fine-tunes", "joint": "target", "merge": "merges"}


def draw(records: Sequence[Record], folder: Path, name: str = "table_sentiment") -> list[Path]:
    """The table as Markdown, PNG and SVG; the best merge of each column is bold.

    Raises ValueError where nothing was evaluated.
    """
    evaluations = of_kind(records, "evaluation")
    if not evaluations:
        raise ValueError("no record of an evaluation: run a sentiment config first")
    header, rows, bold, roles = cells(evaluations)
    path = folder / f"{name}.md"
    write_atomically(path, markdown(header, rows, bold))
    return [path, *save(picture(header, rows, bold, roles), folder, name)]


Cells = tuple[list[str], list[list[str]], set[tuple[int, int]], list[str]]


def cells(evaluations: Sequence[Record]) -> Cells:
    """Header, text of every cell (mean over seeds, ± standard deviation), the cells to make bold, and the role of each row."""
    spec = columns(evaluations[0]["domains"])
    models = models_in_order(evaluations)
    rows, roles, bold = [], [], set()
    means: list[list[float | None]] = []
    for model in models:
        of_model = [record for record in evaluations if record["model"] == model]
        found = [(mean_over_seeds(of_model, value), form) for _, value, form, _ in spec]
        several = len(of_model) > 1
        rows.append([model, *(_cell(value, form, several) for value, form in found)])
        means.append([value[0] if value else None for value, _ in found])
        roles.append(ROLES[of_model[0]["role"]])
    merges = [row for row, role in enumerate(roles) if role == "merges"]
    for column, (_, _, form, larger) in enumerate(spec):
        values = {
            row: float(format(value, form)) for row in merges if (value := means[row][column]) is not None
        }
        if values:
            best = (max if larger else min)(values.values())
            bold |= {(row, column + 1) for row, value in values.items() if value == best}
    return ["model", *(title for title, *_ in spec)], rows, bold, roles


def _cell(value: tuple[float, float] | None, form: str, several: bool) -> str:
    if value is None:
        return ""
    mean, deviation = value
    return f"{mean:{form}} ± {deviation:{form}}" if several else f"{mean:{form}}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], bold: set[tuple[int, int]]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" + " ---: |" * (len(header) - 1)]
    for number, row in enumerate(rows):
        marked = [f"**{cell}**" if (number, column) in bold else cell for column, cell in enumerate(row)]
        lines.append("| " + " | ".join(marked) + " |")
    return "\n".join(lines).replace("*|", "* |") + "\n"


def picture(
    header: Sequence[str], rows: Sequence[Sequence[str]], bold: set[tuple[int, int]], roles: Sequence[str]
) -> Figure:
    """The table as a booktabs-like figure: rules only where the kind of model changes."""
    widths = [max(len(row[column]) for row in [header, *rows]) + 2.2 for column in range(len(header))]
    total, height = sum(widths), 0.21
    figure, axes = plt.subplots(figsize=(total * 0.085, height * (len(rows) + 1.6)))
    axes.axis("off")
    axes.set_xlim(0, total)
    axes.set_ylim(-len(rows) - 0.6, 1)
    ends = [sum(widths[: column + 1]) for column in range(len(widths))]
    for number, row in enumerate([header, *rows]):
        for column, text in enumerate(row):
            weight = "bold" if number == 0 or (number - 1, column) in bold else "normal"
            x, align = (0.6, "left") if column == 0 else (ends[column] - 0.6, "right")
            axes.text(x, -number + 0.3, text, ha=align, va="center", fontsize=8, fontweight=weight)
    rules = {0: 0.6} | {number: 0.4 for number in range(1, len(rows)) if roles[number] != roles[number - 1]}
    for y, thickness in [
        (0.9, 1.0),
        (-len(rows) - 0.2, 1.0),
        *((-number - 0.2, size) for number, size in rules.items()),
    ]:
        axes.plot([0, total], [y, y], color="black", linewidth=thickness)
    return figure
