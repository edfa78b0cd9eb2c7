"""The k-th largest |tau| of a whole model, exactly, without holding its task vector.

A sample of the blocks predicts where the threshold lies; one pass counts what is above that window and collects what is
inside; the threshold is then an order statistic of the few that were collected. Where the prediction missed (or too many
equal values fall into the window) a radix selection over the bits of |tau| finds it in two passes (four in float64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradmatch.engine import fused
from gradmatch.engine.context import Context, fetch, pieces
from gradmatch.engine.draws import GRID
from gradmatch.engine.kernels import Buffers, in_cache, stored
from gradmatch.engine.stacked import task_vectors
from gradmatch.engine.workers import WorkerBuffers, over_units, parallel, worker_count
from gradmatch.models.stores import torch_dtype
from gradmatch.rules.edits.ties import kept_count

if TYPE_CHECKING:
    from gradmatch.plan.step import Step

DIGIT = 16  # bits counted per pass of the radix selection
RUNS, RUN = 1024, 512  # runs of values that are sampled, evenly over the model, and values in a run
SPREAD = 6.0  # standard errors of the sampled share on either side of the predicted window
LIMIT = 4_000_000  # collected values, 16 MB of float32

Target = tuple[int, int]  # task, rank from the largest
Run = tuple["Step", int, int]
Array = NDArray[Any]


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
        steps = [step for step in context.plan.steps if len(step.edits) > position]
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
    """(task, |tau|) block by block, after the edits before `position`; each tensor is valid until the next is asked for."""
    dtype = torch_dtype(step.compute)
    for start, stop in pieces(step, first, last):
        if position:
            _, tau = task_vectors(context, step, start, stop, buffers, {}, edits=position)
            yield from ((t, row.abs()) for t, row in zip(step.tasks, tau, strict=True) if t in tasks)
            continue
        wanted = [t for t in step.tasks if t in tasks]
        stores = [context.inputs.store, *(context.inputs.tasks[t].store for t in wanted)]
        sources = [fetch(buffers, f"{t}", store, step.name, start, stop) for t, store in enumerate(stores)]
        for base, *models in in_cache(*sources):
            count = base.numel()
            theta0 = stored(base, buffers.get("theta0", count, dtype))
            load, tau = buffers.get("load", count, dtype), buffers.get("tau", count, dtype)
            for t, values in zip(wanted, models, strict=True):
                yield t, torch.sub(stored(values, load), theta0, out=tau).abs_()


def predicted(
    context: Context, steps: Sequence[Step], position: int, targets: Sequence[Target], sizes: Sequence[int]
) -> dict[Target, float]:
    """Ranks found by sampling a window first; those whose window missed are absent."""
    windows = _windows(context, steps, position, targets, sizes)
    above = dict.fromkeys(windows, 0)
    inside: dict[Target, list[Array]] = {target: [] for target in windows}
    held = dict.fromkeys(windows, 0)
    for _, counted in over_units(context, steps, partial(_count_unit, context, position, windows)):
        for target, (over, values) in counted.items():
            above[target] += over
            if held[target] <= LIMIT:
                inside[target].append(values)
                held[target] += len(values)
    found = {}
    for target in windows:
        rank = target[1] - above[target]
        if 1 <= rank <= held[target] <= LIMIT:
            values = np.concatenate(inside[target])
            found[target] = float(np.partition(values, len(values) - rank)[len(values) - rank])
    return found


def _windows(
    context: Context, steps: Sequence[Step], position: int, targets: Sequence[Target], sizes: Sequence[int]
) -> dict[Target, tuple[float, float]]:
    """Where each threshold probably lies: SPREAD standard errors around its place in a sample of runs of values.

    The standard error is that of the share above the threshold, from how the runs differ in it: tensors have scales of their
    own, so values side by side tell less than as many from everywhere.
    """
    tasks = {t for t, _ in targets}
    total = sum(step.spec.numel for step in steps)
    distance = max(RUN, total // RUNS)
    runs, offset = [], 0
    for step in steps:
        for start in range(-offset % distance, step.spec.numel, distance):
            begin = start - start % GRID if position and distance >= GRID else start  # where draws begin anew
            runs.append((step, begin, min(begin + RUN, step.spec.numel)))
        offset += step.spec.numel
    worker = WorkerBuffers()
    share = -(-len(runs) // (8 * worker_count()))
    jobs = (
        (None, partial(_sample, context, runs[first : first + share], position, tasks, worker))
        for first in range(0, len(runs), share)
    )
    sample: dict[int, list[Array]] = {t: [] for t in tasks}
    for _, found in parallel(jobs):
        for t, values in found:
            sample[t].append(values)
    ordered = {t: np.sort(np.concatenate(arrays)) for t, arrays in sample.items() if arrays}
    windows = {}
    for t, rank in targets:
        if t not in ordered:
            continue
        values, kept = ordered[t], rank / sizes[t]
        count = len(values)
        middle = values[min(count - 1, max(0, count - round(kept * count)))]
        lengths = np.array([len(run) for run in sample[t]])
        over = np.add.reduceat(
            np.concatenate(sample[t]) >= middle, lengths.cumsum() - lengths, dtype=np.int64
        )
        shares = over / lengths
        error = SPREAD * max(float(shares.std()), 1 / RUN) / len(shares) ** 0.5
        low, high = (count - (kept + side * error) * count for side in (1, -1))
        bottom = values[int(low)] if low > 0 else 0.0
        top = values[math.ceil(high)] if high < count - 1 else math.inf
        windows[t, rank] = (float(bottom), float(top))
    return windows


def _sample(
    context: Context, runs: Sequence[Run], position: int, tasks: set[int], worker: WorkerBuffers
) -> list[tuple[int, Array]]:
    """Magnitudes of some runs of values: (task, values) for each run."""
    found: list[tuple[int, Array]] = []
    for step, first, last in runs:
        everything = [(t, 0.0, math.inf) for t in step.tasks if t in tasks]
        counted = None if position else fused.windows(context, step, first, last, everything, worker.get())
        if counted is None or any(
            len(values) < last - first for _, values in counted
        ):  # NaNs are in no window
            magnitudes = _run_magnitudes(context, step, first, last, position, worker.get(), tasks)
            found += [(t, values.numpy().copy()) for t, values in magnitudes]
        else:
            found += [(t, values) for (t, *_), (_, values) in zip(everything, counted, strict=True)]
    return found


def _run_magnitudes(
    context: Context, step: Step, first: int, last: int, position: int, buffers: Buffers, tasks: set[int]
) -> Iterator[tuple[int, Tensor]]:
    """`magnitudes` of a run; where a piece must be more than a block, of the piece that it begins in."""
    if not position or step.span == "block":
        yield from magnitudes(context, step, first, last, position, buffers, tasks)
        return
    start, stop = next(piece for piece in pieces(step, 0, step.spec.numel) if piece[1] > first)
    for t, values in magnitudes(context, step, start, stop, position, buffers, tasks):
        yield t, values.reshape(-1)[first - start : last - start]


def _count_unit(
    context: Context,
    position: int,
    windows: dict[Target, tuple[float, float]],
    step: Step,
    first: int,
    last: int,
    buffers: Buffers,
) -> dict[Target, tuple[int, Array]]:
    """How many values of one unit are above each window, and the values inside."""
    counts = {target: 0 for target in windows if target[0] in step.tasks}
    values: dict[Target, list[Array]] = {target: [] for target in counts}
    wanted = [(t, *windows[t, rank]) for t, rank in counts]
    for start, stop in pieces(step, first, last, fused.PIECE if context.kernels and not position else 1):
        counted = None if position else fused.windows(context, step, start, stop, wanted, buffers)
        if counted is None:
            counted = _counted(context, step, start, stop, position, wanted, buffers)
        for target, (over, held) in zip(counts, counted, strict=True):
            counts[target] += over
            values[target].append(held)
    empty = np.empty(0, dtype=np.float64 if step.compute == "F64" else np.float32)
    return {target: (counts[target], np.concatenate([*values[target], empty])) for target in counts}


def _counted(
    context: Context,
    step: Step,
    first: int,
    last: int,
    position: int,
    wanted: Sequence[tuple[int, float, float]],
    buffers: Buffers,
) -> list[tuple[int, Array]]:
    """`fused.windows` by numpy, which compares, counts and gathers several times faster than torch here."""
    above, inside = [0] * len(wanted), [list[Array]() for _ in wanted]
    for t, magnitude in magnitudes(context, step, first, last, position, buffers, {t for t, *_ in wanted}):
        array = magnitude.numpy()
        over = buffers.get("over", len(array), torch.bool).numpy()
        within = buffers.get("inside", len(array), torch.bool).numpy()
        for number, (task, low, high) in enumerate(wanted):
            if task == t:
                np.greater(array, high, out=over)
                above[number] += int(np.count_nonzero(over))
                np.not_equal(np.greater_equal(array, low, out=within), over, out=within)
                inside[number].append(array[within])
    return [(over, np.concatenate(values)) for over, values in zip(above, inside, strict=True)]


def radix(context: Context, steps: Sequence[Step], position: int, target: Target) -> float:
    """The value at a rank from the bits of |tau|, which order like the values: 16 bits a pass, from the top."""
    task, rank = target
    wide = any(step.compute == "F64" for step in steps)
    floats, integers, width = (torch.float64, torch.int64, 64) if wide else (torch.float32, torch.int32, 32)
    buffers, prefix = Buffers(), 0
    for low in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for step in steps:
            for _, values in magnitudes(context, step, 0, step.spec.numel, position, buffers, {task}):
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
