"""What subtraction needs beside Eq. 13: scaled tasks, and the largest weight that the base's curvature allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradmatch.inputs.opened import open_inputs
from gradmatch.plan.plan import plan
from gradmatch.plan.request import Request
from gradmatch.plan.settings import numbers, times
from gradmatch.task import Task

SHARES = (0.001, 0.01, 0.1)
BINS = 65_536  # by the upper 16 bits of a float32: bins 0.8 % wide


def scaled(task: Task, factor: float, *, signed: bool = False) -> Task:
    """The task with its weight times a factor.

    Raises:
        ValueError: a factor that is not finite; unless `signed`, a factor or weight below 0.
    """
    if not math.isfinite(factor) or (not signed and (factor < 0 or any(v < 0 for v in numbers(task.weight)))):
        raise ValueError(
            f"weight is {factor} and the task's own {task.weight}; both must be finite, and at least 0 to subtract"
        )
    return replace(task, weight=times(task.weight, factor))


def largest_alpha(
    base: Any,
    tasks: Sequence[Task],
    base_curvature: Any,
    *,
    keep: float,
    shares: Sequence[float] = SHARES,
    **options: Any,
) -> dict[float, float]:
    """share -> the largest factor on all weights for which less than this share of the weights is clamped.

    A weight is clamped when H0 - alpha H_t < keep H0, that is when alpha > (1 - keep) H0 / sum_t w_t H_t: the answer is a
    quantile of that ratio. Read from the curvatures alone, to within 0.8 % on the safe side; inf where nothing would be.
    """
    import torch

    from gradmatch.engine.context import Context, pieces
    from gradmatch.engine.kernels import Buffers
    from gradmatch.engine.stacked import curvature_pair

    known = {key: options[key] for key in Request.__dataclass_fields__ if key in options and key != "options"}
    request = Request(**{**known, "method": "removal", "options": {"keep": keep}})
    flags = {key: options[key] for key in ("allow_mismatch", "allow_pickle") if key in options}
    made = plan(open_inputs(base, tasks, request, base_curvature=base_curvature, **flags), request)
    context, buffers = Context(made), Buffers()
    counts, total = torch.zeros(BINS, dtype=torch.int64), 0
    for step in made.steps:
        if step.action != "merge":
            continue
        for first, last in pieces(step, 0, step.spec.numel):
            h0, h = curvature_pair(context, step, first, last, buffers)
            ratio = ((1 - keep) * h0 / h).float()  # inf where the tasks know nothing
            bits = ratio.nan_to_num(nan=math.inf, posinf=math.inf).view(torch.int32) >> 16
            counts += torch.bincount(bits, minlength=BINS)
            total += last - first
    below = counts.cumsum(0)
    limits = {}
    for share in shares:
        edge = int(torch.searchsorted(below, math.ceil(share * total)))  # the bin in which the quantile lies
        value = torch.tensor([edge << 16], dtype=torch.int32).view(torch.float32)
        limits[share] = float(value) if edge < BINS and math.isfinite(float(value)) else math.inf
    return limits
