"""The k-th largest |tau| of a whole model, exactly, without holding its task vector.

A sample of the blocks predicts where the threshold lies; one pass counts what is above that window and collects what is
inside; the threshold is then an order statistic of the few that were collected. Where the prediction missed (or too many
equal values fall into the window) a radix selection over the bits of |tau| finds it in two passes (four in float64).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradmatch.engine.evaluate import task_vectors
from gradmatch.engine.kernels import Buffers
from gradmatch.engine.loop import Context, WorkerBuffers, loader, mapped, parallel, pieces, units
from gradmatch.inputs.stores import torch_dtype
from gradmatch.transforms.ties import kept_count

if TYPE_CHECKING:
    from gradmatch.plan.plan import Step

DIGIT = 16  # bits counted per pass of the radix selection
SAMPLED, STRIDE = 16, 8  # one block in so many is sampled, and of it one value in so many
WINDOW = 0.01  # relative half-width of the predicted window
LIMIT = 4_000_000  # collected values, 16 MB of float32

Target = tuple[int, int]  # task, rank from the largest


def global_thresholds(context: Context) -> dict[tuple[int, float], Tensor]:
    """(position of the TIES edit, density) -> each task's threshold, (T,), for edits that trim over the whole model."""
    wanted: dict[int, set[float]] = {}
    for step in context.plan.steps:
        for position, (name, options) in enumerate(step.edits):
            if name == "ties" and options["trim"] == "global":
                density = options["density"]
                each = density if isinstance(density, tuple) else (density,)
                if shares := {share for share in each if share < 1}:
                    wanted.setdefault(position, set()).update(shares)
    tasks = len(context.inputs.tasks)
    thresholds: dict[tuple[int, float], Tensor] = {}
    context.thresholds = thresholds  # a later trim in a chain needs what was found for the earlier ones
    for position, shares in sorted(wanted.items()):
        steps = [step for step in context.plan.steps if len(step.edits) > position and step.action == "merge"]
        sizes = [sum(step.spec.numel for step in steps if t in step.tasks) for t in range(tasks)]
        targets = [
            (t, kept_count(share, sizes[t])) for share in sorted(shares) for t in range(tasks) if sizes[t]
        ]
        found = select(context, steps, position, targets, sizes)
        for share in sorted(shares):
            values = [found.get((t, kept_count(share, sizes[t])), 0.0) for t in range(tasks)]
            thresholds[position, share] = torch.tensor(values, dtype=torch.float64)
    return thresholds


def select(
    context: Context, steps: Sequence[Step], position: int, targets: Sequence[Target], sizes: Sequence[int]
) -> dict[Target, float]:
    """The values at the given ranks: by prediction and one pass, and by radix selection for what that missed."""
    found = predicted(context, steps, position, targets, sizes)
    missed = [target for target in targets if target not in found]
    return found | {target: radix(context, steps, position, target) for target in missed}


def magnitudes(
    context: Context, step: Step, first: int, last: int, position: int, buffers: Buffers, tasks: set[int]
) -> Iterator[tuple[int, Tensor]]:
    """(task, |tau|) of a piece, after the edits before `position`; each tensor is valid until the next is asked for."""
    dtype, count = torch_dtype(step.compute), last - first
    if position:
        _, tau = task_vectors(context, step, first, last, buffers, {}, edits=position)
        yield from ((t, row.abs()) for t, row in zip(step.tasks, tau, strict=True) if t in tasks)
        return
    theta0 = loader(context.inputs.store, step.name, first, last, dtype)(buffers.get("theta0", count, dtype))
    for t in step.tasks:
        if t in tasks:
            theta = loader(context.inputs.tasks[t].store, step.name, first, last, dtype)
            tau = buffers.get("tau", count, dtype)
            yield t, torch.sub(theta(buffers.get("load", count, dtype)), theta0, out=tau).abs_()


def predicted(
    context: Context, steps: Sequence[Step], position: int, targets: Sequence[Target], sizes: Sequence[int]
) -> dict[Target, float]:
    """Ranks found by sampling a window first; those whose window missed are absent."""
    windows = _windows(context, steps, position, targets, sizes)
    above = dict.fromkeys(windows, 0)
    inside: dict[Target, list[Tensor]] = {target: [] for target in windows}
    held = dict.fromkeys(windows, 0)
    buffers = WorkerBuffers()
    jobs = (
        (None, partial(_count_unit, context, step, first, last, position, windows, buffers))
        for step, first, last, _ in units(steps, context)
    )
    for _, counted in parallel(jobs):
        for target, (over, values) in counted.items():
            above[target] += over
            if held[target] <= LIMIT:
                inside[target].append(values)
                held[target] += values.numel()
    found = {}
    for target in windows:
        rank = target[1] - above[target]
        if 1 <= rank <= held[target] <= LIMIT:
            values = torch.cat(inside[target])
            found[target] = float(values.kthvalue(values.numel() + 1 - rank).values)
    return found


def _windows(
    context: Context, steps: Sequence[Step], position: int, targets: Sequence[Target], sizes: Sequence[int]
) -> dict[Target, tuple[float, float]]:
    """Where each threshold probably lies, from every STRIDE-th value of one block in SAMPLED."""
    tasks = {t for t, _ in targets}
    cells = [
        (step, first, last) for step in steps for first, last in pieces(step, context, 0, step.spec.numel)
    ]
    buffers = WorkerBuffers()
    jobs = (
        (None, partial(_sample, context, step, first, last, position, tasks, buffers))
        for step, first, last in cells[::SAMPLED]
    )
    sample: dict[int, list[Tensor]] = {t: [] for t in tasks}
    for _, found in parallel(jobs):
        for t, values in found.items():
            sample[t].append(values)
    windows = {}
    for t, rank in targets:
        values = torch.cat(sample[t]) if sample[t] else torch.empty(0)
        if not values.numel():
            continue
        place = min(values.numel(), max(1, round(rank / sizes[t] * values.numel())))
        middle = float(values.kthvalue(values.numel() + 1 - place).values)
        windows[t, rank] = (middle * (1 - WINDOW), middle * (1 + WINDOW))
    return windows


def _sample(
    context: Context, step: Step, first: int, last: int, position: int, tasks: set[int], worker: WorkerBuffers
) -> dict[int, Tensor]:
    """Some magnitudes of a piece, by task."""
    found = magnitudes(context, step, first, last, position, worker.get(), tasks)
    return {t: values[::STRIDE].clone() for t, values in found}


def _count_unit(
    context: Context,
    step: Step,
    first: int,
    last: int,
    position: int,
    windows: dict[Target, tuple[float, float]],
    worker: WorkerBuffers,
) -> dict[Target, tuple[int, Tensor]]:
    """What one unit has above each window, and the values inside."""
    with mapped(context, step, first, last):
        return _count_pieces(context, step, first, last, position, windows, worker.get())


def _count_pieces(
    context: Context,
    step: Step,
    first: int,
    last: int,
    position: int,
    windows: dict[Target, tuple[float, float]],
    buffers: Buffers,
) -> dict[Target, tuple[int, Tensor]]:
    """The same, piece by piece."""
    counts = {target: 0 for target in windows if target[0] in step.tasks}
    values: dict[Target, list[Tensor]] = {target: [] for target in counts}
    for start, stop in pieces(step, context, first, last):
        for t, magnitude in magnitudes(context, step, start, stop, position, buffers, {t for t, _ in counts}):
            for target in counts:
                if target[0] == t:
                    low, high = windows[target]
                    array = (
                        magnitude.numpy()
                    )  # numpy compares and gathers several times faster than torch here
                    over = array > high
                    counts[target] += int(np.count_nonzero(over))
                    values[target].append(torch.from_numpy(array[(array >= low) ^ over]))
    empty = torch.empty(0, dtype=torch_dtype(step.compute))
    return {
        target: (counts[target], torch.cat(values[target]) if values[target] else empty) for target in counts
    }


def radix(context: Context, steps: Sequence[Step], position: int, target: Target) -> float:
    """The value at a rank from the bits of |tau|, which order like the values: 16 bits a pass, from the top."""
    task, rank = target
    wide = any(step.compute == "F64" for step in steps)
    floats, integers, width = (torch.float64, torch.int64, 64) if wide else (torch.float32, torch.int32, 32)
    buffers, prefix = Buffers(), 0
    for low in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for step in steps:
            for first, last in pieces(step, context, 0, step.spec.numel):
                for _, values in magnitudes(context, step, first, last, position, buffers, {task}):
                    digits = values.to(floats).view(integers) >> low
                    if low < width - DIGIT:
                        digits = digits[(digits >> DIGIT) == prefix]
                    counts += torch.bincount(digits & ((1 << DIGIT) - 1), minlength=1 << DIGIT)
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, rank))
        digit = (1 << DIGIT) - 1 - place
        rank -= int(from_top[place] - counts[digit])
        prefix = (prefix << DIGIT) | digit
    return float(torch.tensor(prefix, dtype=integers).view(floats))
