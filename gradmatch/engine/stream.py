"""Passes over the whole model around the streaming loop: global thresholds before it, a second look after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gradmatch.engine.compiled import kernels
from gradmatch.engine.context import Context
from gradmatch.engine.loop import Sink, run
from gradmatch.engine.thresholds import look_over_model, shares
from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from gradmatch.plan.step import Plan


def stream(
    made: Plan,
    sink: Sink,
    finished: Mapping[str, dict[str, float]],
    on_progress: Callable[[int], object] | None = None,
) -> dict[str, dict[str, float]]:
    """Carry out a plan but for what is finished already; returns every tensor's statistics."""
    context = Context(made, kernels=kernels() if made.request.device == "cpu" else None)
    look_over_model(context)
    context.norms = fisher_norms(context)
    context.mean_h0 = mean_of_h0(context)
    stats = {name: dict(values) for name, values in finished.items()}
    left = [step for step in made.steps if step.name not in stats]
    stats |= run(context, sink, left, on_progress)
    elected = any(options.get("cancelled") == "majority" for _, options in made.request.edits)
    if elected and sum(values.get("signs", 0.0) for values in stats.values()) < 0:
        # the majority is negative after all: entries that cancel exactly take its sign, so their tensors are done again
        context.majority = -1.0
        again = [step for step in made.steps if stats.get(step.name, {}).get("cancelled")]
        stats |= run(context, sink, again)
    made.told["kept_shares"] = shares(context)
    return stats


def fisher_norms(context: Context) -> list[float]:
    """Norm of each task's mean Fisher over all merged tensors, where the rule divides by it; else nothing."""
    import torch

    steps = context.plan.merged
    if not any(step.options.get("normalize_fishers") for step in steps):
        return []
    norms = []
    for task in context.inputs.tasks:
        assert task.mean is not None
        total = 0.0
        for step in steps:
            if step.name in task.mean:
                block = task.mean.block(step.name, 0, step.spec.numel).to(torch.float64)
                total += float(block.square().sum())
        norms.append(total**0.5 or 1.0)
    return norms


def mean_of_h0(context: Context) -> float:
    """Mean of the diagonal of H0, of the summed loss and without the floor, over all weights that it covers; 0 where no rule asks.

    Raises:
        ValueError: it is not positive.
    """
    import torch

    given, request = context.inputs.base_curvature, context.plan.request
    if not request.rule.damped or given is None:
        return 0.0
    if isinstance(given, float):
        mean = given
    else:
        blocks = [given.curvature.mean(name) for name in given.curvature]
        total = math.fsum(float(block.sum(dtype=torch.float64)) for block in blocks)
        mean = given.num_examples * total / sum(block.numel() for block in blocks)
    if not request.base_weight * mean > 0:
        raise GradmatchError(
            f"the mean of the diagonal of H0 is {request.base_weight * mean:g}, and {request.method} damps with a share of it: give a "
            "base_curvature (a Fisher or GGN) that is positive, and a base_weight above 0",
            "not_positive",
            "base_curvature",
        )
    return request.base_weight * mean
