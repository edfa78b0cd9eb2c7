"""How contenders are measured: time in turns with an ordinary step, peak memory, and the distance from a float64 loop."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.peers import Result, Step, TooSlow, Unavailable, _rows, loop
from experiments.bench.shapes import Shape
from gradmatch.estimators import kernel
from gradmatch.estimators.batches import BatchReader
from gradmatch.estimators.estimation import ESTIMATORS, read_chunk
from gradmatch.estimators.gradients import Outer
from gradmatch.estimators.inference import make_likelihood
from gradmatch.estimators.problem import Problem, prepared, trainable_parameters
from gradmatch.estimators.products import Workspace


def ours(
    shape: Shape,
    method: str = "empirical_fisher",
    *,
    chunk: int | str | None = "auto",
    results: bool = False,
    **options: Any,
) -> Step:
    """One batch of a long run: the plan is made once, the sums stay; means are formed at the end, so only if asked for."""
    problem = begun(shape.model, method, chunk, **options)
    reader = BatchReader(shape.model, torch.device("cpu"))
    state = {"batches": 0}

    def step() -> Result:
        with prepared(shape.model):
            batch = reader(shape.batch, state["batches"], state["batches"] * shape.examples)
            for part in problem.parts(batch):
                ESTIMATORS[method].step(problem, part)
        state["batches"] += 1
        if not results:
            return {}
        scale = shape.examples * state["batches"] * problem.draws
        return {name: problem.sums["diagonal/" + name] / scale for name in problem.parameters}

    return step


def begun(model: nn.Module, method: str, chunk: int | str | None, **options: Any) -> Problem:
    """An estimate whose sums are zero."""
    problem = Problem(model, trainable_parameters(model), make_likelihood("auto"), **options)
    problem.chunk, problem.budget = read_chunk(chunk, problem, problem.reduction == "batch")
    ESTIMATORS[method].start(problem)
    return problem


def repeated(model: nn.Module, batches: Sequence[Any], examples: int, **options: Any) -> Iterator[Tensor]:
    """Fisher diagonals (P,), one from each batch alone, with labels drawn anew; the plan is made once for all of them."""
    problem = begun(model, "fisher", None, **options)
    reader = BatchReader(model, torch.device("cpu"))
    for seed, batch in enumerate(batches):
        problem.seed = seed
        for value in problem.sums.values():
            value.zero_()
        with prepared(model):
            ESTIMATORS["fisher"].step(problem, reader(batch, 0, 0))
        values = [problem.sums["diagonal/" + name].flatten() for name in problem.parameters]
        yield torch.cat(values).double() / (examples * problem.draws)


def with_kernel(shape: Shape) -> Step:
    """Our Fisher with the optional compiled kernel."""
    plain = ours(shape, "fisher", labels="sampled")

    def step() -> Result:
        with compiled():
            return plain()

    return step


def times_of_matrix(left: Tensor, right: Tensor, repeats: int) -> list[float]:
    """Median seconds, in turns: a matrix's ordinary gradient, squares of its per-example gradients, those by the kernel."""
    gradients, space = Outer(left, right), Workspace()
    squares = torch.zeros(left.shape[2], right.shape[2])

    def by_kernel() -> None:
        with compiled():
            kernel.add_squares(left, right, squares, space)

    steps: list[Callable[[], object]] = [
        gradients.total,
        lambda: gradients.add_squares(squares, None, space),
        by_kernel,
    ]
    rounds = [[seconds_of(step) for step in steps] for _ in range(repeats + 1)]
    return [statistics.median(each) for each in zip(*rounds[1:], strict=True)]


@contextmanager
def compiled() -> Iterator[None]:
    """The kernel asked for meanwhile."""
    os.environ["GRADMATCH_KERNEL"] = "1"
    try:
        if kernel.loaded() is None:
            raise Unavailable("the extension is not built here")
        yield
    finally:
        del os.environ["GRADMATCH_KERNEL"]


def ordinary(shape: Shape) -> Callable[[], None]:
    """Forward and backward of the batch, as training does it."""

    def step() -> None:
        shape.model.zero_grad(set_to_none=True)
        shape.loss(shape.model, shape.batch).backward()

    return step


def seconds_of(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def ratios(
    shape: Shape, steps: Mapping[str, Step], repeats: int, seconds: float
) -> tuple[dict[str, float], float]:
    """Median time of each as a multiple of the ordinary step, taking turns with it, and that step's own seconds.

    A contender that has used up its seconds takes no more turns; everyone has one.
    """
    base = ordinary(shape)
    base()
    found: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    plain = []
    for _ in range(repeats):
        for name, step in steps.items():
            if spent[name] > seconds:
                continue
            plain.append(seconds_of(base))
            shape.model.zero_grad(set_to_none=True)
            taken = seconds_of(step)
            spent[name] += taken
            found[name].append(taken / plain[-1])
    return {name: statistics.median(each) for name, each in found.items()}, statistics.median(plain)


def peak_of(step: Callable[[], Any]) -> float:
    """Peak resident bytes of a step above what was resident before it (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def peak_of_ordinary(shape: Shape, times: int = 3) -> float:
    """The ordinary step's peak, its gradients included."""
    base, peaks = ordinary(shape), []
    for _ in range(times):
        shape.model.zero_grad(set_to_none=True)
        peaks.append(peak_of(base))
    shape.model.zero_grad(set_to_none=True)
    return statistics.median(peaks)


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1024


def part(shape: Shape, examples: int) -> Shape:
    """The same model on the first rows of the batch."""
    return Shape(shape.name, shape.model, _rows(shape, 0, examples), shape.loss, examples, shape.target)


def error_of(found: Result, exact: Result) -> float:
    """Relative L1 distance from the float64 loop; parameters that a library leaves out count whole."""
    wrong = sum(
        (found[name].double() - value).abs().sum() if name in found else value.sum()
        for name, value in exact.items()
    )
    return float(wrong / sum(value.sum() for value in exact.values()))


def reference(small: Shape) -> Result:
    """The loop over single examples in float64."""

    def double(value: Any) -> Any:
        return value.double() if value.is_floating_point() else value

    batch = small.batch
    batch = (
        {k: double(v) for k, v in batch.items()}
        if isinstance(batch, dict)
        else tuple(double(v) for v in batch)
    )
    model = copy.deepcopy(small.model).double()
    return loop(Shape(small.name, model, batch, small.loss, small.examples, 0.0))()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TooSlow once the time is over; what runs is interrupted between two operations."""

    def ring(*_: Any) -> None:
        raise TooSlow(f"its first steps take more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
