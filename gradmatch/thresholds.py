"""The k-th largest |tau| of a whole model, exactly, without holding its task vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradmatch.engine import Context, pieces
from gradmatch.evaluate import task_vectors
from gradmatch.kernels import Buffers
from gradmatch.transforms.ties import kept_count

if TYPE_CHECKING:
    from gradmatch.plan import Step

DIGIT = 16  # bits counted per pass


def global_thresholds(context: Context) -> dict[tuple[int, float], Tensor]:
    """(position of the TIES edit, density) -> each task's threshold, (T,), for edits that trim over the whole model."""
    wanted: dict[tuple[int, float], list[Step]] = {}
    for step in context.plan.steps:
        for position, (name, options) in enumerate(step.edits):
            if name == "ties" and options["trim"] == "global" and options["density"] < 1:
                wanted.setdefault((position, options["density"]), [])
    thresholds: dict[tuple[int, float], Tensor] = {}
    for position, density in wanted:
        steps = [step for step in context.plan.steps if len(step.edits) > position and step.action == "merge"]
        thresholds[position, density] = select(context, steps, position, density)
    return thresholds


def select(context: Context, steps: list[Step], position: int, density: float) -> Tensor:
    """Radix selection on the bits of |tau|, which order like the values: 16 bits a pass, from the top."""
    wide = any(step.compute == "F64" for step in steps)
    floats, integers, width = (torch.float64, torch.int64, 64) if wide else (torch.float32, torch.int32, 32)
    tasks = len(context.inputs.tasks)
    sizes = [sum(step.spec.numel for step in steps if t in step.tasks) for t in range(tasks)]
    rank = [kept_count(density, size) for size in sizes]  # counted from the largest
    prefix = [0] * tasks
    buffers = Buffers()
    for low in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(tasks, 1 << DIGIT, dtype=torch.int64)
        for step in steps:
            for first, last in pieces(step, context, 0, step.spec.numel):
                _, tau = task_vectors(context, step, first, last, buffers, {}, edits=position)
                bits = tau.abs().to(floats).view(integers)
                for row, t in enumerate(step.tasks):
                    digits = bits[row] >> low
                    if low < width - DIGIT:
                        digits = digits[(digits >> DIGIT) == prefix[t]]
                    counts[t] += torch.bincount(digits & ((1 << DIGIT) - 1), minlength=1 << DIGIT)
        for t in range(tasks):
            if not sizes[t]:
                continue
            from_top = counts[t].flip(0).cumsum(0)
            place = int(torch.searchsorted(from_top, rank[t]))
            digit = (1 << DIGIT) - 1 - place
            rank[t] -= int(from_top[place] - counts[t][digit])
            prefix[t] = (prefix[t] << DIGIT) | digit
    return torch.tensor(prefix, dtype=integers).view(floats)
