"""The ten claims, each computed from the records of the studies: a row per part, with its threshold and its verdict.

A part *holds* where the measured value meets the threshold (claims 5, 8b, 8c and the batch bias of 9: where the whole interval
does), is *refuted* where it does not and the interval excludes it, and is *not shown* otherwise, or where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from experiments.records import Record, of_kind
from experiments.statistics import t_interval
from experiments.verdicts import (
    FEWEST_SEEDS,
    HOLDS,
    NOT_SHOWN,
    REFUTED,
    REPORTED,
    Row,
    judge,
    missing,
)

SHOWN = {10: ("share of seeds <= 1e-3", "after three steps, largest", "after four steps, largest")}

Evidence = Mapping[str, Sequence[Record]]


def theory(number: int, statement: str, threshold: str, evidence: Evidence) -> list[Row]:
    """Claims 1 to 4 and the convex part of 10, which the theory study judges seed by seed."""
    part = "convex" if number == 10 else ""
    found = [record for record in of_kind(evidence.get("theory", ()), "claim") if record["claim"] == number]
    if not found:
        return [missing(number, part, statement, threshold, "theory")]
    record = found[0]
    values = {name: value for name, value in record["value"].items() if not name.startswith("interval")}
    shown = SHOWN.get(number, tuple(values))
    measured = "; ".join(f"{name} {values[name]:.2g}" for name in shown)
    if number == 3:
        measured = f"largest of {len(values)} cases {max(values.values()):.2g}"
    low, high = (record["value"].get(f"interval {end}") for end in ("low", "high"))
    interval = f"{low:.2f} to {high:.2f}" if low is not None else "all seeds"
    verdict = HOLDS if record["holds"] else REFUTED
    return [Row(number, part, statement, threshold, measured, interval, record["seeds"], verdict, "theory")]


def exactness(evidence: Evidence) -> list[Row]:
    """Claim 1."""
    return theory(1, "Eq. 12 is the joint solution of ridge regression", "GM <= 1e-9, TA and FA >= 1e-2 of the distance", evidence)  # fmt: skip


def identities(evidence: Evidence) -> list[Row]:
    """Claim 2."""
    return theory(2, "the gradient mismatch is the error of AM and TA (Eqs. 6, 10)", "<= 1e-8", evidence)


def special_cases(evidence: Evidence) -> list[Row]:
    """Claim 3."""
    return theory(3, "TA, FA, AM and the MAP of Eq. 17 are cases of Eq. 12", "<= 1e-12", evidence)


def closer(evidence: Evidence) -> list[Row]:
    """Claim 4; on networks it is reported, with no threshold."""
    rows = theory(
        4, "GM is nearer to the joint model than TA, alpha = 1, convex", ">= 95 % of seeds", evidence
    )
    for part, source in (("text", "alpha"), ("vision", "vision")):
        distances = {
            (record["model"], record["seed"]): record["distance_to_joint"]
            for record in of_kind(evidence.get(source, ()), "evaluation")
            if "distance_to_joint" in record
        }
        seeds = sorted(seed for model, seed in distances if model == "GM" and ("TA", seed) in distances)
        if seeds:
            ratios = [distances["GM", seed] / distances["TA", seed] for seed in seeds]
            gm, ta = (fmean(distances[model, seed] for seed in seeds) for model in ("GM", "TA"))
            measured = f"ratio of distances {fmean(ratios):.2f} (GM {gm:.2f}, TA {ta:.2f} of the base's)"
            statement, threshold = "the same on an encoder: no threshold", "reported"
            rows.append(
                Row(4, part, statement, threshold, measured, _seeds(ratios, ".2f"), len(seeds), REPORTED, source)
            )  # fmt: skip
    return rows


def accuracy(evidence: Evidence) -> list[Row]:
    """Claim 5: GM - TA over the tasks at alpha = 1, paired bootstrap, text and vision."""
    statement, threshold = "GM beats TA at alpha = 1, mean over tasks", "interval above 0, >= 3 seeds"
    rows = []
    for part, source in (("text", "alpha"), ("vision", "vision")):
        found = _comparison(evidence, source)
        if not found:
            rows.append(missing(5, part, statement, threshold, source))
            continue
        value, low, high = (100 * found[key] for key in ("difference", "low", "high"))
        enough = found["seeds"] >= FEWEST_SEEDS
        verdict = REFUTED if high < 0 else HOLDS if low > 0 and enough else NOT_SHOWN
        each = [100 * own for own in found.get("by_seed", {}).values()]
        measured = f"{value:+.1f} points" + _by_seed(each, "+.1f")
        rows.append(
            Row(5, part, statement, threshold, measured, f"{low:+.1f} to {high:+.1f}",
                found["seeds"], verdict, source)
        )  # fmt: skip
    return rows


def _comparison(evidence: Evidence, source: str) -> Record | None:
    """GM against TA over the tasks."""
    for record in of_kind(evidence.get(source, ()), "comparison"):
        if (record["ours"], record["theirs"]) == ("GM", "TA") and "tasks" in record:
            return {**record, **record["tasks"]}
    return None


def flat(evidence: Evidence) -> list[Row]:
    """Claim 6: range of the tasks' mean accuracy over alpha, GM against TA; their best accuracies."""
    about = ("accuracy is flat in alpha: range of GM / range of TA", "<= 1/3")
    best = ("the gain is robustness: best GM - best TA over alpha", "at most 1 point apart")
    curves = {
        (record["model"], record["seed"]): [
            100 * point["metrics"]["tasks"]["accuracy"] for point in record["points"]
        ]
        for record in of_kind(evidence.get("alpha", ()), "sweep")
    }
    seeds = sorted(seed for model, seed in curves if model == "GM" and ("TA", seed) in curves)
    if not seeds:
        return [missing(6, "range", *about, "alpha"), missing(6, "best", *best, "alpha")]
    spread = {cell: max(curve) - min(curve) for cell, curve in curves.items()}
    ratios = [spread["GM", seed] / spread["TA", seed] for seed in seeds]
    gm, ta = (fmean(spread[model, seed] for seed in seeds) for model in ("GM", "TA"))
    gaps = [max(curves["GM", seed]) - max(curves["TA", seed]) for seed in seeds]
    count, gap = len(seeds), fmean(gaps)
    distance = (min(map(abs, gaps)), max(map(abs, gaps)))
    return [
        Row(6, "range", *about, f"{gm / ta:.2f} ({gm:.1f} / {ta:.1f} points)", _seeds(ratios, ".2f"), count,
            judge(gm / ta, min(ratios), max(ratios), most=1 / 3), "alpha"),
        Row(6, "best", *best, f"{gap:+.1f} points", _seeds(gaps, "+.1f"), count,
            judge(abs(gap), *distance, most=1.0), "alpha"),
    ]  # fmt: skip


def _seeds(values: Sequence[float], form: str) -> str:
    least, most = (
        f"{0.0 if float(f'{end:{form}}') == 0 else end:{form}}" for end in (min(values), max(values))
    )
    return f"seeds {least} to {most}"  # never -0.00


def _by_seed(values: Sequence[float], form: str) -> str:
    """What follows a mean over seeds; nothing where no seed's value is known."""
    return f" (by seed {', '.join(f'{own:{form}}' for own in values)})" if values else ""


def mismatch(evidence: Evidence) -> list[Row]:
    """Claim 7: over subsets of equal size and methods, mismatch against error; whose mismatch is smaller."""
    from experiments.studies.adding import correlations, smaller_share, within_subsets

    about = ("the mismatch tells the test error (Spearman over merges of", ">= .6")
    smaller = ("GM has a smaller mismatch than TA", ">= 90 % of subsets")
    cells = of_kind(evidence.get("adding", ()), "subset")
    if not cells:
        return [missing(7, "rank", f"{about[0]} equal size)", about[1], "adding"), missing(7, "smaller", *smaller, "adding")]  # fmt: skip
    seeds = len({record["seed"] for record in cells})
    rows, within = [], within_subsets(cells)
    for size, (rho, low, high, count) in correlations(cells).items():
        measured = f"{rho:.2f} ({count} merges" + (
            f"; within a subset {within[size][0]:.2f})" if size in within else ")"
        )
        rows.append(
            Row(7, f"{size} tasks", f"{about[0]} {size} tasks)", about[1], measured,
                _seeds((low, high), ".2f"), seeds, judge(rho, low, high, least=0.6), "adding")
        )  # fmt: skip
    share, low, high, count = smaller_share(cells)
    rows.append(
        Row(7, "smaller", *smaller, f"{100 * share:.0f} % of {count}", f"{100 * low:.0f} to {100 * high:.0f} %",
            seeds, judge(share, low, high, least=0.9), "adding")
    )  # fmt: skip
    return rows


def removal(evidence: Evidence) -> list[Row]:
    """Claim 8: exact on ridge; nearer to retraining on classifiers; less toxic at equal perplexity."""
    proofs = of_kind(evidence.get("proof", ()), "proof")
    exact = ("removal equals retraining on ridge regression (Eq. 13)", "GM <= 1e-9 of the distance, TA not")
    rows = []
    gm, ta = (_at_one(proofs, "ridge", edit, "distance") for edit in ("GM, full H", "TA"))
    if gm and ta:
        verdict = HOLDS if max(gm.values()) <= 1e-9 < min(ta.values()) else REFUTED
        rows.append(
            Row(8, "a", *exact, f"GM {max(gm.values()):.1g}, TA {min(ta.values()):.2g}", "all seeds", len(gm),
                verdict, "proof")
        )  # fmt: skip
    else:
        rows.append(missing(8, "a", *exact, "proof"))
    for problem in ("logistic", "network", "encoder"):
        for metric, name in (("distance", "distance of weights"), ("kl", "KL of predictions")):
            part, nearer = (
                f"b, {problem}",
                (f"removal is nearer to retraining than negation: {name}", "GM - TA < 0"),
            )
            gm, ta = (_at_one(proofs, problem, edit, metric) for edit in ("GM", "TA"))
            seeds = sorted(set(gm) & set(ta))
            if not seeds:
                rows.append(missing(8, part, *nearer, "proof"))
                continue
            mean, half = t_interval([gm[seed] - ta[seed] for seed in seeds])
            low, high = mean - half, mean + half
            verdict = HOLDS if high < 0 else REFUTED if low > 0 else NOT_SHOWN
            found = (f"{mean:+.2g}", f"{low:+.2g} to {high:+.2g}", len(seeds))
            rows.append(Row(8, part, *nearer, *found, verdict, "proof"))
    return [*rows, _toxicity(evidence)]


def _at_one(proofs: Sequence[Record], problem: str, edit: str, metric: str) -> dict[int, float]:
    """Seed -> metric of an edit at alpha = 1."""
    return {
        record["seed"]: record[metric]
        for record in proofs
        if (record["problem"], record["edit"], record["alpha"]) == (problem, edit, 1.0)
    }


def _toxicity(evidence: Evidence) -> Row:
    about = ("GM is less toxic than TA at equal perplexity (area between the curves)", "interval above 0")
    records = evidence.get("toxicity", ())
    for record in of_kind(records, "area"):
        if (record["ours"], record["theirs"], record["measure"]) == ("GM", "TA", "toxicity"):
            value, low, high = (record[key] for key in ("difference", "low", "high"))
            verdict = HOLDS if low > 0 else REFUTED if high < 0 else NOT_SHOWN
            seeds = len({point["seed"] for point in of_kind(records, "point")})
            measured = f"{value:+.4f}" + _by_seed(record["by_seed"] if seeds > 1 else (), "+.3f")
            return Row(8, "c", *about, measured, f"{low:+.4f} to {high:+.4f}", seeds, verdict, "toxicity")
    return missing(8, "c", *about, "toxicity")


def cheap(evidence: Evidence) -> list[Row]:
    """Claim 9: share of the GM - TA gain that cheap estimates keep; the bias of squared batch means."""
    from experiments.studies.curvature import batch_bias

    records = evidence.get("curvature", ())
    gains = of_kind(records, "gain")
    threshold = f">= 90 % of the gain over TA, >= {FEWEST_SEEDS} seeds"
    wanted: dict[str, Callable[[Record], bool]] = {
        "Fisher": lambda spec: spec["kind"] == "fisher" and spec["examples"] >= 500,
        "Adam": lambda spec: spec["kind"] == "adam",
        "IVON": lambda spec: spec["kind"] == "ivon",
    }
    rows = []
    for part, fits in wanted.items():
        own = [gain for gain in gains if fits(gain["spec"]) and gain["estimate"] != gain["full"]]
        statement = f"cheap curvature suffices: {part}" + (" of >= 500 examples" if part == "Fisher" else "")
        if not own:
            rows.append(missing(9, part, statement, threshold, "curvature"))
            continue
        worst = min(own, key=lambda gain: gain["kept"])
        kept, low, high, seeds = worst["kept"], worst["low"], worst["high"], len(worst["seeds"])
        verdict = judge(kept, low, high, least=0.9) if seeds >= FEWEST_SEEDS else NOT_SHOWN
        measured, interval = (
            f"{100 * kept:.0f} % ({worst['estimate']})",
            f"{100 * low:.0f} to {100 * high:.0f} %",
        )
        rows.append(Row(9, part, statement, threshold, measured, interval, seeds, verdict, "curvature"))
    about = ("squared batch means are 1/B of the squares one by one", "B x ratio within 20 % of 1")
    bias = batch_bias(records)
    if bias is None:
        return [*rows, missing(9, "batch bias", *about, "curvature")]
    value, low, high, size, models = bias
    verdict = HOLDS if low >= 0.8 and high <= 1.2 else REFUTED if low > 1.2 or high < 0.8 else NOT_SHOWN
    seeds = len({record["seed"] for record in of_kind(records, "bias")})
    measured, interval = f"{value:.2f} (B = {size})", f"{low:.2f} to {high:.2f}, {models} models"
    return [*rows, Row(9, "batch bias", *about, measured, interval, seeds, verdict, "curvature")]


def refinement(evidence: Evidence) -> list[Row]:
    """Claim 10: re-linearised steps lead to the joint model on convex tasks, and never raise the objective on a network."""
    convex = theory(10, "re-linearised steps lead to theta*", "<= 1e-3 of the first distance after three, in every seed", evidence)  # fmt: skip
    about = (
        "re-linearised steps never raise the objective of Eq. 9 (encoder; the step control refuses a rise)",
        "no rise",
    )
    runs = of_kind(evidence.get("assumption", ()), "refinement")
    if not runs:
        return [*convex, missing(10, "network", *about, "assumption")]
    rises = [sum(after > before for before, after in pairwise(run["values"])) for run in runs]
    steps = sum(len(run["values"]) - 1 for run in runs)
    left = [run["values"][-1] / run["values"][0] for run in runs]
    measured = f"{sum(rises)} rises in {steps} steps; objective falls to {fmean(left):.2f} of its first value"
    interval, seeds = f"runs {min(left):.2f} to {max(left):.2f}", len({run["seed"] for run in runs})
    verdict = REFUTED if any(rises) else HOLDS
    return [*convex, Row(10, "network", *about, measured, interval, seeds, verdict, "assumption")]


CLAIMS = (exactness, identities, special_cases, closer, accuracy, flat, mismatch, removal, cheap, refinement)


def rows(evidence: Evidence) -> list[Row]:
    """Every part of every claim, in order. Raises ValueError where a record lacks what a claim asks for."""
    found: list[Row] = []
    for claim in CLAIMS:
        try:
            found += claim(evidence)
        except (KeyError, TypeError) as error:
            about = (claim.__doc__ or "").splitlines()[0]
            raise ValueError(
                f"a record lacks {error}, or holds something else there ({about}): run its config again"
            ) from error
    return found
