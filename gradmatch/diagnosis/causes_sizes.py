"""Causes in the sizes of the update: one task's share, the whole of it, too long or too short."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from gradmatch.diagnosis.cause import CHOICE, Cause, cause, plural
from gradmatch.diagnosis.causes_made import one_model
from gradmatch.diagnosis.evidence import SHARE_OF_GAIN
from gradmatch.measure.forecast import best_coefficients

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gradmatch.diagnosis.evidence import Evidence
    from gradmatch.measure.forecast import BestWeights

# Of three nearly orthogonal vectors, one three times as long as each other holds 9 / 11 of the sum's energy.
DOMINANCE = 3.0
HALF = 0.5
BEYOND = (2.0, 4.0, 8.0)  # multiples of the update that are tried


def one_task_dominates(evidence: Evidence) -> Iterator[Cause]:
    """One task's share of the update drowns the others': through its weight, or through the length of its task vector."""
    norms, used = evidence.scan.norms(), evidence.coefficients()
    tasks = [task for task in evidence.scan.tasks if norms[task] > 0]  # one that is the base has no share
    if len(tasks) < 2 or evidence.scan.nonfinite or evidence.searched or one_model(evidence):
        return  # one model was chosen, or the merge is none
    if evidence.merged is not None and evidence.scan.projection()[1] > HALF:
        used = evidence.alpha  # the span explains too little of the update to read weights off it
    for task in tasks:
        by_weight, asked, by_length = (
            _ratio(abs(values[task]), [abs(values[other]) for other in tasks if other != task])
            for values in (used, evidence.alpha, norms)
        )
        by_weight = max(by_weight, asked)
        size = by_weight * by_length
        # Where losses are measured, they decide whether a smaller excess matters.
        least = DOMINANCE / 2 if evidence.measured else DOMINANCE
        if size < least or max(by_weight, by_length) < DOMINANCE / 2:
            continue
        factor, saving = 1 / size, None
        if evidence.measured:
            # As long as the others' share, or half-way there on a logarithmic scale: whichever saves more.
            savings = {
                f: evidence.saving(evidence.with_changes({task: used[task] * (f - 1)}))
                for f in (1 / size, size**-0.5)
            }
            factor, saving = max(savings.items(), key=lambda item: item[1].nats)
            if not evidence.matters(saving):
                continue
        numbers = {"size_ratio": size, "factor": factor}
        if by_length > by_weight:
            found = cause(
                "overtrained_task",
                task,
                f"the task vector of {task!r} is {by_length:.1f} times as long as the others' (norm {norms[task]:.3g})",
                f"give {task!r} about {factor:.2g} of its weight, or stop its fine-tuning earlier",
                CHOICE,
                saving,
                length_ratio=by_length,
                **numbers,
            )
        else:
            found = cause(
                "weight_too_large",
                task,
                f"{task!r} has {by_weight:.1f} times the weight of the other tasks (coefficient {used[task]:.2f} in the merge)",
                f"lower its weight to about {evidence.alpha[task] * factor:.2g}" + _auto(evidence, task),
                CHOICE,
                saving,
                weight_ratio=by_weight,
                **numbers,
            )
        forecast = _forecast(evidence, {**used, task: used[task] * factor}) if saving is None else None
        yield found if forecast is None else replace(found, cost=forecast, source="forecast")


def sizes(evidence: Evidence) -> Iterator[Cause]:
    """Updates that are too long: one task's, or the whole one where lowering that task does not mend it."""
    dominating = list(one_task_dominates(evidence))
    yield from dominating
    yield from overshoot(evidence, {found.subject: found.numbers["factor"] for found in dominating})


def overshoot(evidence: Evidence, lowered: Mapping[str, float]) -> Iterator[Cause]:
    """The whole update is too long: some way before the merge, on the line from the base, every task together is better off.

    `lowered`: task -> factor on its share that another cause asks for; what that mends already is not told twice.
    """
    examples = {task: objective.num_examples for task, objective in evidence.kept.items()}
    totals = {
        s: sum(losses[t] * n for t, n in examples.items()) for s, losses in evidence.path.items() if 0 < s < 1
    }
    if not evidence.measured or not totals or not examples:
        return
    share = min(totals, key=totals.__getitem__)
    saving = evidence.saving(evidence.along_path(share))
    if not evidence.matters(saving):
        return
    if lowered:
        used = evidence.coefficients()
        mended = evidence.with_changes({task: used[task] * (factor - 1) for task, factor in lowered.items()})
        left = evidence.saving(evidence.along_path(share, mended), start=evidence.measure(mended))
        if not evidence.matters(left):
            return
    yield cause(
        "all_weights_too_large",
        "merged",
        f"at {share:.0%} of the way from the base to the merge the tasks lose {saving.nats:.0f} nats less than at the merge",
        f"multiply every weight by about {share:g} (or average: 1/{len(evidence.tasks)} each)",
        CHOICE,
        saving,
        share=share,
    )


def undershoot(evidence: Evidence) -> Iterator[str]:
    """A note where the whole update is too short: beyond the merge, on the line from the base, every task together is better off.

    No cause: sparse rules such as TIES shorten updates on purpose, and most merges gain a little further on. Asked only where nothing
    else was found.
    """
    if not evidence.measured or evidence.cost() < SHARE_OF_GAIN * evidence.gain():
        return  # as good as the fine-tunes: beyond them lies more training, not a better merge
    savings = {factor: evidence.saving(evidence.along_path(factor)) for factor in BEYOND}
    factor, saving = max(savings.items(), key=lambda item: item[1].nats)
    if evidence.matters(saving):
        yield (
            f"the weights may be too small: at {factor:g} times the merge's update the tasks lose {saving.nats:.0f} nats less"
            f"{_auto(evidence, *evidence.tasks)}"
        )


def _ratio(value: float, others: list[float]) -> float:
    """How many times the median of the others; inf where they are all zero."""
    middle = median(others)
    return value / middle if middle > 0 else (math.inf if value > 0 else 1.0)


def _forecast(evidence: Evidence, repaired: Mapping[str, float]) -> float | None:
    """What other coefficients save by the forecast, nats; None where there is none."""
    if not evidence.products:
        return None
    import numpy as np

    used = evidence.coefficients()
    before, after = (
        sum(p.rise(np.array([c[d] for d in p.directions])) for p in evidence.products)
        for c in (used, repaired)
    )
    return max(0.0, before - after)


def best_weights(evidence: Evidence) -> BestWeights:
    """The weights that the forecast likes best, over the tasks that are kept."""
    importance = {p.task: 1 / p.num_examples for p in evidence.products if evidence.alpha[p.task] >= 0}
    return best_coefficients(evidence.products, importance or None)


def _auto(evidence: Evidence, *tasks: str) -> str:
    """What the forecast would choose."""
    if not evidence.products:
        return ""
    best = best_weights(evidence).coefficients
    found = ", ".join(f"{best[task]:.2g}" for task in tasks)
    return f" (the forecast's best {plural(len(tasks))} {found})"
