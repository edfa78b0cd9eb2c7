"""Causes in the choices: floors and statistics that another setting mends, and tasks that cannot be had together."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from gradmatch.diagnosis.cause import CHOICE, INPUT, Cause, cause
from gradmatch.diagnosis.evidence import Saving
from gradmatch.diagnosis.repairs import with_floor
from gradmatch.diagnosis.source import PIECE
from gradmatch.estimators.curvature import Curvature
from gradmatch.measure import health
from gradmatch.models.curvatures import Prior, blocks
from gradmatch.models.stores import spans, take

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradmatch.diagnosis.evidence import Evidence

# Channels off by a standard deviation on average, where there is no data to measure the cost on.
SHIFT = 1.0
HALF = 0.5
# A task that keeps a tenth of its gain over the base keeps next to nothing.
NEXT_TO_NOTHING = 0.1
# Coefficients of a pair that are looked at before a conflict is called one.
PAIR = ((0.5, 0.5), (0.3, 0.3), (0.7, 0.3), (0.3, 0.7), (1.0, 1.0))


def floor_decides(evidence: Evidence) -> Iterator[Cause]:
    """delta0 above the curvature on most weights: the rule has become task arithmetic."""
    if not evidence.uses_curvature or set(evidence.curvatures) < set(evidence.tasks) or evidence.delta0 <= 0:
        return
    share = _below_floor(evidence)
    if share <= HALF:
        return
    saving = None
    if evidence.measured and evidence.base_curvature is not None:
        saving = evidence.saving(with_floor(evidence, max(evidence.delta0 * 1e-9, 1e-9)))
        if not evidence.matters(saving):
            return
    yield cause(
        "floor_decides",
        "delta0",
        f"delta0 = {evidence.delta0:g} is above the curvature on {share:.0%} of the weights: there the merge is task arithmetic",
        "lower delta0 (the default is 1e-6), or choose task arithmetic on purpose with smaller weights",
        INPUT,
        saving,
        share=share,
    )


def _below_floor(evidence: Evidence) -> float:
    """Share of the weights on which H0 + sum_t alpha_t H_t without the floor is below it; 0 where no curvature covers any."""
    below = weights = 0
    base, prior = evidence.base_curvature, Prior.of(evidence.base_curvature, evidence.base_weight)
    held = [(blocks(c), c.num_examples * evidence.alpha[task]) for task, c in evidence.curvatures.items()]
    given = blocks(base) if isinstance(base, Curvature) else None
    for name, tensor in evidence.scan.tensors.items():
        if all(name in store for store, _ in held):
            for first, last in spans(tensor.numel, PIECE):
                h = torch.full((last - first,), prior.number)
                if given is not None and name in given:
                    h += prior.at(take(given, name, first, last))
                for store, scale in held:
                    h += take(store, name, first, last) * scale
                low, numel = health.floor_share(h, evidence.delta0)
                below, weights = below + low, weights + numel
    return below / max(1, weights)


def stale_batchnorm(evidence: Evidence) -> Iterator[Cause]:
    """BatchNorm statistics that are not those of the merge's own activations."""
    if not evidence.batchnorm:
        return
    layer, shift = max(evidence.batchnorm.items(), key=lambda item: item[1])
    saving = None
    if evidence.measured and evidence.merged is not None and evidence.batchnorm_repair:
        saving = evidence.saving({**evidence.merged, **evidence.batchnorm_repair})
    if shift >= SHIFT if saving is None else evidence.matters(saving):
        yield cause(
            "stale_batchnorm",
            "merged",
            f"the inputs of {layer} lie {shift:.1f} standard deviations off its stored statistics",
            "recalibrate the BatchNorm statistics on a few batches of every task (batchnorm: recalibrate)",
            CHOICE,
            saving,
            shift=shift,
        )


def tasks_conflict(evidence: Evidence) -> Iterator[Cause]:
    """Tasks that cannot be had together: whatever the weights of the two, one of them keeps next to nothing.

    Pairs that share a task are told as one cause, of the task that most of them share.
    """
    known = [task for task in evidence.kept if task in evidence.losses and evidence.gained(task)]
    found = {pair: _best_compromise(evidence, *pair) for pair in combinations(known, 2)}
    left = {pair: compromise for pair, compromise in found.items() if compromise[0] < NEXT_TO_NOTHING}
    cosines, place = evidence.scan.cosines(), evidence.scan.tasks.index
    while left:
        hub = max(known, key=lambda task: sum(task in pair for pair in left))
        pairs = {pair: left.pop(pair) for pair in list(left) if hub in pair}
        partners = [a if b == hub else b for a, b in pairs]
        kept = min(share for share, _ in pairs.values())
        cosine = min(float(cosines[place(hub), place(other)]) for other in partners)
        others = ", ".join(repr(other) for other in partners)
        nats = max(
            sum(rises[task] * evidence.objectives[task].num_examples for task in pair)
            for pair, (_, rises) in pairs.items()
        )
        yield cause(
            "tasks_conflict",
            " and ".join(sorted([hub, *partners], key=known.index)) if len(pairs) == 1 else hub,
            f"at the best weights found for {hub!r} and each of {others} alone, one of the two keeps as little as {kept:.0%} of what "
            f"its fine-tuning gained over the base (negative: worse than the base; cosine of the task vectors {cosine:.2f})",
            "merge only one of the two, or keep both as experts of a mixture"
            if len(pairs) == 1
            else f"leave {hub!r} out, or keep it as an expert of a mixture",
            CHOICE,
            Saving(nats, 0.0),
            kept=kept,
            cosine=cosine,
            pairs=float(len(pairs)),
        )


def _best_compromise(evidence: Evidence, a: str, b: str) -> tuple[float, dict[str, float]]:
    """The share of its gain that the worse off of two tasks keeps at the best weights tried, and the rises there (nats each).

    It stops at the first weights that leave both more than next to nothing: then there is no conflict to tell of.
    """
    best, at_best = -math.inf, {a: math.inf, b: math.inf}
    for first, second in PAIR:
        losses = evidence.pair_losses(a, b, first, second)
        rises = {t: evidence.rise(losses, t) for t in (a, b)}
        kept = min(1 - rises[t] / evidence.task_gain(t) for t in (a, b))
        if kept > best:
            best, at_best = kept, rises
        if best >= NEXT_TO_NOTHING:
            break
    return best, at_best
