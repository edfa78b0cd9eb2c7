"""What a comparison of removals at equal cost prints: tables at each budget, what survives, areas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from experiments.records import Record, of_kind
from experiments.removal.report import PROXY

COLUMNS = (  # key of a record of kind "path", title, format
    ("keep", "clean", "+.3f"),
    ("beside", "beside", "+.3f"),
    ("remove", "removed", "+.3f"),
    ("words", "words", ".3f"),
    ("words share", "> .5", ".1%"),
    ("judge", "judge", ".3f"),
    ("broken", "broken", ".1%"),
    ("forget kl", "KL forget", ".3f"),
    ("keep kl", "KL keep", ".3f"),
    ("forget quality", "quality p", ".3f"),
    ("forget probability", "P forget", ".3f"),
    ("forget paraphrase", "P paraph.", ".3f"),
    ("forget extraction", "extracted", ".3f"),
    ("utility", "utility", ".3f"),
)


def told(found: Sequence[Record]) -> str:
    """The whole report as text."""
    points = of_kind(found, "path")
    parts = [
        table(points, budget) for budget in sorted({point["budget"] for point in points if point["budget"]})
    ]
    if references := of_kind(found, "reference"):
        parts.append("\n".join(map(reference_line, references)))
    if ways := of_kind(found, "way"):
        parts.append("\n".join(way_line(way) for way in ways))
        if survived := [line for way in ways if way["after"] for line in after_lines(way)]:
            parts.append("\n".join(survived))
    if areas := of_kind(found, "area"):
        parts.append("\n".join(map(area_line, areas)))
    for own in of_kind(found, "judge"):
        parts.append(
            f"judge: right on {own['accuracy']:.1%} of {own['held_out']} held-out sentences (pairs of one topic), trained on "
            f"{own['trained_on']}"
        )
    if any("words" in point for point in points):
        parts.append(PROXY)
    if any("words" in point for point in points):
        parts.append("to be read: " + ", ".join(way["generations"] for way in ways))
    return "\n\n".join(parts)


def value_of(point: Record, key: str) -> Any:
    """A number of a point: a rise by side, or a metric."""
    return point["rise"].get(key, point.get(key)) if key in point["rise"] else point.get(key)


def table(points: Sequence[Record], budget: float) -> str:
    """One line a way at one budget, means over seeds and bad models; the unedited model first, then negation."""
    shown = [c for c in COLUMNS if any(value_of(point, c[0]) is not None for point in points)]
    labels = list(dict.fromkeys(point["label"] for point in points))
    labels.sort(key=lambda label: label != "negation")
    lines = [
        f"at most {budget:g} nats a token on either text that must stay (on validation texts); rises on test texts"
    ]
    lines.append(f"{'way':22} {'strength':>9}" + "".join(f" {title:>10}" for _, title, _ in shown))
    groups = [("unedited", [point for point in points if not point["budget"]])]
    groups += [
        (label, [p for p in points if (p["label"], p["budget"]) == (label, budget)]) for label in labels
    ]
    for label, own in groups:
        cells = []
        for key, _, form in shown:
            values = [value_of(point, key) for point in own]
            known = [float(value) for value in values if value is not None]
            cells.append(f" {format(fmean(known), form) if known else '':>10}")
        strength = fmean(point["strength"] for point in own) if own else math.nan
        lines.append(f"{label:22} {strength:9.3g}" + "".join(cells))
    return "\n".join(lines)


def reference_line(record: Record) -> str:
    """A model that is not edited, on the same facts."""
    keys = (
        "forget probability",
        "forget extraction",
        "forget truth ratio",
        "keep probability",
        "utility",
        "forget kl",
    )
    known = [f"{key} {record[key]:.3f}" for key in keys if record.get(key) is not None]
    return f"{record['label']}, seed {record['seed']}: " + ", ".join(known)


def way_line(way: Record) -> str:
    """The chosen option, and where the update lies."""
    where = ", ".join(f"{kind} {share:.0%}" for kind, share in way["moved"].items() if share >= 0.005)
    chosen = ", ".join(f"{key} {value}" for key, value in way["options"].items()) or "no option"
    return f"{way['label']}, seed {way['seed']}, model {way['bad']}: {chosen}; squared update: {where}"


def after_lines(way: Record) -> list[str]:
    """What is left after relearning and rounding."""
    lines = []
    for name, own in way["after"].items():
        rows = own.items() if name == "rounding" else [(name, own)]
        for what, one in rows:
            left = one["survives"]
            line = f"{way['label']}, seed {way['seed']}, model {way['bad']}, {what}: "
            line += (
                "no rise to survive" if left is None else f"{left:.0%} of the rise on what is to go survives"
            )
            if one.get("controlled") is not None:
                line += f" ({one['controlled']:.0%} over the base after the same steps)"
            if "codes changed" in one:
                line += f", {one['codes changed']:.1%} of the codes differ, rise on what stays {one['rise on what stays']:+.3f}"
            lines.append(line)
    return lines


def area_line(area: Record) -> str:
    """One comparison of two curves; negative: ours leaves less."""
    value, low, high = -area["difference"], -area["high"], -area["low"]
    what = {"forgetting": "log-likelihood of what is removed, a token"}.get(
        area["measure"], f"mean toxicity ({area['measure']})"
    )
    at = {"both": "the larger rise of both texts"}.get(area["cost"], f"the rise on {area['cost']} text")
    judged = (
        "no difference shown"
        if not (low > 0 or high < 0)
        else f"{area['ours' if high < 0 else 'theirs']} is better"
    )
    each = ", ".join(f"{-own:+.3f}" for own in area["by_seed"])
    return (
        f"{area['ours']} - {area['theirs']}: {value:+.4f} [{low:+.4f}, {high:+.4f}] {what} at equal cost, {at} "
        f"({area['span'][1] - area['span'][0]:.3f} nats a token wide): {judged}; by pair {each}"
    )
