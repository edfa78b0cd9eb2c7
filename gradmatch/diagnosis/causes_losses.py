"""What a merge does to the losses, whatever the reason: tasks below their base, a base that forgot, weights far from the best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradmatch.diagnosis.cause import CHOICE, SYMPTOM, Cause, cause, plural
from gradmatch.diagnosis.causes_sizes import best_weights
from gradmatch.diagnosis.evidence import SHARE_OF_GAIN, STANDARD_ERRORS, Saving, error_of_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from gradmatch.diagnosis.evidence import Evidence

FAR = 2.0  # times the best weight, or a half of it
# Of what fine-tuning gained: healthy averages of three tiny tasks leave up to .35 of it to the best weights, weights of .04 from .48 on.
LEFT = 0.4
FOLLOWS = (
    0.5  # a rule whose coefficients are further than this share from the weights asked for chooses its own
)
DOUBLED = math.log(2)  # nats of a prediction: the perplexity has doubled


def worse_than_base(evidence: Evidence) -> Iterator[Cause]:
    """Tasks whose loss at the merge is above the base's, by more than two standard errors of the difference."""
    below = {
        task: (merged, base)
        for task, merged, base in _kept_losses(evidence)
        if float((merged - base).mean()) > 2 * error_of_mean(merged - base)
    }
    if not below:
        return
    told = [
        f"on {task!r} {evidence.told(task, merged)}, its base {evidence.told(task, base)}"
        for task, (merged, base) in below.items()
    ]
    nats = sum(float((m - b).sum()) * evidence.objectives[task].scale for task, (m, b) in below.items())
    yield cause(
        "worse_than_base",
        ", ".join(below),
        f"the merge loses {'; '.join(told[:4])}"
        + (f"; and {len(told) - 4} more tasks" if len(told) > 4 else ""),
        f"choose other weights (--weights auto), or leave {' and '.join(map(repr, below))} out: the base alone serves "
        f"{plural(len(below), 'it', 'them')} better",
        SYMPTOM,
        Saving(nats, 0.0),
        **{
            task: evidence.per(task, merged) - evidence.per(task, base)
            for task, (merged, base) in below.items()
        },
    )


def base_forgotten(evidence: Evidence) -> Iterator[Cause]:
    """The base's loss on data of its own rose at the merge: by a quarter of what it knew beyond a uniform guess, or its perplexity doubled."""
    if evidence.base_objective is None or "base" not in evidence.losses.get("merged", {}):
        return
    losses = {model: found["base"] for model, found in evidence.losses.items()}
    before, after = losses["base"], losses["merged"]
    count = 1.0 if "base" not in evidence.predictions else float(evidence.predictions["base"].mean())
    rise = evidence.per("base", after) - evidence.per("base", before)
    knew = max(0.0, evidence.uniform["base"] - float(before.mean())) / count
    noise = STANDARD_ERRORS * error_of_mean(after - before)
    if not rise > min(SHARE_OF_GAIN * knew, DOUBLED) or float((after - before).mean()) <= noise:
        return
    worst = max(evidence.tasks, key=lambda task: evidence.per("base", losses[task]))
    alone = evidence.per("base", losses[worst]) - evidence.per("base", before)
    half = evidence.base_objective.losses(evidence.along_path(0.5))
    left = evidence.per("base", half) - evidence.per("base", before)
    removing = all(weight <= 0 for weight in evidence.alpha.values())
    yield cause(
        "base_forgotten",
        "merged",
        f"on the base's own data the merge loses {evidence.told('base', after)}, the base {evidence.told('base', before)}; half-way "
        f"there the rise is {left:.3g} instead of {rise:.3g}, and {worst!r} alone makes it {alone:.3g}",
        "remove less: a smaller weight (`gradmatch budget` finds the largest one within a budget)"
        if removing
        else "use smaller weights, or gradient_matching with the base's curvature, whose base_weight holds on to what the base knows",
        SYMPTOM,
        Saving(float((after - half).sum()) * evidence.base_objective.scale, 0.0),
        rise=rise,
        half_way=left,
        largest_task=alone,
    )


def far_from_best(evidence: Evidence) -> Iterator[Cause]:
    """Weights more than twice, or less than half, the forecast's best ones, where the tasks would gain much by those.

    Rules that choose coefficients of their own (Model Stock, sign elections) are not judged by the weights asked for.
    """
    tasks, used = _far(evidence), evidence.coefficients()
    own = any(abs(used[t] - alpha) > FOLLOWS * abs(alpha) for t, alpha in evidence.alpha.items())
    if not tasks or own:
        return
    best = best_weights(evidence).coefficients
    saving = evidence.saving(evidence.at_coefficients(best))
    if not evidence.matters(saving) or saving.nats < LEFT * evidence.gain():
        return
    listed = ", ".join(
        f"{task} {alpha:.3g} (best: {best[task]:.3g})" for task, alpha in evidence.alpha.items()
    )
    yield cause(
        "weights_far_from_best",
        tasks[0] if len(tasks) == 1 else "merged",
        f"the weights are far from those that the forecast likes best: {listed}; there the tasks lose {saving.nats:.0f} nats less",
        f"merge with the weights {', '.join(f'{best[task]:.2g}' for task in evidence.tasks)} (--weights auto chooses them)",
        CHOICE,
        saving,
        **{task: best[task] for task in tasks},
    )


def doubts(evidence: Evidence) -> list[str]:
    """What forbids to say that nothing is wrong, although it is no cause: losses above the base's within the noise, odd weights."""
    found = [
        f"{task!r} is no better off than at the base ({evidence.told(task, merged)}, {evidence.told(task, base)} there)"
        for task, merged, base in _kept_losses(evidence)
        if float(merged.mean()) > float(base.mean())
    ]
    far = _far(evidence)
    if far:
        used, best = evidence.coefficients(), best_weights(evidence).coefficients
        listed = ", ".join(f"{task} {used[task]:.2g} (best: {best[task]:.2g})" for task in far[:6])
        found.append(f"the coefficients are far from the forecast's best: {listed}")
    return found


def _far(evidence: Evidence) -> list[str]:
    """Tasks whose coefficient in the merge is more than FAR times the forecast's best, or less than its FAR-th part."""
    if not evidence.measured or not evidence.products or set(evidence.kept) != set(evidence.tasks):
        return []
    used, best = evidence.coefficients(), best_weights(evidence).coefficients
    moved = evidence.scan.norms()
    return [
        task
        for task in evidence.tasks
        if moved[task] > 0
        and max(abs(used[task]), abs(best[task])) > FAR * min(abs(used[task]), abs(best[task]))
    ]


def _kept_losses(evidence: Evidence) -> list[tuple[str, Tensor, Tensor]]:
    """(task, its losses at the merge, at the base) of the tasks that are not taken away; none where the merge has no finite loss."""
    merged = evidence.losses.get("merged", {})
    return [
        (task, merged[task], evidence.losses["base"][task])
        for task in evidence.kept
        if task in merged and bool(merged[task].isfinite().all())
    ]
