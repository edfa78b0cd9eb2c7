"""Figure: what closes the gap to the joint model (fine-tuning with Eq. 8's penalty, other rules), and refinement step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import caption, look, save

MEANING = {"Measured*": "Measured*: measured gradients,\ndamping chosen on validation data"}


def draw(records: Sequence[Record], folder: Path, name: str = "fig_assumption") -> list[Path]:
    """Left: accuracy on the tasks by way of fine-tuning, a marker per rule; right: Eq. 9 over steps, a line per seed.

    Raises ValueError where nothing was merged.
    """
    merges = of_kind(records, "merge")
    if not merges:
        raise ValueError("no record of a merge: run configs/assumption.yaml first")
    tunings = list(dict.fromkeys(record["tuning"] for record in merges))
    rules = list(dict.fromkeys(record["merge"] for record in merges))
    styles = look(rules)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.2, 3.0), width_ratios=[1.5, 1], layout="constrained"
    )
    for index, rule in enumerate(rules):
        for place, tuning in enumerate(tunings):
            found = [accuracy(r) for r in merges if (r["tuning"], r["merge"]) == (tuning, rule)]
            if found:
                x = place + 0.18 * (index - (len(rules) - 1) / 2)
                label = MEANING.get(rule, rule) if place == 0 else None
                left.vlines(x, min(found), max(found), color=styles[rule]["color"], linewidth=0.8)
                left.plot(x, fmean(found), linestyle="none", label=label, **styles[rule])
    joint = [accuracy(record) for record in of_kind(records, "reference")]
    if joint:
        left.axhspan(min(joint), max(joint), color="#666666", alpha=0.12, linewidth=0)
        left.axhline(fmean(joint), color="#666666", linestyle="--", linewidth=1, label="joint")
    left.set_xticks(range(len(tunings)), ["plain", *(f"$\\delta_0$ = {t}" for t in tunings[1:])])
    left.set_xlabel("fine-tuning: without penalty, and with Eq. 8's")
    left.set_ylabel("accuracy on the tasks (%)")
    left.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(rules) + 1)
    runs = {
        f"seed {r['seed']}, damping {r['damping']:g}": r["values"] for r in of_kind(records, "refinement")
    }
    for label, style in look(list(runs)).items():
        values = runs[label]
        right.plot([value / values[0] for value in values], markersize=4, linewidth=1, label=label, **style)
    right.set_ylim(bottom=0)
    right.set_xlabel("refinement steps")
    right.set_ylabel("objective of Eq. 9 / its first value")
    if runs:
        right.legend(fontsize=7)
        right.xaxis.get_major_locator().set_params(integer=True)
    caption(figure, "left: mean over seeds, whiskers and band: smallest to largest; right: a line a run")
    return save(figure, folder, name)


def accuracy(record: Record) -> float:
    """Mean accuracy on the tasks in per cent."""
    return 100 * fmean(record["metrics"][task]["accuracy"] for task in record["tasks"])
