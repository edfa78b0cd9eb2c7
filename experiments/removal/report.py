"""What a removal experiment prints: the table along alpha, the areas between curves, forecasts, and what the proxy is."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import fmean
from typing import Any

from experiments.records import Record, of_kind, seeds_of, spread
from experiments.report import chosen_value

PROXY = (
    "The scorer `proxy` is a linear classifier of words: it counts profanity. It does not see insults without bad words, "
    "threats, stereotypes, sarcasm or context, calls quotations and medical words toxic, and says nothing of whether a "
    "text is fluent or true."
)


def removal_report(found: Sequence[Record]) -> str:
    """The whole report as text."""
    parts = [table(of_kind(found, "point"))]
    if areas := of_kind(found, "area"):
        parts.append("\n".join(area_line(area) for area in areas))
    if choices := of_kind(found, "choice"):
        parts.append("\n".join(map(choice_line, choices)))
    parts += [forecast_lines(record) for record in of_kind(found, "forecast")]
    parts += [curvature_line(record) for record in of_kind(found, "curvature")]
    if any(record["metrics"]["scorer"] == "proxy" and _lists(record) for record in of_kind(found, "point")):
        parts.append(PROXY)
    return "\n\n".join(parts)


def table(points: Sequence[Record]) -> str:
    """One line a method and alpha: means over seeds. In brackets, 95 % intervals over prompts, or the range of the seeds."""
    lists, seeds = _lists(points[0]), seeds_of(points)
    head = f"{'method':10} {'alpha':>6} {'ppl keep':>9} {'ppl remove':>11}"
    head += "".join(f" {'toxicity ' + name:>22} {'share':>6}" for name in lists) + f" {'clamped':>8}"
    lines = [head]
    for label, alpha in dict.fromkeys((point["label"], point["alpha"]) for point in points):
        same = [point for point in points if (point["label"], point["alpha"]) == (label, alpha)]
        line = f"{label:10} {alpha:6.2f} {_mean(same, 'perplexity_keep'):9.2f} {_mean(same, 'perplexity_remove'):11.2f}"
        for name in lists:
            low, high = spread(same, f"toxicity_{name}") or (float("nan"), float("nan"))
            line += f" {_mean(same, f'toxicity_{name}'):6.3f} [{low:5.3f}, {high:5.3f}]"
            line += f" {_mean(same, f'toxic_share_{name}'):6.3f}"
        clamped = _mean(same, "clamped")
        line += f" {clamped:8.3%}" if isfinite(clamped) else f" {'':8}"
        refused = sum(point["metrics"].get(f"refused_{name}", 0) for point in same for name in lists)
        line += f"  ({refused} continuations refused: NaN)" if refused else ""
        line += f"  ({len(same)} of {len(seeds)} seeds)" if alpha and len(same) < len(seeds) else ""
        lines.append(line)
    if len(seeds) > 1:
        note = "their range in brackets; the unedited model is one, with a 95 % interval over prompts"
        lines.append(f"means over {len(seeds)} seeds" + (f", {note}" if lists else ""))
    return "\n".join(lines)


def area_line(area: Record) -> str:
    """One comparison of two curves, and what it means."""
    low, high, value = area["low"], area["high"], area["difference"]
    each = area.get("by_seed", ())
    quantity = "toxicity" if area["measure"] == "toxicity" else "log-likelihood of what is removed, a token"
    judged = (
        "no difference shown"
        if not (low > 0 or high < 0)
        else f"{area['ours' if low > 0 else 'theirs']} is better"
    )
    reach = area["span"][1] - area["span"][0]
    return (
        f"area between {area['theirs']} and {area['ours']}: {value:+.4f} [{low:+.4f}, {high:+.4f}] mean {quantity} at equal "
        f"perplexity, over {reach:.3f} nats a token from the unchanged model on ({area['draws']} bootstrap draws): {judged}"
        + (f"; by seed {', '.join(f'{own:+.4f}' for own in each)}" if len(each) > 1 else "")
    )


def choice_line(record: Record) -> str:
    """What was chosen on validation data, and against what."""
    tried = ", ".join(f"{cell['value']:g}: {cell['toxicity']:.3f}" for cell in record["tried"])
    chosen = chosen_value(record["chosen"], [cell["value"] for cell in record["tried"]])
    return (
        f"{record['label']}, seed {record['seed']}: {record['option']} = {chosen} chosen on validation texts and "
        f"{record['prompts']} spare prompts (mean toxicity up to {record['nats']:g} nats a token: {tried})"
    )


def forecast_lines(record: Record) -> str:
    """Forecast against measured rise along the path, and the budget."""
    lines = [
        f"forecasts for {record['label']}, seed {record['seed']}, from {record['examples']} validation texts a side, nats a text over the base's:"
    ]
    lines.append(
        f"{'alpha':>8} {'collateral':>11} {'measured':>9} {'diagonal':>9} {'forgetting':>11} {'measured':>9} {'diagonal':>9}"
    )
    for seen, blind in zip(record["with_data"], record["without_data"], strict=True):
        lines.append(
            f"{seen['alpha']:8.3f} {seen['collateral']:11.3f} {seen['measured_collateral']:9.3f} {blind['collateral']:9.4f} "
            f"{seen['forgetting']:11.3f} {seen['measured_forgetting']:9.3f} {blind['forgetting']:9.4f}"
        )
    found = record["budget"]
    lines.append(
        f"budget of {found['nats']:g} nats a text on what must stay: alpha = {found['alpha']:.3f} ({found['bound']})"
    )
    return "\n".join(lines)


def curvature_line(record: Record) -> str:
    """How one curvature was estimated."""
    return (
        f"curvature of the {record['of']}, seed {record['seed']}, on texts to {record['side']}: {record['estimator']}, labels {record['labels']}, "
        f"reduction {record['reduction']}, {record['examples_seen']} of {record['num_examples']} texts, {record['precision']}, "
        f"trace {record['trace']:.4g} nats a text"
        + f" +- {float(record['relative_error']):.1%}"
        + f", {record['seconds']:.0f} s"
    )


def _lists(point: Record) -> list[str]:
    """The prompt lists of a record."""
    return sorted(key.removeprefix("refused_") for key in point["metrics"] if key.startswith("refused_"))


def _mean(points: Sequence[Record], key: str) -> float:
    values: list[Any] = [point["metrics"].get(key) for point in points]
    return (
        fmean(value for value in values if value is not None)
        if any(v is not None for v in values)
        else float("nan")
    )
