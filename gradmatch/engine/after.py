"""Edits of the merged update: of a piece, or of a whole matrix that is merged piece by piece first."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradmatch.engine.context import Context, add, pieces
from gradmatch.engine.evaluate import evaluate
from gradmatch.engine.stacked import TaskVectors, decomposed, whole_base
from gradmatch.models.stores import torch_dtype
from gradmatch.rules.after import AFTER
from gradmatch.rules.block import Update

if TYPE_CHECKING:
    from gradmatch.engine.buffers import Buffers
    from gradmatch.plan.step import Coefficients, Step


def edited(
    context: Context,
    step: Step,
    first: int,
    last: int,
    coefficients: Coefficients | None,
    buffers: Buffers,
    stats: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """`evaluate` of elements first to last, with the update edited as the step says: merged values and theta0, flat."""
    if not step.assembles:
        merged, theta0 = evaluate(context, step, first, last, coefficients, buffers, stats)
        assert theta0 is not None
        update = merged - theta0
    else:
        update = buffers.get("update", step.spec.numel, torch_dtype(step.compute))
        for start, stop in pieces(step, first, last, context.blocks):
            merged, theta0 = evaluate(context, step, start, stop, coefficients, buffers, stats)
            assert theta0 is not None
            torch.sub(merged, theta0, out=update[start:stop])
            del merged
        theta0 = whole_base(context, step, buffers)
    counted = step.counted
    for name, options in step.after:
        whole = AFTER[name].matrices
        value = update.reshape((step.spec.shape[0], -1) if whole else (-1,))
        tau = TaskVectors(context, step, theta0, buffers, value.shape, counted) if whole else ()
        given = Update(value, tau, len(counted), step.depth)
        update = decomposed(partial(AFTER[name].apply, given, options), value).reshape(-1)
    add(stats, {"update": float(torch.dot(update, update))})
    return update.add_(theta0), theta0
