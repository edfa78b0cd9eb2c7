"""The streaming loop: every step of a plan, piece by piece, from the stores through a rule into a sink.

Pieces are half a mebibyte of float32 where the rule is elementwise, so that everything between reading and writing stays
in cache; workers take tensors (or parts of large ones) in the plan's order and share no state.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from gradmatch.engine.kernels import Buffers
from gradmatch.engine.passes import GRID, uniform
from gradmatch.inputs.opened import CurvatureStore, Inputs
from gradmatch.inputs.stores import Store, torch_dtype
from gradmatch.transforms import TRANSFORMS

if TYPE_CHECKING:
    from estimators.tensorfile import TensorFile
    from gradmatch.plan.plan import Plan, Step

BLOCK = GRID  # elements
UNIT = 32 * BLOCK  # elements of a large tensor that one worker takes at a time


Key = TypeVar("Key")
Result = TypeVar("Result")


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


@dataclass
class Context:
    """What pieces of one merge share: the plan and what passes over the whole model found."""

    plan: Plan
    thresholds: Mapping[tuple[int, float], Tensor] = field(default_factory=dict)  # (edit, density) -> (T,)
    majority: float = 1.0
    norms: Sequence[float] = ()

    @property
    def inputs(self) -> Inputs:
        """The opened inputs."""
        return self.plan.inputs


def run(
    context: Context, sink: Sink, steps: Sequence[Step], on_progress: Callable[[int], None] | None = None
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
    buffers = WorkerBuffers()
    for step, *_, total in units(steps, context):
        left.setdefault(step.name, total)
    jobs = (
        (step, partial(_run_unit, context, sink, step, first, last, buffers))
        for step, first, last, _ in units(steps, context)
    )
    for step, part in parallel(jobs):
        add(stats.setdefault(step.name, {}), part)
        left[step.name] -= 1
        if not left[step.name]:
            sink.finish(step, stats[step.name])
            if on_progress:
                on_progress(step.bytes_read)
    return stats


def parallel(jobs: Iterable[tuple[Key, Callable[[], Result]]]) -> Iterator[tuple[Key, Result]]:
    """Run jobs on a few threads, a few ahead; yields (key, result) in the order of the jobs, so that sums are reproducible."""
    workers = worker_count()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pieces are too small to share; the workers run side by side
    waiting: deque[tuple[Key, Future[Result]]] = deque()
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="merge", initializer=_one_thread) as pool:
            try:
                for key, job in jobs:
                    waiting.append((key, pool.submit(job)))
                    if len(waiting) > 2 * workers:
                        done, future = waiting.popleft()
                        yield done, future.result()
                while waiting:
                    done, future = waiting.popleft()
                    yield done, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)


def worker_count() -> int:
    """Threads that pieces are shared among."""
    return min(4, os.cpu_count() or 1)


def _one_thread() -> None:
    torch.set_num_threads(1)


class WorkerBuffers:
    """One set of buffers per thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self) -> Buffers:
        """The calling thread's buffers."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers()
        buffers: Buffers = self._local.buffers
        return buffers


def add(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Add statistics; branches (numbers that are no sums) are set."""
    for key, value in part.items():
        total[key] = total.get(key, 0.0) + value


def span(step: Step, context: Context) -> str:
    """How much of a tensor a piece must hold: "block", "rows" or "tensor"."""
    if step.whole:
        return "tensor"
    spans = [TRANSFORMS[name].span(options) for name, options in step.edits] if step.action == "merge" else []
    return "tensor" if "tensor" in spans else "rows" if "rows" in spans or step.along else "block"


def pieces(step: Step, context: Context, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut elements first to last of a tensor into pieces."""
    kind = span(step, context)
    size = BLOCK
    if kind == "tensor":
        size = max(1, step.spec.numel)
    elif kind == "rows":
        row = step.spec.shape[-1] if step.spec.shape else 1
        size = max(1, BLOCK // max(1, row)) * max(1, row)
    for start in range(first, last, size):
        yield start, min(start + size, last)


def units(steps: Sequence[Step], context: Context) -> Iterator[tuple[Step, int, int, int]]:
    """(step, first, last, units of this tensor): what one worker takes at a time."""
    for step in steps:
        numel = step.spec.numel
        whole = span(step, context) != "block" or (step.action == "merge" and context.plan.request.rule.gram)
        size = max(1, numel) if whole else UNIT
        starts = list(range(0, numel, size)) or [0]
        for start in starts:
            yield step, start, min(start + size, numel), len(starts)


def _run_unit(
    context: Context, sink: Sink, step: Step, first: int, last: int, worker: WorkerBuffers
) -> dict[str, float]:
    """All pieces of one unit."""
    buffers = worker.get()
    stats: dict[str, float] = {}
    with mapped(context, step, first, last):
        _run_pieces(context, sink, step, first, last, buffers, stats)
    return stats


@contextmanager
def mapped(context: Context, step: Step, first: int, last: int) -> Iterator[None]:
    """Let the kernel read ahead what a unit needs, and take the pages back after."""
    ranges = list(byte_ranges(context, step, first, last))
    for file, start, stop in ranges:
        file.expect(start, stop)
    try:
        yield
    finally:
        for file, start, stop in ranges:
            file.release(start, stop)


def byte_ranges(context: Context, step: Step, first: int, last: int) -> Iterator[tuple[TensorFile, int, int]]:
    """The parts of files that elements first to last of a step will be read from: the kernel reads ahead, and forgets after."""
    inputs = context.inputs
    stores: list[tuple[Store, str | None]] = [(inputs.store, step.name)]
    if step.action != "copy":
        tasks = [inputs.tasks[t] for t in step.tasks]
        stores += [(task.store, step.name) for task in tasks]
        known = [store for task in tasks for store in (task.mean, task.gradient) if store is not None]
        known += [inputs.base_curvature] if isinstance(inputs.base_curvature, CurvatureStore) else []
        stores += [(store, store.key(step.name)) for store in known]
    for store, name in stores:
        for file, start, stop in store.files(name) if name is not None else ():
            size = (stop - start) / max(1, step.spec.numel)
            yield file, start + int(first * size), min(stop, start + int(last * size))


def _run_pieces(
    context: Context, sink: Sink, step: Step, first: int, last: int, buffers: Buffers, stats: dict[str, float]
) -> None:
    """The pieces of a unit, one after the other."""
    from gradmatch.engine.evaluate import copy_piece, evaluate, linear_terms

    dtype = torch_dtype(step.spec.dtype)
    if step.action == "copy":
        for start, stop in pieces(step, context, first, last):
            values = copy_piece(context, step, start, stop)
            sink.write(step, start, values if values.dtype == dtype else converted(step, values, dtype))
        return
    coefficients = linear_terms(context, step, buffers, stats)
    for start, stop in pieces(step, context, first, last):
        merged, theta0 = evaluate(context, step, start, stop, coefficients, buffers, stats)
        sink.write(step, start, finished(context, step, start, merged, theta0, dtype, buffers, stats))


def converted(step: Step, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copied piece in another dtype; infinite values (of masks) stay as they are.

    Raises:
        ValueError: a finite value that the dtype cannot hold.
    """
    rounded = values.to(dtype)
    lost = values.float().isfinite() & ~rounded.float().isfinite()
    if bool(lost.any()):
        largest = float(values[lost].double().abs().max())
        raise ValueError(
            f"{step.name}: values reach {largest:g}, beyond what {dtype} holds; choose a wider dtype"
        )
    return rounded


def finished(
    context: Context,
    step: Step,
    first: int,
    merged: Tensor,
    theta0: Tensor | None,
    dtype: torch.dtype,
    buffers: Buffers,
    stats: dict[str, float],
) -> Tensor:
    """Check a piece for NaN and Inf and round it to the output's dtype, measuring what that loses.

    Raises:
        ValueError: the piece is not finite, or the output's dtype cannot hold it.
    """
    from gradmatch.engine.explain import explain, same_everywhere

    if not math.isfinite(float(merged.sum())) and not bool(merged.isfinite().all()):
        same = same_everywhere(context, step, first, merged)
        if same is None:
            raise ValueError(explain(context, step, first, first + merged.numel(), merged))
        return same.to(dtype)
    if dtype == merged.dtype:
        return merged
    request, count = context.plan.request, merged.numel()
    if request.rounding == "stochastic" and dtype == torch.bfloat16 and merged.dtype == torch.float32:
        noise = uniform(request.seed, "rounding", step.name, first, count, torch.float32)
        rounded = stochastic_bfloat16(merged, noise)
    else:
        rounded = buffers.get("rounded", count, dtype).copy_(merged)
    scratch = buffers.get("scratch", count, merged.dtype)
    error = scratch.copy_(rounded).sub_(merged)
    lost = float(torch.dot(error, error))
    if not math.isfinite(lost) and not bool(rounded.float().isfinite().all()):  # torch asks no 8-bit float
        largest = float(merged.abs().max())
        raise ValueError(
            f"{step.name}: merged values reach {largest:g}, beyond what {dtype} holds; choose a wider dtype"
        )
    if theta0 is not None:
        update = torch.sub(merged, theta0, out=scratch)
        add(stats, {"rounding_error": lost, "rounded_update": float(torch.dot(update, update))})
    return rounded


def stochastic_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to one of its two bfloat16 neighbours at random, so that the expectation is the value."""
    bits = values.view(torch.int32) + (noise * 65536).to(torch.int32)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def loader(store: Store, name: str, first: int, last: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function that gives the values in `dtype`: the store's own view where it fits, else converted into a buffer."""

    def load(buffer: Tensor) -> Tensor:
        values = store.block(name, first, last)
        return values if values.dtype == dtype else buffer[: last - first].copy_(values)

    return load


def curvature_loader(
    store: CurvatureStore | None, name: str, first: int, last: int, dtype: torch.dtype
) -> Callable[[Tensor], Tensor] | None:
    """The same for a curvature block; None where it is flat."""
    key = store.key(name) if store is not None else None
    return None if store is None or key is None else loader(store, key, first, last, dtype)
