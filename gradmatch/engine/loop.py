"""The streaming loop: every step of a plan, piece by piece, from the stores through a rule into a sink.

Workers take tensors (or parts of large ones) in the plan's order and share no state; the thread that hands them out tells
the kernel what will be read next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gradmatch.engine import fused
from gradmatch.engine.after import edited
from gradmatch.engine.context import Context, add, pieces
from gradmatch.engine.evaluate import evaluate, linear_terms
from gradmatch.engine.rounding import converted, finish
from gradmatch.engine.thresholds import look
from gradmatch.engine.workers import over_units, units
from gradmatch.models.stores import torch_dtype

if TYPE_CHECKING:
    from gradmatch.engine.buffers import Buffers
    from gradmatch.plan.step import Plan, Step


class Sink(Protocol):
    """Where merged values go."""

    def write(self, step: Step, first: int, values: Tensor) -> None:
        """Store flat values, in the output's dtype, from element `first` on."""

    def finish(self, step: Step, stats: Mapping[str, float]) -> None:
        """All of a tensor is written."""


class MemorySink:
    """Merged tensors as a dict."""

    def __init__(self, plan: Plan) -> None:
        self.tensors = {
            step.name: torch.empty(step.spec.shape, dtype=torch_dtype(step.spec.dtype)) for step in plan.steps
        }

    def write(self, step: Step, first: int, values: Tensor) -> None:
        """Copy into the tensor."""
        self.tensors[step.name].view(-1)[first : first + values.numel()].copy_(values)

    def finish(self, step: Step, stats: Mapping[str, float]) -> None:
        """Nothing to do in memory."""


def run(
    context: Context, sink: Sink, steps: Sequence[Step], on_progress: Callable[[int], object] | None = None
) -> dict[str, dict[str, float]]:
    """Carry out steps; returns each tensor's statistics.

    Args:
        context: the plan and its passes.
        sink: takes the values.
        steps: what is left to do.
        on_progress: called with bytes read, as tensors finish.

    Raises:
        ValueError: NaN or Inf in an input, or a coordinate without any curvature while delta0 = 0; tensor and input named.
    """
    stats: dict[str, dict[str, float]] = {}
    left: dict[str, int] = {}
    for step, *_, total in units(steps, context):
        left.setdefault(step.name, total)
    for step, part in over_units(context, steps, partial(_merge_unit, context, sink)):
        add(stats.setdefault(step.name, {}), part)
        left[step.name] -= 1
        if not left[step.name]:
            sink.finish(step, stats[step.name])
            if on_progress:
                on_progress(step.bytes_read)
    return stats


def _merge_unit(
    context: Context, sink: Sink, step: Step, first: int, last: int, buffers: Buffers
) -> dict[str, float]:
    """All pieces of one unit, one after the other; returns its statistics."""
    stats: dict[str, float] = {}
    dtype = torch_dtype(step.spec.dtype)
    if not step.tasks:
        for start, stop in pieces(step, first, last):
            values = context.inputs.store.block(step.name, start, stop)
            sink.write(step, start, values if values.dtype == dtype else converted(step, values, dtype))
        return stats
    look(context, step, buffers)
    coefficients = linear_terms(context, step, buffers, stats)
    evaluated = edited if step.after else evaluate
    blocks = fused.PIECE if context.kernels else context.blocks
    for start, stop in [(first, last)] if step.assembles else pieces(step, first, last, blocks):
        written = buffers.host("written", stop - start, dtype)
        if not fused.merge(context, step, start, written, coefficients, buffers, stats):
            for at, end in [(start, stop)] if step.assembles else pieces(step, start, stop, context.blocks):
                merged, theta0 = evaluated(context, step, at, end, coefficients, buffers, stats)
                out = written[at - start : end - start]
                _finish_blocks(context, step, at, merged, theta0, out, buffers, stats)
        sink.write(step, start, written)
    return stats


def _finish_blocks(
    context: Context,
    step: Step,
    first: int,
    merged: Tensor,
    theta0: Tensor | None,
    out: Tensor,
    buffers: Buffers,
    stats: dict[str, float],
) -> None:
    """`finish` of a piece, back from the device and block by block."""
    merged, theta0 = merged.cpu(), None if theta0 is None else theta0.cpu()
    for start, stop in pieces(step, first, first + merged.numel()):
        part = slice(start - first, stop - first)
        base = None if theta0 is None else theta0[part]
        finish(context, step, start, merged[part], base, out[part], buffers, stats)
