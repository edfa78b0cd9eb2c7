"""Pieces merged by the compiled kernels of `blocks.c`: read, merged, rounded and checked in one pass, outside the interpreter.

The merged values are the bits that torch gives (`kernels.py`, `electing.py`, `rounding.py`); sums for the report may differ in
their last digits. They serve linear combinations, Eq. 12 and TIES in float32, from and into float32, bfloat16 and float16. A
piece that holds anything but finite numbers, or a curvature that is not positive, is left to torch, which says what is wrong.
"""

from __future__ import annotations

from ctypes import byref, c_double, c_float
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradmatch.engine.compiled import CurvedTask, Kernels, Source, Target, Voter, Window
from gradmatch.engine.context import Context, add, plain_file
from gradmatch.engine.electing import just_below
from gradmatch.engine.evaluate import ties_terms
from gradmatch.engine.kernels import CACHE
from gradmatch.engine.rounding import MEASURED
from gradmatch.estimators import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from gradmatch.engine.kernels import Buffers
    from gradmatch.models.curvatures import CurvatureStore
    from gradmatch.models.stores import Store
    from gradmatch.plan.step import Coefficients, Plan, Step

SOURCE = Path(__file__).with_name("blocks.c")
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fno-trapping-math",
)
PIECE = 4  # blocks merged by one call: so few calls that the workers seldom wait for each other's interpreter
LARGE = 32_000_000  # values merged, from which on compiling (a second, once a machine) is worth while unasked
KINDS = {"F32": 0, "BF16": 1, "F16": 2}
GROUPS = 8  # distinct |weights| that the kernel of TIES counts


def kernels_for(made: Plan) -> Kernels | None:
    """The kernels, where they are asked for or the merge is large enough to pay for compiling them."""
    asked = native.asked()
    large = sum(step.spec.numel for step in made.steps if step.tasks) >= LARGE
    if asked is None:
        asked = large and native.has_compiler()
    library = native.load(SOURCE, FLAGS) if asked else None
    return Kernels(library) if library else None


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
    kernels, request = context.kernels, context.plan.request
    path = step.path
    kind = KINDS.get(step.spec.dtype)
    if kernels is None or kind is None or step.compute != "F32" or path not in ("linear", "ties", "eq12"):
        return False
    if request.rounding == "stochastic" and step.spec.dtype == "BF16":
        return False
    call = Call(kernels, buffers, first, first + written.numel())
    to = Target(written.data_ptr(), first, CACHE, MEASURED, kind)
    try:
        if path == "eq12":
            found = _eq12(call, context, step, to)
        elif path == "ties":
            assert coefficients is not None
            found = _ties(call, context, step, coefficients, to)
        else:
            assert coefficients is not None
            found = _linear(call, context, step, coefficients, to)
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
        self._buffers, self._held = buffers, list[Any]()

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
            room = self._buffers.get(f"room {len(self._held)}", 4 * self.kernels.step, torch.uint8)
            self._held.append(room)
            fd, offset = file.place(name, self.first)
            return Source(None, room.data_ptr(), offset, fd, kind)
        values = store.block(name, self.first, self.last).contiguous()
        self._held.append(values)
        return Source(values.data_ptr(), None, 0, -1, kind)

    def curvature(self, store: CurvatureStore | None, name: str) -> Source | None:
        """The same of a curvature block; None where it is flat."""
        key = store.key(name) if store is not None else None
        return None if store is None or key is None else self.source(store, key)


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
    done = call.kernels.linear(call.count, len(used), x, _floats([ck for ck, _ in used]), theta0, byref(to))
    return None if done else {}


def _eq12(call: Call, context: Context, step: Step, to: Target) -> dict[str, float] | None:
    """Eq. 12 without a guard; see `kernels.eq12`."""
    request, inputs = context.plan.request, context.inputs
    if step.guarded:
        return None
    base, number, scale, h0 = inputs.base_curvature, 0.0, 1.0, None
    if isinstance(base, float):
        number = base * request.base_weight
    elif base is not None:
        h0, scale = call.curvature(base, step.name), request.base_weight * base.num_examples
    tasks = []
    for t, alpha in zip(step.tasks, step.alpha, strict=True):
        task, signed = inputs.tasks[t], step.sign * alpha
        mean = call.curvature(task.mean, step.name)
        examples = float(task.mean.num_examples) if task.mean else 0.0
        theta = call.source(task.store, step.name)
        tasks.append(
            CurvedTask(theta, mean or Source(), signed, examples, signed * examples, mean is not None)
        )
    health = (c_double * 2)()
    done = call.kernels.eq12(
        call.count, len(tasks), (CurvedTask * len(tasks))(*tasks), call.source(inputs.store, step.name), h0, scale,
        number + request.delta0, request.delta0, byref(to), health,
    )  # fmt: skip
    floored = health[0] if request.delta0 else 0.0
    return None if done else {"floored": floored, "update": health[1], "weights": call.count}


def _ties(
    call: Call, context: Context, step: Step, coefficients: Coefficients, to: Target
) -> dict[str, float] | None:
    """TIES by itself; see `electing.ties`."""
    inputs, normalize = context.inputs, step.edits[0][1]["normalize"]
    thresholds, scale, rest = ties_terms(context, step, coefficients)
    sizes = {abs(alpha) for alpha in step.alpha if alpha}
    unit = sizes.pop() if len(sizes) == 1 else 1.0  # equal weights count as 1, which is exact
    groups: dict[float, int] = {}
    voters = []
    for t, threshold, alpha in zip(step.tasks, thresholds, step.alpha, strict=True):
        if alpha:
            weight = alpha / unit
            excluded = just_below(threshold, torch.float32) if threshold > 0 else 0.0
            group = groups.setdefault(abs(weight), len(groups))
            voters.append(Voter(call.source(inputs.tasks[t].store, step.name), weight, excluded, group))
    if len(groups) > GROUPS:
        return None
    health = (c_double * 3)()
    done = call.kernels.ties(
        call.count, len(voters), (Voter * len(voters))(*voters), call.source(inputs.store, step.name), len(groups),
        _floats(list(groups)), scale / 2 if normalize else scale * unit / 2, context.majority, normalize, rest, byref(to), health,
    )  # fmt: skip
    conflicts, cancelled, signs = health
    return (
        None
        if done
        else {"conflicts": conflicts, "cancelled": cancelled, "signs": signs, "weights": call.count}
    )


Counted = tuple[int, "NDArray[np.float32]"]  # values above a window, and those inside


def windows(
    context: Context,
    step: Step,
    first: int,
    last: int,
    wanted: Sequence[tuple[int, float, float]],
    buffers: Buffers,
) -> list[Counted] | None:
    """For every (task, low, high): how many |tau| of a piece are above high, and those from low to high.

    None where torch must look. Thresholds of float32 task vectors only.
    """
    kernels, inputs = context.kernels, context.inputs
    if kernels is None or step.compute != "F32":
        return None
    call, found = Call(kernels, buffers, first, last), (Window * len(wanted))()
    inside = [buffers.get(f"inside {number}", call.count, torch.float32) for number in range(len(wanted))]
    try:
        theta0 = call.source(inputs.store, step.name)
        for window, values, (t, low, high) in zip(found, inside, wanted, strict=True):
            theta = call.source(inputs.tasks[t].store, step.name)
            window.theta, window.inside, window.low, window.high = theta, values.data_ptr(), low, high
    except Unfit:
        return None
    if kernels.windows(call.count, len(wanted), found, theta0):
        return None
    return [
        (window.above, values[: window.held].numpy().copy())
        for window, values in zip(found, inside, strict=True)
    ]


def _floats(values: Sequence[float]) -> Any:
    return (c_float * len(values))(*values)
