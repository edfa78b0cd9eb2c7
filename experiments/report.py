"""What a run prints: tables of records, and what they mean in sentences made from the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from experiments.records import Record, columns, mean_over_seeds, models_in_order, of_kind


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *aligned[1:]]).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def sentiment_report(records: Sequence[Record]) -> str:
    """The table of every model, two sentences on it, and the folder of the merge that the paper proposes."""
    evaluations = of_kind(records, "evaluation")
    if not evaluations:
        return "nothing was evaluated"
    parts = [
        _sentiment_table(evaluations),
        _choices(evaluations),
        " ".join(_sentences(records)),
        _sweeps(records),
    ]
    folders = [
        f"  {record['model']:<12} {record['folder']}" for record in evaluations if record["role"] == "merge"
    ]
    if folders:
        parts.append("\n".join(["Merged models (each loads with transformers' from_pretrained):", *folders]))
    return "\n\n".join(part for part in parts if part)


def _sentiment_table(evaluations: Sequence[Record]) -> str:
    domains = evaluations[0]["domains"]
    shown = [
        *((title, value, form) for title, value, form, _ in columns(domains)),
        ("preconditioned", lambda record: record.get("mismatch", {}).get("preconditioned"), ".3g"),
    ]
    seeds = len({record["seed"] for record in evaluations})
    rows = []
    for model in models_in_order(evaluations):
        of_model = [record for record in evaluations if record["model"] == model]
        values = [(mean_over_seeds(of_model, value), form) for _, value, form in shown]
        name = model if len(of_model) == seeds else f"{model} ({len(of_model)} of {seeds} seeds)"
        rows.append([name, *(format(value[0], form) if value else "" for value, form in values)])
    tests = sum(evaluations[0]["metrics"][domain]["n"] for domain in domains)
    title = f"Test accuracy in %, {tests} examples, " + (
        f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    )
    notes = (
        "mismatch / n: norm of sum_t [grad l_t(theta) - grad l_t(theta_t)] over the tasks' training examples (Eq. 6), divided by their number.\n"
        "preconditioned: norm of H0^-1 times that sum (Eq. 10); compare it between rows only, since it is large where the base's\n"
        "data say nothing and H0 is its floor delta0."
    )
    table = format_table(["model", *(name for name, _, _ in shown)], rows)
    return f"{title}\n\n{table}\n\n{notes}"


def _choices(evaluations: Sequence[Record]) -> str:
    """Which values were chosen on validation examples, and whether the grid ended there."""
    chosen: dict[str, list[str]] = {}
    for record in evaluations:
        for option, value in record.get("choice", {}).get("chosen", {}).items():
            tried = [cell["value"] for cell in record["choice"]["tried"]]
            chosen.setdefault(f"{record['model']}: {option}", []).append(chosen_value(value, tried))
    return "\n".join(
        f"chosen on validation data, {name} = {', '.join(values)}" for name, values in chosen.items()
    )


def chosen_value(value: float, tried: Sequence[float]) -> str:
    """A value that was chosen among those tried; told where it is the end of their grid, beyond which a better one may lie."""
    edge = len(tried) > 1 and value in (min(tried), max(tried))
    return f"{value:g} (the end of its grid)" if edge else f"{value:g}"


def _sweeps(records: Sequence[Record]) -> str:
    """Range and best of the tasks' mean accuracy over alpha, of each swept merge; where it was forecast to be best."""
    sweeps = of_kind(records, "sweep")
    lines = []
    for model in dict.fromkeys(record["model"] for record in sweeps):
        own = [record for record in sweeps if record["model"] == model]
        curve = accuracy_over_alpha(own)
        best = max(curve, key=lambda alpha: curve[alpha])
        line = (
            f"  {model:<6} {min(curve.values()):.1f} to {max(curve.values()):.1f} (range {max(curve.values()) - min(curve.values()):.1f}), "
            f"best {curve[best]:.1f} at alpha = {best:g}"
        )
        if all("forecast" in record["points"][0] for record in own):
            guesses = [min(record["points"], key=lambda point: point["forecast"]["mean"]) for record in own]
            chosen = fmean(100 * point["metrics"]["tasks"]["accuracy"] for point in guesses)
            where = ", ".join(f"{point['alpha']:g}" for point in guesses)
            line += f"; at the alpha of each seed's lowest forecast ({where}): {chosen:.1f}"
        lines.append(line)
    if not lines:
        return ""
    alphas = [point["alpha"] for point in sweeps[0]["points"]]
    head = f"Mean accuracy on the tasks (%) over alpha from {min(alphas):g} to {max(alphas):g}:"
    correlation = forecast_correlation(sweeps)
    if correlation is not None:
        lines.append(
            f"Over merges and alphas the forecast loss, which needs no test data, ranks the test losses with a Spearman correlation of "
            f"{correlation:.2f} (mean over seeds)."
        )
    return "\n".join([head, *lines])


def forecast_correlation(sweeps: Sequence[Record]) -> float | None:
    """Spearman's rho between forecast and measured mean loss on the tasks, over merges and alphas; mean over seeds."""
    points = [{**point, "seed": record["seed"]} for record in sweeps for point in record["points"]]
    known = [point for point in points if "forecast" in point]
    return _rho(known, lambda point: (point["forecast"]["mean"], point["metrics"]["tasks"]["nll"]))


def _rho(records: Sequence[Record], point: Callable[[Record], tuple[float, float]]) -> float | None:
    """Spearman's rho over the points of a seed's records, mean over seeds; None where a seed has none, or fewer than three."""
    from experiments.statistics import spearman

    rhos = []
    for seed in dict.fromkeys(record["seed"] for record in records):
        points = [point(record) for record in records if record["seed"] == seed]
        rhos.append(spearman(*zip(*points, strict=True)) if len(points) > 2 else math.nan)
    return fmean(rhos) if rhos and not any(map(math.isnan, rhos)) else None


def accuracy_over_alpha(sweeps: Sequence[Record]) -> dict[float, float]:
    """alpha -> mean accuracy on the tasks in per cent, mean over seeds."""
    alphas = [point["alpha"] for point in sweeps[0]["points"]]
    return {
        alpha: fmean(100 * record["points"][index]["metrics"]["tasks"]["accuracy"] for record in sweeps)
        for index, alpha in enumerate(alphas)
    }


def _sentences(records: Sequence[Record]) -> list[str]:
    """Two sentences: who is better and how surely; what the mismatch says about it."""
    sentences = []
    for comparison in of_kind(records, "comparison")[:1]:
        sentences.append(comparison_sentence(comparison, records))
    ratio, correlation = _mismatch_ratio(records), mismatch_correlation(records)
    if ratio and correlation is None:
        sentences.append(f"{ratio}.")
    elif ratio and correlation:
        rho, merges = correlation
        verdict = "tells" if rho >= 0.6 else "tells only roughly" if rho >= 0.3 else "does not tell"
        sentences.append(
            f"{ratio}, and over the {merges} merges the mismatch, which needs no test data, {verdict} which merge errs less "
            f"(Spearman {rho:.2f} with the test error on the tasks)."
        )
    return sentences


def comparison_sentence(comparison: Record, records: Sequence[Record]) -> str:
    """`A` beats / does not beat `B`, by how much, with its interval, and how far the joint model is."""
    ours, theirs = comparison["ours"], comparison["theirs"]
    points, low, high = (100 * comparison[key] for key in ("difference", "low", "high"))
    verb = "beats" if low > 0 else "loses to" if high < 0 else "is not told apart from"
    joint = _macro(records, "joint")
    reference = f"; the joint model stands at {joint:.1f}" if joint is not None else ""
    return (
        f"{ours} ({_macro(records, ours):.1f} %) {verb} {theirs} ({_macro(records, theirs):.1f} %) by {points:+.1f} points of "
        f"macro accuracy (95 % paired bootstrap interval {low:+.1f} to {high:+.1f}){reference}, "
        f"and the best merge is {_best(records)}."
    )


def mismatch_correlation(records: Sequence[Record]) -> tuple[float, int] | None:
    """Spearman's rho between total mismatch and test error on the tasks over the merges, mean over seeds; their number."""
    evaluated = of_kind(records, "evaluation")
    merges = [record for record in evaluated if record["role"] == "merge" and "mismatch" in record]
    rho = _rho(
        merges, lambda record: (record["mismatch"]["total"], 1 - record["metrics"]["tasks"]["accuracy"])
    )
    return None if rho is None else (rho, len({record["model"] for record in merges}))


def _mismatch_ratio(records: Sequence[Record]) -> str:
    comparison = next(iter(of_kind(records, "comparison")), None)
    if comparison is None:
        return ""
    sizes = [
        mean_over_seeds(
            _of_model(records, comparison[side]), lambda record: record.get("mismatch", {}).get("total")
        )
        for side in ("ours", "theirs")
    ]
    if sizes[0] is None or sizes[1] is None:
        return ""
    return f"The gradient mismatch of {comparison['ours']} is {sizes[0][0] / sizes[1][0]:.2f} times that of {comparison['theirs']}"


def _of_model(records: Sequence[Record], model: str) -> list[Record]:
    return [record for record in of_kind(records, "evaluation") if record["model"] == model]


def _macro(records: Sequence[Record], model: str) -> float | None:
    found = mean_over_seeds(
        _of_model(records, model), lambda record: 100 * record["metrics"]["macro"]["accuracy"]
    )
    return found[0] if found else None


def _best(records: Sequence[Record]) -> str:
    merges = dict.fromkeys(
        record["model"] for record in of_kind(records, "evaluation") if record["role"] == "merge"
    )
    scores = {model: _macro(records, model) or 0.0 for model in merges}
    best = max(scores, key=lambda model: scores[model])
    return f"{best} with {scores[best]:.1f}"


def claims_report(records: Sequence[Record]) -> str:
    """Each claim: its statement, threshold, measured values, seeds, and whether it holds."""
    parts = []
    for record in of_kind(records, "claim"):
        verdict = "holds" if record["holds"] else "DOES NOT HOLD"
        values = "; ".join(f"{name} {value:.3g}" for name, value in record["value"].items())
        parts.append(
            f"claim {record['claim']}: {verdict}. {record['statement']}\n"
            f"    threshold: {record['threshold']}\n    measured ({record['seeds']} seeds): {values}"
        )
    return "\n".join(parts)
