"""The ten claims, each computed from the records of the studies: a row per part, with its threshold and its verdict.

A part *holds* where the measured value meets the threshold (claims 5, 8b, 8c and the batch bias of 9: where the whole interval
does), is *refuted* where it does not and the interval excludes it, and is *not shown* otherwise, or where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from experiments.claims_removal import guarded, tofu
from experiments.records import Record, of_kind
from experiments.statistics import t_interval
from experiments.verdicts import FEWEST_SEEDS, HOLDS, NOT_SHOWN, REFUTED, REPORTED, Part, Row, judge

SHOWN = {10: ("share of seeds <= 1e-3", "after three steps, largest", "after four steps, largest")}
ENCODERS = (("text", "alpha"), ("vision", "vision"))  # part of a claim -> the study that tells it
BIAS = (0.8, 1.2)  # within 20 % of 1

Evidence = Mapping[str, Sequence[Record]]


def theory(claim: Part, evidence: Evidence) -> Row:
    """Claims 1 to 4 and the convex part of 10, which the theory study judges seed by seed."""
    number = claim.claim
    found = [record for record in of_kind(evidence.get("theory", ()), "claim") if record["claim"] == number]
    if not found:
        return claim.missing()
    record = found[0]
    values = {name: value for name, value in record["value"].items() if not name.startswith("interval")}
    measured = "; ".join(f"{name} {values[name]:.2g}" for name in SHOWN.get(number, tuple(values)))
    if number == 3:
        measured = f"largest of {len(values)} cases {max(values.values()):.2g}"
    low, high = (record["value"].get(f"interval {end}") for end in ("low", "high"))
    interval = f"{low:.2f} to {high:.2f}" if low is not None else "all seeds"
    return claim.row(measured, interval, record["seeds"], HOLDS if record["holds"] else REFUTED)


def exactness(evidence: Evidence) -> Iterator[Row]:
    """Claim 1."""
    threshold = "GM <= 1e-9, TA and FA >= 1e-2 of the distance"
    yield theory(
        Part(1, "", "Eq. 12 is the joint solution of ridge regression", threshold, "theory"), evidence
    )


def identities(evidence: Evidence) -> Iterator[Row]:
    """Claim 2."""
    statement = "the gradient mismatch is the error of AM and TA (Eqs. 6, 10)"
    yield theory(Part(2, "", statement, "<= 1e-8", "theory"), evidence)


def special_cases(evidence: Evidence) -> Iterator[Row]:
    """Claim 3."""
    statement = "TA, FA, AM and the MAP of Eq. 17 are cases of Eq. 12"
    yield theory(Part(3, "", statement, "<= 1e-12", "theory"), evidence)


def closer(evidence: Evidence) -> Iterator[Row]:
    """Claim 4; on networks it is reported, with no threshold."""
    statement = "GM is nearer to the joint model than TA, alpha = 1, convex"
    yield theory(Part(4, "", statement, ">= 95 % of seeds", "theory"), evidence)
    for part, source in ENCODERS:
        distances = {
            (record["model"], record["seed"]): record["distance_to_joint"]
            for record in of_kind(evidence.get(source, ()), "evaluation")
            if "distance_to_joint" in record
        }
        if seeds := _of_both(distances):
            ratios = [distances["GM", seed] / distances["TA", seed] for seed in seeds]
            gm, ta = (fmean(distances[model, seed] for seed in seeds) for model in ("GM", "TA"))
            measured = f"ratio of distances {fmean(ratios):.2f} (GM {gm:.2f}, TA {ta:.2f} of the base's)"
            claim = Part(4, part, "the same on an encoder: no threshold", "reported", source)
            yield claim.row(measured, _seeds(ratios, ".2f"), len(seeds), REPORTED)


def accuracy(evidence: Evidence) -> Iterator[Row]:
    """Claim 5: GM - TA over the tasks at alpha = 1, paired bootstrap, text and vision."""
    statement, threshold = "GM beats TA at alpha = 1, mean over tasks", "interval above 0, >= 3 seeds"
    for part, source in ENCODERS:
        claim, found = Part(5, part, statement, threshold, source), _comparison(evidence, source)
        if not found:
            yield claim.missing()
            continue
        value, low, high = (100 * found[key] for key in ("difference", "low", "high"))
        enough = found["seeds"] >= FEWEST_SEEDS
        verdict = REFUTED if high < 0 else HOLDS if low > 0 and enough else NOT_SHOWN
        each = [100 * own for own in found.get("by_seed", {}).values()]
        measured = f"{value:+.1f} points" + _by_seed(each, "+.1f")
        yield claim.row(measured, f"{low:+.1f} to {high:+.1f}", found["seeds"], verdict)


def _comparison(evidence: Evidence, source: str) -> Record | None:
    """GM against TA over the tasks."""
    for record in of_kind(evidence.get(source, ()), "comparison"):
        if (record["ours"], record["theirs"]) == ("GM", "TA") and "tasks" in record:
            return {**record, **record["tasks"]}
    return None


def flat(evidence: Evidence) -> Iterator[Row]:
    """Claim 6: range of the tasks' mean accuracy over alpha, GM against TA; their best accuracies."""
    statement = "accuracy is flat in alpha: range of GM / range of TA"
    about = Part(6, "range", statement, "<= 1/3", "alpha")
    statement = "the gain is robustness: best GM - best TA over alpha"
    best = Part(6, "best", statement, "at most 1 point apart", "alpha")
    curves = {
        (record["model"], record["seed"]): [
            100 * point["metrics"]["tasks"]["accuracy"] for point in record["points"]
        ]
        for record in of_kind(evidence.get("alpha", ()), "sweep")
    }
    seeds = _of_both(curves)
    if not seeds:
        yield from (about.missing(), best.missing())
        return
    spread = {cell: max(curve) - min(curve) for cell, curve in curves.items()}
    ratios = [spread["GM", seed] / spread["TA", seed] for seed in seeds]
    gm, ta = (fmean(spread[model, seed] for seed in seeds) for model in ("GM", "TA"))
    verdict = judge(gm / ta, min(ratios), max(ratios), most=1 / 3)
    measured = f"{gm / ta:.2f} ({gm:.1f} / {ta:.1f} points)"
    yield about.row(measured, _seeds(ratios, ".2f"), len(seeds), verdict)
    gaps = [max(curves["GM", seed]) - max(curves["TA", seed]) for seed in seeds]
    verdict = judge(abs(fmean(gaps)), min(map(abs, gaps)), max(map(abs, gaps)), most=1.0)
    yield best.row(f"{fmean(gaps):+.1f} points", _seeds(gaps, "+.1f"), len(seeds), verdict)


def _of_both(cells: Mapping[tuple[str, int], object]) -> list[int]:
    """The seeds for which something is known of GM and of TA."""
    return sorted(seed for model, seed in cells if model == "GM" and ("TA", seed) in cells)


def _seeds(values: Sequence[float], form: str) -> str:
    ends = (min(values), max(values))
    least, most = (f"{0.0 if float(f'{end:{form}}') == 0 else end:{form}}" for end in ends)  # never -0.00
    return f"seeds {least} to {most}"


def _by_seed(values: Sequence[float], form: str) -> str:
    """What follows a mean over seeds; nothing where no seed's value is known."""
    return f" (by seed {', '.join(f'{own:{form}}' for own in values)})" if values else ""


def mismatch(evidence: Evidence) -> Iterator[Row]:
    """Claim 7: over subsets of equal size and methods, mismatch against error; whose mismatch is smaller."""
    from experiments.studies.adding import correlations, smaller_share, within_subsets

    smaller = Part(7, "smaller", "GM has a smaller mismatch than TA", ">= 90 % of subsets", "adding")

    def rank(part: str, which: str) -> Part:
        statement = f"the mismatch tells the test error (Spearman over merges of {which})"
        return Part(7, part, statement, ">= .6", "adding")

    cells = of_kind(evidence.get("adding", ()), "subset")
    if not cells:
        yield from (rank("rank", "equal size").missing(), smaller.missing())
        return
    seeds = len({record["seed"] for record in cells})
    within = within_subsets(cells)
    for size, (rho, low, high, count) in correlations(cells).items():
        also = f"; within a subset {within[size][0]:.2f}" if size in within else ""
        verdict = judge(rho, low, high, least=0.6)
        claim = rank(f"{size} tasks", f"{size} tasks")
        yield claim.row(f"{rho:.2f} ({count} merges{also})", _seeds((low, high), ".2f"), seeds, verdict)
    share, low, high, count = smaller_share(cells)
    measured, interval = f"{100 * share:.0f} % of {count}", f"{100 * low:.0f} to {100 * high:.0f} %"
    yield smaller.row(measured, interval, seeds, judge(share, low, high, least=0.9))


def removal(evidence: Evidence) -> Iterator[Row]:
    """Claim 8: exact on ridge; nearer to retraining on classifiers; less toxic at equal perplexity."""
    proofs = of_kind(evidence.get("proof", ()), "proof")
    statement, threshold = (
        "removal equals retraining on ridge regression (Eq. 13)",
        "GM <= 1e-9 of the distance, TA not",
    )
    exact = Part(8, "a", statement, threshold, "proof")
    gm, ta = (_at_one(proofs, "ridge", edit, "distance") for edit in ("GM, full H", "TA"))
    if gm and ta:
        most, least = max(gm.values()), min(ta.values())
        verdict = HOLDS if most <= 1e-9 < least else REFUTED
        yield exact.row(f"GM {most:.1g}, TA {least:.2g}", "all seeds", len(gm), verdict)
    else:
        yield exact.missing()
    for problem in ("logistic", "network", "encoder"):
        for metric, name in (("distance", "distance of weights"), ("kl", "KL of predictions")):
            statement = f"removal is nearer to retraining than negation: {name}"
            claim = Part(8, f"b, {problem}", statement, "GM - TA < 0", "proof")
            gm, ta = (_at_one(proofs, problem, edit, metric) for edit in ("GM", "TA"))
            seeds = sorted(set(gm) & set(ta))
            if not seeds:
                yield claim.missing()
                continue
            mean, half = t_interval([gm[seed] - ta[seed] for seed in seeds])
            low, high = mean - half, mean + half
            verdict = HOLDS if high < 0 else REFUTED if low > 0 else NOT_SHOWN
            yield claim.row(f"{mean:+.2g}", f"{low:+.2g} to {high:+.2g}", len(seeds), verdict)
    yield _toxicity(evidence)


def _at_one(proofs: Sequence[Record], problem: str, edit: str, metric: str) -> dict[int, float]:
    """Seed -> metric of an edit at alpha = 1."""
    wanted = (problem, edit, 1.0)
    return {
        record["seed"]: record[metric]
        for record in proofs
        if (record["problem"], record["edit"], record["alpha"]) == wanted
    }


def _toxicity(evidence: Evidence) -> Row:
    statement = "GM is less toxic than TA at equal perplexity (area between the curves)"
    claim = Part(8, "c", statement, "interval above 0", "toxicity")
    records = evidence.get("toxicity", ())
    for record in of_kind(records, "area"):
        if (record["ours"], record["theirs"], record["measure"]) == ("GM", "TA", "toxicity"):
            value, low, high = (record[key] for key in ("difference", "low", "high"))
            verdict = HOLDS if low > 0 else REFUTED if high < 0 else NOT_SHOWN
            seeds = len({point["seed"] for point in of_kind(records, "point")})
            measured = f"{value:+.4f}" + _by_seed(record["by_seed"] if seeds > 1 else (), "+.3f")
            return claim.row(measured, f"{low:+.4f} to {high:+.4f}", seeds, verdict)
    return claim.missing()


def cheap(evidence: Evidence) -> Iterator[Row]:
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
    for part, fits in wanted.items():
        own = [gain for gain in gains if fits(gain["spec"]) and gain["estimate"] != gain["full"]]
        statement = f"cheap curvature suffices: {part}" + (" of >= 500 examples" if part == "Fisher" else "")
        claim = Part(9, part, statement, threshold, "curvature")
        if not own:
            yield claim.missing()
            continue
        worst = min(own, key=lambda gain: gain["kept"])
        kept, low, high, seeds = worst["kept"], worst["low"], worst["high"], len(worst["seeds"])
        verdict = judge(kept, low, high, least=0.9) if seeds >= FEWEST_SEEDS else NOT_SHOWN
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
        yield claim.row(f"{100 * kept:.0f} % ({worst['estimate']})", interval, seeds, verdict)
    statement = "squared batch means are 1/B of the squares one by one"
    claim, bias = (
        Part(9, "batch bias", statement, "B x ratio within 20 % of 1", "curvature"),
        batch_bias(records),
    )
    if bias is None:
        yield claim.missing()
        return
    value, low, high, size, models = bias
    inside, outside = low >= BIAS[0] and high <= BIAS[1], low > BIAS[1] or high < BIAS[0]
    verdict = HOLDS if inside else REFUTED if outside else NOT_SHOWN
    seeds = len({record["seed"] for record in of_kind(records, "bias")})
    yield claim.row(f"{value:.2f} (B = {size})", f"{low:.2f} to {high:.2f}, {models} models", seeds, verdict)


def refinement(evidence: Evidence) -> Iterator[Row]:
    """Claim 10: re-linearised steps lead to the joint model on convex tasks, and never raise the objective on a network."""
    threshold = "<= 1e-3 of the first distance after three, in every seed"
    convex = Part(10, "convex", "re-linearised steps lead to theta*", threshold, "theory")
    yield theory(convex, evidence)
    statement = (
        "re-linearised steps never raise the objective of Eq. 9 (encoder; the step control refuses a rise)"
    )
    claim = Part(10, "network", statement, "no rise", "assumption")
    runs = of_kind(evidence.get("assumption", ()), "refinement")
    if not runs:
        yield claim.missing()
        return
    rises = sum(after > before for run in runs for before, after in pairwise(run["values"]))
    steps = sum(len(run["values"]) - 1 for run in runs)
    left = [run["values"][-1] / run["values"][0] for run in runs]
    measured = f"{rises} rises in {steps} steps; objective falls to {fmean(left):.2f} of its first value"
    seeds = len({run["seed"] for run in runs})
    verdict = REFUTED if rises else HOLDS
    yield claim.row(measured, f"runs {min(left):.2f} to {max(left):.2f}", seeds, verdict)


CLAIMS = (
    exactness,
    identities,
    special_cases,
    closer,
    accuracy,
    flat,
    mismatch,
    removal,
    cheap,
    refinement,
    guarded,
    tofu,
)


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
