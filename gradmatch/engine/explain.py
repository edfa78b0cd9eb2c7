"""Why a piece cannot be merged: not finite, or without a positive curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.engine.context import Context
    from gradmatch.plan.step import Step


def not_positive(step: Step, count: int, first: int, last: int) -> str:
    """What to say where Hbar, or the H0 that a removal is guarded by, is not positive, and what to do."""
    if step.guarded and step.kind == "solve":
        return (
            f"{step.name!r}: the curvature H0 - sum alpha_t H_t is not positive, and the exact solution has no guard; take "
            "solver='eigenbasis', which keeps part of H0, a smaller weight or a larger base_weight"
        )
    if step.guarded:
        return (
            f"{step.name!r}: at {count} weights (of elements {first} to {last}) the base's curvature H0 is not positive: it is "
            "negative there, as a Hessian's can be, and method='removal' has nothing of which to keep a part; take a GGN or Fisher "
            "curvature of the base, or raise delta0"
        )
    if step.rule and step.rule.family == "unmerged":
        return (
            f"{step.name!r}: of elements {first} to {last} nothing is left of the posterior without the task, or no more than rounding: "
            "either it was not merged with this curvature and weight, or no other model knows anything there; merge with "
            "precision='float64' and a larger delta0, or merge the other tasks anew"
        )
    if "ridge" in step.options and min(step.alpha) < 0:
        return (
            f"{step.name!r}: the sum of the tasks' moments of inputs is not positive, as a weight of {min(step.alpha):g} takes more away than "
            "the other tasks have in some direction; take weights of at least 0, or a rule that subtracts (task_arithmetic, removal)"
        )
    if "ridge" in step.options:
        return (
            f"{step.name!r}: the sum of the tasks' moments of inputs is singular (some inputs occur in no task) and the ridge of "
            f"{step.options['ridge']:g} does not mend it: pass a larger one, such as ridge=1e-6"
        )
    return (
        f"{step.name!r}: at {count} weights (of elements {first} to {last}) the curvature H0 + sum alpha_t H_t is not positive: a "
        "negative weight or a negative curvature (as a Hessian's) cancels it, so the merged loss has no minimum there; remove with "
        "subtract / method='removal', whose guard keeps part of H0, or take a smaller weight, or a GGN or Fisher curvature"
    )


def same_everywhere(context: Context, step: Step, first: int, merged: Tensor) -> Tensor | None:
    """The piece with the base's values where they are infinite and all tasks have the same (masks); else None."""
    inputs, last = context.inputs, first + merged.numel()
    bad = ~merged.isfinite()
    if step.name not in inputs.store:
        return None
    values = inputs.store.block(step.name, first, last)[bad].to(merged.dtype)
    stores = [inputs.tasks[t].store for t in step.tasks]
    others = (store.block(step.name, first, last)[bad].to(merged.dtype) for store in stores)
    if not bool(values.isinf().all()) or not all(torch.equal(values, other) for other in others):
        return None
    result = merged.clone()
    result[bad] = values
    return result


def explain(context: Context, step: Step, first: int, last: int, merged: Tensor) -> str:
    """Why a piece came out NaN or infinite: which input is not finite, or where no curvature is known at all."""
    inputs, request = context.inputs, context.plan.request
    for owner, store in inputs.stores(step.tasks):
        if step.name in store:
            bad = int((~store.block(step.name, first, last).to(torch.float64).isfinite()).sum())
            if bad:
                return f"{step.name!r} holds {bad} NaN or infinite values in {owner} (elements {first} to {last}); repair that input"
    bad = int((~merged.isfinite()).sum())
    if request.delta0 == 0 and step.rule and "curvature" in step.needs:
        where = "in the base" if step.guarded else "in any model"
        return (
            f"{step.name!r}: {bad} weights have no curvature {where} and delta0 = 0, so {step.rule.source} says nothing about them; "
            "pass delta0 > 0 (it falls back to task arithmetic there)"
        )
    return f"{step.name!r}: {bad} merged values are NaN or infinite though every input is finite; the weights or scales overflow"
