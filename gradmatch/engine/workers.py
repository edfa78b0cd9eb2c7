"""Units of work, and the few threads with buffers of their own that take them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from gradmatch.engine.buffers import Buffers
from gradmatch.engine.context import BLOCK, byte_ranges

if TYPE_CHECKING:
    from gradmatch.engine.context import Context
    from gradmatch.estimators.tensorfile import TensorFile
    from gradmatch.plan.step import Step

UNIT = 32 * BLOCK  # elements of a large tensor that one worker takes at a time
# Bytes, allocated once and never touched: glibc keeps freed memory at hand up to twice the largest size that it has seen freed.
# Without it the temporaries of a readable rule come as fresh pages for every piece, which takes as long as the arithmetic.
STEADY = 8 * 2**20

Key = TypeVar("Key")
Result = TypeVar("Result")


def units(steps: Sequence[Step], context: Context) -> Iterator[tuple[Step, int, int, int]]:
    """(step, first, last, units of this tensor): what one worker takes at a time."""
    for step in steps:
        numel = step.spec.numel
        # something of all of it comes first
        whole = step.gram or step.assembles or step.span != "block" or "tensor" in step.scopes
        size = max(1, numel) if whole else UNIT
        starts = list(range(0, numel, size)) or [0]
        for start in starts:
            yield step, start, min(start + size, numel), len(starts)


def over_units(
    context: Context, steps: Sequence[Step], work: Callable[[Step, int, int, Buffers], Result]
) -> Iterator[tuple[Step, Result]]:
    """`work(step, first, last, buffers)` for all units, on a few threads; yields (step, result) in the plan's order."""
    worker = WorkerBuffers(context.device)

    def jobs() -> Iterator[tuple[Step, Callable[[], Result]]]:
        for step, first, last, _ in units(steps, context):
            ranges = list(byte_ranges(context, step, first, last))
            for file, start, stop in ranges:
                file.expect(start, stop)  # handed out a few units ahead: the disk reads while others compute
            yield step, partial(unit, step, first, last, ranges)

    def unit(step: Step, first: int, last: int, ranges: Sequence[tuple[TensorFile, int, int]]) -> Result:
        try:
            return work(step, first, last, worker.get())
        finally:
            for file, start, stop in ranges:
                file.release(start, stop)

    return parallel(jobs())


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
    torch.empty(STEADY, dtype=torch.uint8)


class WorkerBuffers:
    """One set of buffers per thread."""

    def __init__(self, device: str) -> None:
        self._device, self._local = device, threading.local()

    def get(self) -> Buffers:
        """The calling thread's buffers."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers(self._device)
        buffers: Buffers = self._local.buffers
        return buffers
