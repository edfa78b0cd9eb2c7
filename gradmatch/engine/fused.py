"""Pieces merged by the compiled extension (`blocks.c`): read, merged, rounded and checked in one pass, outside the interpreter.

The merged values are the bits that the readable rules give; sums for the report may differ in their last digits. It serves
linear combinations, Eq. 12 and TIES in float32, from and into float32, bfloat16 and float16. A piece that holds anything but
finite numbers, or a curvature that is not positive, is left to the readable rule, which says what is wrong.
"""

from __future__ import annotations

from ctypes import byref, c_double, c_float
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.engine.compiled import CurvedTask, Histogram, Kernels, Source, Target, Voter
from gradmatch.engine.context import BLOCK, Context, add, plain_file
from gradmatch.engine.rounding import MEASURED
from gradmatch.engine.stacked import prior
from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gradmatch.engine.buffers import Buffers
    from gradmatch.models.curvatures import CurvatureStore
    from gradmatch.models.stores import Store
    from gradmatch.plan.step import Coefficients, Step

PIECE = 4  # blocks merged by one call: so few calls that the workers seldom wait for each other's interpreter
KINDS = {"F32": 0, "BF16": 1, "F16": 2}


def merge(
    context: Context,
    step: Step,
    first: int,
    written: Tensor,
    coefficients: Coefficients | None,
    buffers: Buffers,
    stats: dict[str, float],
) -> bool:
    """Merge the elements from `first` on into `written` (n,) and round them; False, with nothing counted, where torch must."""
    kernels, request, kind = context.kernels, context.plan.request, KINDS.get(step.spec.dtype)
    if (
        kernels is None
        or kind is None
        or step.compute != "F32"
        or step.path not in ("linear", "eq12", "ties")
    ):
        return False
    if request.rounding == "stochastic" and step.spec.dtype == "BF16":
        return False
    call = Call(kernels, buffers, first, first + written.numel())
    to = Target(written.data_ptr(), first, BLOCK, MEASURED, kind)
    try:
        if coefficients is None:
            found = _eq12(call, context, step, to)
        elif step.path == "linear":
            found = _linear(call, context, step, coefficients, to)
        else:
            found = _ties(call, context, step, coefficients, to)
    except Unfit:
        return False
    if found is None:
        return False
    add(stats, found)
    if to.update:
        add(stats, {"rounding_error": to.error, "rounded_update": to.update})
    return True


class Unfit(Exception):
    """An input of a dtype that the kernels do not read."""


class Call:
    """The sources of one call; what they point to lives as long as this."""

    def __init__(self, kernels: Kernels, buffers: Buffers, first: int, last: int) -> None:
        self.kernels, self.first, self.last = kernels, first, last
        self.buffers, self._held = buffers, list[Any]()

    @property
    def count(self) -> int:
        """How many values are merged."""
        return self.last - self.first

    def source(self, store: Store, name: str) -> Source:
        """The values of a tensor, from its file where they lie there as they are."""
        kind = KINDS.get(store.spec(name).dtype)
        if kind is None:
            raise Unfit
        file = plain_file(store, name)
        if file is not None:
            room = self.buffers.host(f"room {len(self._held)}", 4 * self.kernels.step, torch.uint8)
            self._held.append(room)
            fd, offset = file.place(name, self.first)
            return Source(None, room.data_ptr(), offset, fd, kind)
        values = store.block(name, self.first, self.last).contiguous()
        if values.device.type != "cpu":
            values = values.cpu()
        self._held.append(values)
        return Source(values.data_ptr(), None, 0, -1, kind)

    def curvature(self, store: CurvatureStore | None, name: str) -> Source | None:
        """The same of a curvature block; None where it is flat."""
        return None if store is None or name not in store else self.source(store, name)


def _linear(
    call: Call, context: Context, step: Step, coefficients: Coefficients, to: Target
) -> dict[str, float] | None:
    """c0 theta0 + sum_t c_t theta_t; see `evaluate`."""
    inputs = context.inputs
    stores = [inputs.store, *(inputs.tasks[t].store for t in step.tasks)]
    c = [coefficients[0], *coefficients[1]]
    used = [(ck, call.source(store, step.name)) for ck, store in zip(c, stores, strict=True) if ck]
    if not used:
        return None
    x = (Source * len(used))(*(source for _, source in used))
    theta0 = None
    if c[0]:
        theta0 = x  # its first
    elif step.spec.dtype != step.compute and step.name in inputs.store:
        theta0 = (Source * 1)(call.source(inputs.store, step.name))
    weights = (c_float * len(used))(*(ck for ck, _ in used))
    return None if call.kernels.linear(call.count, len(used), x, weights, theta0, byref(to)) else {}


def _eq12(call: Call, context: Context, step: Step, to: Target) -> dict[str, float] | None:
    """Eq. 12."""
    request, inputs = context.plan.request, context.inputs
    h_zero = prior(context)
    base = inputs.base_curvature
    h0 = None if base is None or isinstance(base, float) else call.curvature(base, step.name)
    tasks = []
    for t, alpha in zip(step.tasks, step.alpha, strict=True):
        task = inputs.tasks[t]
        mean = call.curvature(task.mean, step.name)
        examples = float(task.mean.num_examples) if task.mean else 0.0
        theta = call.source(task.store, step.name)
        tasks.append(CurvedTask(theta, mean or Source(), alpha, examples, mean is not None))
    health = (c_double * 2)()
    given, theta0 = (CurvedTask * len(tasks))(*tasks), call.source(inputs.store, step.name)
    constants = (h_zero.scale, h_zero.number, request.delta0)
    if call.kernels.eq12(call.count, len(tasks), given, theta0, h0, *constants, byref(to), health):
        return None
    floored = health[0] if request.delta0 else 0.0
    return {"floored": floored, "update": health[1], "weights": call.count}


def _ties(
    call: Call, context: Context, step: Step, coefficients: Coefficients, to: Target
) -> dict[str, float] | None:
    """TIES by itself under a rule that adds task vectors."""
    inputs, options, count = context.inputs, step.edits[0][1], len(step.tasks)
    thresholds = [value for value, _ in context.found[0, step.name].cuts[0]]
    voters = (Voter * count)(*(
        Voter(call.source(inputs.tasks[t].store, step.name), alpha, threshold, c)
        for t, alpha, threshold, c in zip(step.tasks, step.alpha, thresholds, coefficients[1], strict=True)
    ))  # fmt: skip
    work = call.buffers.host("work", count * call.kernels.chunk, torch.float32)
    health, theta0 = (c_double * 3)(), call.source(inputs.store, step.name)
    c0 = coefficients[0] + sum(coefficients[1])
    constants = (c0, options["scale"], context.majority, options["normalize"], work.data_ptr())
    if call.kernels.ties(call.count, count, voters, theta0, *constants, byref(to), health):
        return None
    return {"conflicts": health[0], "cancelled": health[1], "signs": health[2], "weights": float(call.count)}


def count_bits(
    context: Context,
    step: Step,
    first: int,
    last: int,
    wanted: Sequence[tuple[int, int, Tensor]],
    buffers: Buffers,
) -> bool:
    """Add the bits of |tau| to histograms, as `thresholds.count_bits` does; False where torch must.

    wanted: (task, prefix or -1, counts (65536,) int64).
    """
    kernels, inputs = context.kernels, context.inputs
    if kernels is None or step.compute != "F32":
        return False
    call = Call(kernels, buffers, first, last)
    try:
        theta0 = call.source(inputs.store, step.name)
        histograms = (Histogram * len(wanted))(*(
            Histogram(call.source(inputs.tasks[t].store, step.name), counts.data_ptr(), prefix)
            for t, prefix, counts in wanted
        ))  # fmt: skip
    except Unfit:
        return False
    if kernels.count_bits(call.count, len(wanted), histograms, theta0):
        raise GradmatchError(
            f"{step.name!r}: a file ended early; it changed since it was opened: fetch or write it again",
            "unreadable_file",
            step.name,
        )
    return True
