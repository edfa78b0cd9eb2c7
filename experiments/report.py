"""What a run prints: tables of records, and what they mean in sentences made from the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from experiments.records import Record, columns, mean_over_seeds, models_in_order, of_kind
from experiments.statistics import rank_interval, spearman, t_interval

FEWEST_MERGES = 5  # for a rank correlation


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *aligned[1:]]).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def sentiment_report(records: Sequence[Record]) -> str:
    """The data, the table of every model, the comparisons with their intervals, and the folders of the merges."""
    evaluations = of_kind(records, "evaluation")
    if not evaluations:
        return "nothing was evaluated"
    parts = [
        _data(records),
        _sentiment_table(evaluations),
        _comparisons(of_kind(records, "comparison")),
        _choices(evaluations),
        _mismatch(records),
        _sweeps(records),
    ]
    folders = [
        f"  {record['model']:<12} {record['folder']}" for record in evaluations if record["role"] == "merge"
    ]
    if folders:
        parts.append("\n".join(["Merged models (each loads with transformers' from_pretrained):", *folders]))
    return "\n\n".join(part for part in parts if part)


def _data(records: Sequence[Record]) -> str:
    """Rows of each domain by split and class."""
    return "\n\n".join(data_table(record) for record in of_kind(records, "data"))


def data_table(record: Record) -> str:
    """Rows of each domain by split and class, and what was noticed in reading."""
    rows = [
        [
            f"{domain}, {split}",
            str(sum(counts.values())),
            ", ".join(f"{name} {n}" for name, n in counts.items()),
        ]
        for domain, splits in record["rows"].items()
        for split, counts in splits.items()
    ]
    title = "by class, in the order of the head"
    wide = max(len(row[-1]) for row in [[title], *rows])
    table = format_table(
        ["rows", "all", title.ljust(wide)], [[*row[:-1], row[-1].ljust(wide)] for row in rows]
    )
    return "\n".join([table, *(f"  {note}" for note in record["notes"])])


def _sentiment_table(evaluations: Sequence[Record]) -> str:
    domains = evaluations[0]["domains"]
    own = list(dict.fromkeys(key for record in evaluations for key in record.get("own", {})))
    shown = [
        *((title, value, form) for title, value, form, _ in columns(domains)),
        ("preconditioned", lambda record: record.get("mismatch", {}).get("preconditioned"), ".3g"),
        *((key, lambda record, key=key: record.get("own", {}).get(key), ".4g") for key in own),
    ]
    seeds = len({record["seed"] for record in evaluations})
    rows = []
    for model in models_in_order(evaluations):
        of_model = [record for record in evaluations if record["model"] == model]
        values = [(title, mean_over_seeds(of_model, value), form) for title, value, form in shown]
        name = model if len(of_model) == seeds else f"{model} ({len(of_model)} of {seeds} seeds)"
        cells = [format(value[0], form) if value else "" for _, value, form in values]
        rows.append([name, *cells])
        rows[-1][len(domains) + 1] += _spread(of_model)
    tests = sum(evaluations[0]["metrics"][domain]["n"] for domain in domains)
    language = any(record.get("language") for record in evaluations)
    title = f"Test accuracy{' of the next token' if language else ''} in %, {tests} examples, " + (
        f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    )
    meant = (
        f"standard deviation over the {seeds} seeds (of a model with fewer, over those)"
        if seeds > 1
        else "half the 95 % interval over the test examples of one seed, which says nothing of other seeds"
    )
    notes = (
        f"±: {meant}; whether two models differ is told by their comparison, which is paired, not by this.\n"
        "mismatch / n: norm of sum_t [grad l_t(theta) - grad l_t(theta_t)] over the tasks' training examples (Eq. 6), divided by their number.\n"
        "preconditioned: norm of H0^-1 times that sum (Eq. 10); compare it between rows only, since it is large where the base's\n"
        "data say nothing and H0 is its floor delta0."
    )
    table = format_table(["model", *(name for name, _, _ in shown)], rows)
    return f"{title}\n\n{table}\n\n{notes}"


def _spread(of_model: Sequence[Record]) -> str:
    """What stands behind a macro accuracy in per cent: its deviation over seeds, or half its interval."""
    if len(of_model) > 1:
        found = mean_over_seeds(of_model, lambda record: 100 * record["metrics"]["macro"]["accuracy"])
        return f" ± {found[1]:.1f}" if found else ""
    macro = of_model[0]["metrics"]["macro"]
    return f" ± {50 * (macro['high'] - macro['low']):.1f}" if "low" in macro else ""


def _comparisons(records: Sequence[Record]) -> str:
    """Each pair: the difference, its interval, p, and p corrected for all of them."""
    if not records:
        return ""
    rows = []
    for record in records:
        for where, own in (("all", record), ("tasks", record.get("tasks"))):
            if own:
                losses = own.get("quantity") == "nll"
                points, low, high = (
                    (1 if losses else 100) * own[key] for key in ("difference", "low", "high")
                )
                tests = [f"{own[key]:.4f}" if key in own else "" for key in ("p", "p_holm")]
                reading = _reading(own)
                form = "+.4f" if losses else "+.1f"
                cells = [f"{points:{form}}", f"{low:{form}} to {high:{form}}", *tests, reading]
                rows.append([f"{record['ours']} - {record['theirs']}, {where}", *cells])
    losses = records[0].get("quantity") == "nll"
    unit, meant = ("nats", "macro loss a token, less is better") if losses else ("points", "macro accuracy")
    table = format_table(["comparison", unit, "95 % interval", "p", "p (Holm)", "reading"], rows)
    seeds = max(record.get("seeds", 1) for record in records)
    over = f"the {seeds} seeds and the test examples" if seeds > 1 else "the test examples of one seed"
    return (
        f"{table}\n\n{unit}: difference of {meant}, over all domains or over the tasks; interval and p: paired bootstrap over {over};\n"
        f"p (Holm): corrected for the {len(records)} comparisons; better and worse: where that is below .05."
    )


def _reading(own: Record) -> str:
    told = own["p_holm"] < 0.05 if "p_holm" in own else own["low"] > 0 or own["high"] < 0
    better = (own["difference"] > 0) != (own.get("quantity") == "nll")
    return ("better" if better else "worse") if told else "not told apart"


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
    rhos = forecast_correlations(sweeps)
    if len(rhos) > 1:
        mean, half = t_interval(rhos)
        lines.append(
            "Over merges and alphas the forecast loss, which needs no test data, ranks the test losses with a Spearman correlation of "
            f"{mean:.2f} (95 % interval over {len(rhos)} seeds, Student's t: {mean - half:.2f} to {min(1, mean + half):.2f})."
        )
    return "\n".join([head, *lines])


def forecast_correlations(sweeps: Sequence[Record]) -> list[float]:
    """Spearman's rho of each seed between forecast and measured mean loss on the tasks, over merges and alphas."""
    points = [{**point, "seed": record["seed"]} for record in sweeps for point in record["points"]]
    known = [point for point in points if "forecast" in point]
    return _rhos(known, lambda point: (point["forecast"]["mean"], point["metrics"]["tasks"]["nll"]))


def _rhos(records: Sequence[Record], point: Callable[[Record], tuple[float, float]]) -> list[float]:
    """Spearman's rho over the points of each seed's records; none where one of them has fewer than three."""
    rhos = []
    for seed in dict.fromkeys(record["seed"] for record in records):
        points = [point(record) for record in records if record["seed"] == seed]
        rhos.append(spearman(*zip(*points, strict=True)) if len(points) > 2 else math.nan)
    return [] if any(map(math.isnan, rhos)) else rhos


def accuracy_over_alpha(sweeps: Sequence[Record]) -> dict[float, float]:
    """alpha -> mean accuracy on the tasks in per cent, mean over seeds."""
    alphas = [point["alpha"] for point in sweeps[0]["points"]]
    return {
        alpha: fmean(100 * record["points"][index]["metrics"]["tasks"]["accuracy"] for record in sweeps)
        for index, alpha in enumerate(alphas)
    }


def _mismatch(records: Sequence[Record]) -> str:
    """Whether the mismatch tells which merge errs less: a rank correlation with its interval, or why there is none."""
    merges = [record for record in of_kind(records, "evaluation") if record["role"] == "merge"]
    measured = [record for record in merges if "mismatch" in record]
    found = mismatch_correlation(records)
    count = len({record["model"] for record in measured})
    if found is None:
        few = f"{count} merges are too few to say" if count < FEWEST_MERGES else "nothing tells"
        return f"{few} whether the mismatch goes with the test error." if measured else ""
    rho, low, high = found
    said = "merges of smaller mismatch err less" if low > 0 else "this tells no order of the merges"
    return (
        f"Over the {count} merges the mismatch, which needs no test data, ranks the test errors on the tasks with a Spearman correlation "
        f"of {rho:.2f} (95 % interval over merges {low:.2f} to {high:.2f}): {said}."
    )


def mismatch_correlation(records: Sequence[Record]) -> tuple[float, float, float] | None:
    """Spearman's rho between total mismatch and test error on the tasks over the merges, mean over seeds, and its interval.

    None for fewer than five merges.
    """
    evaluated = of_kind(records, "evaluation")
    merges = [record for record in evaluated if record["role"] == "merge" and "mismatch" in record]
    count = len({record["model"] for record in merges})
    rhos = _rhos(
        merges, lambda record: (record["mismatch"]["total"], 1 - record["metrics"]["tasks"]["accuracy"])
    )
    if count < FEWEST_MERGES or not rhos:
        return None
    return (fmean(rhos), *rank_interval(fmean(rhos), count))


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
