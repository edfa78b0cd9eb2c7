"""`make bench-estimators`: time and memory of per-example curvature, as multiples of an ordinary step.

The ordinary step is a forward and backward of the same batch in the same process; contenders take turns with it, and
medians of the paired ratios are printed. Peers that are not installed are left out; install them beside the project's
own environment:

    python -m venv .venv-peers && .venv-peers/bin/pip install -r experiments/bench/constraints-peers.txt
    PYTHONPATH=. .venv-peers/bin/python -m experiments.bench.estimators
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from estimators import estimate, kernel
from estimators.batches import BatchReader
from estimators.estimation import ESTIMATORS, read_chunk
from estimators.inference import make_likelihood
from estimators.problem import Problem, prepared, trainable_parameters
from experiments.bench import shapes
from experiments.bench.peers import PEERS, Result, Step, Unavailable, _rows, loop
from experiments.bench.shapes import SHAPES, Shape

Table = list[list[str]]
TABLES = ("speed", "growth", "general", "largest", "variance")


def ours(
    shape: Shape,
    method: str = "empirical_fisher",
    *,
    chunk: int | str | None = "auto",
    results: bool = False,
    **options: Any,
) -> Step:
    """One batch of a long run: the plan is made once, the sums stay; means are formed at the end, so only if asked for."""
    problem = Problem(shape.model, trainable_parameters(shape.model), make_likelihood("auto"), **options)
    problem.chunk, problem.budget = read_chunk(chunk, problem, problem.reduction == "batch")
    ESTIMATORS[method].start(problem)
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


def ordinary(shape: Shape) -> Callable[[], None]:
    """Forward and backward of the batch, as training does it."""

    def step() -> None:
        shape.model.zero_grad(set_to_none=True)
        shape.loss(shape.model, shape.batch).backward()

    return step


def with_kernel(shape: Shape) -> Step:
    """Our Fisher with the optional compiled kernel."""
    plain = ours(shape, "fisher", labels="sampled")

    def step() -> Result:
        os.environ["GRADMATCH_KERNEL"] = "1"
        try:
            if kernel.loaded() is None:
                raise Unavailable("the kernel could not be compiled")
            return plain()
        finally:
            del os.environ["GRADMATCH_KERNEL"]

    return step


OURS: dict[str, Callable[[Shape], Step]] = {
    "ours, Fisher (labels drawn)": lambda shape: ours(shape, "fisher", labels="sampled"),
    "ours, Fisher, compiled kernel": with_kernel,
    "ours, Fisher, whole batch": lambda shape: ours(shape, "fisher", labels="sampled", chunk=None),
    "ours, empirical Fisher": ours,
    "ours, Fisher of batches": lambda shape: ours(shape, "fisher", reduction="batch", labels="sampled"),
}

DRAWN = tuple(name for name in OURS if "empirical" not in name)  # random: no error to state
RESULTS: dict[str, Callable[[Shape], Step]] = {
    "ours, empirical Fisher": lambda shape: ours(shape, results=True)
}


def peak_of(step: Callable[[], Any]) -> float:
    """Peak resident bytes of a step above what was resident before it (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def peak_without_gradients(shape: Shape, step: Callable[[], Any]) -> float:
    """The ordinary step's peak, its gradients included."""
    shape.model.zero_grad(set_to_none=True)
    peak = peak_of(step)
    shape.model.zero_grad(set_to_none=True)
    return peak


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1024


def seconds_of(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def part(shape: Shape, examples: int) -> Shape:
    """The same model on the first rows of the batch."""
    return Shape(shape.name, shape.model, _rows(shape, 0, examples), shape.loss, examples, shape.target)


def error_of(make: Callable[[Shape], Step], small: Shape, exact: Result) -> float:
    """Relative L1 distance from the float64 loop over single examples; parameters that a library leaves out count whole."""
    found = make(small)()
    wrong = sum(
        (found[name].double() - value).abs().sum() if name in found else value.sum()
        for name, value in exact.items()
    )
    return float(wrong / sum(value.sum() for value in exact.values()))


def reference(small: Shape) -> Result:
    """The loop in float64."""

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


def compare(shape: Shape, repeats: int, peers: bool) -> Table:
    """Time, memory and error of every contender on one shape."""
    shape.model.eval()
    base = ordinary(shape)
    small = part(shape, min(4, shape.examples))
    exact = reference(small)
    base()
    base_peak = statistics.median(peak_without_gradients(shape, base) for _ in range(3))
    rows: Table = []
    steps: dict[str, Step] = {}
    facts: dict[str, tuple[float, float | None]] = {}
    for name, make in {**OURS, **(PEERS if peers else {})}.items():
        try:
            if name in OURS:
                make(shape)()  # what is loaded once a process is nobody's peak
            peak = peak_of(
                lambda make=make: make(shape)()
            )  # with the sums, as the ordinary step's has the gradients
            step = make(shape)
            error = error_of(RESULTS.get(name, make), small, exact) if name not in DRAWN else None
            if name in OURS:
                step()  # the plan is made once a run
        except Unavailable as reason:
            rows.append([shape.name, name, "cannot run", "", str(reason)])
            continue
        except Exception as failure:  # a peer may fail in any way; that is a finding
            text = str(failure).strip().splitlines() or [type(failure).__name__]
            rows.append([shape.name, name, "fails", "", f"{type(failure).__name__}: {text[0][:80]}"])
            continue
        steps[name], facts[name] = step, (peak / base_peak, error)
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    base()
    base_times = []
    for turn in range(repeats):
        for name, step in steps.items():
            if name not in OURS and turn >= max(2, repeats // 3):
                continue
            plain = seconds_of(base)
            shape.model.zero_grad(set_to_none=True)
            base_times.append(plain)
            ratios[name].append(seconds_of(step) / plain)
    rows.insert(
        0,
        [
            shape.name,
            "ordinary step",
            f"{statistics.median(base_times) * 1e3:.0f} ms",
            f"{base_peak / 2**20:.0f} MiB",
            "",
        ],
    )
    for name, (peak, error) in facts.items():
        stated = "" if error is None else f"{error:.0e}"
        rows.append([shape.name, name, f"{statistics.median(ratios[name]):.2f}", f"{peak:.2f}", stated])
    return rows


def growth(repeats: int) -> Table:
    """How the ratio moves with batch, sequence length and width."""
    cases = {
        "batch 4": shapes.bert(4, 64), "batch 16": shapes.bert(16, 64), "batch 64": shapes.bert(64, 64),
        "length 16": shapes.bert(16, 16), "length 256": shapes.bert(16, 256),
        "width 128": shapes.bert(16, 64, 128), "width 768": shapes.bert(16, 64, 768),
    }  # fmt: skip
    rows = []
    for name, shape in cases.items():
        shape.model.eval()
        steps = [OURS["ours, Fisher (labels drawn)"](shape), with_kernel(shape)]
        rows.append([name, shape.name, *(f"{ratio:.2f}" for ratio in ratios_of(shape, steps, repeats))])
    return rows


def general(repeats: int) -> Table:
    """What the general path costs the models that need it."""
    rows = []
    for make in shapes.GENERAL:
        shape = make()
        shape.model.eval()
        plan = estimate(shape.model, [shape.batch], progress=False, labels="sampled").info
        (ratio,) = ratios_of(shape, [OURS["ours, Fisher (labels drawn)"](shape)], repeats)
        rows.append([shape.name, plan.get("general_path", "nothing"), f"{ratio:.2f}"])
    return rows


def ratios_of(shape: Shape, steps: list[Step], repeats: int) -> list[float]:
    """Median time of each as a multiple of the ordinary step, taking turns with it."""
    base = ordinary(shape)
    found: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for step, ratios in zip(steps, found, strict=True):
            plain = seconds_of(base)
            shape.model.zero_grad(set_to_none=True)
            ratio = seconds_of(step) / plain
            if turn:  # the first one plans
                ratios.append(ratio)
    return [statistics.median(ratios) for ratios in found]


def largest(gibibytes: float) -> Table:
    """The largest batch of BERT that fits: peaks at two batch sizes, and the straight line through them."""
    sizes, rows = (8, 16), []
    makers: dict[str, Callable[[Shape], Callable[[], Any]]] = {"ordinary step": ordinary, **OURS, **PEERS}
    for name, make in makers.items():
        try:
            peaks = []
            for examples in sizes:
                shape = shapes.bert(examples, 64)
                shape.model.eval()
                make(shape)()
                shape.model.zero_grad(set_to_none=True)
                run = lambda make=make, shape=shape: make(shape)()  # noqa: E731
                peaks.append(statistics.median(peak_without_gradients(shape, run) for _ in range(3)))
        except Exception as failure:  # as in `compare`
            rows.append([name, "", "", f"{type(failure).__name__}: {str(failure)[:80]}"])
            continue
        each = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
        found = (
            "no limit of its own"
            if each < 2**18
            else f"{int((gibibytes * 2**30 - peaks[0]) / each + sizes[0]):,}"
        )
        rows.append([name, *(f"{peak / 2**20:.0f} MiB" for peak in peaks), found])
    return rows


def variance(runs: int) -> Table:
    """Variance of the trace over seeds times seconds: how much error a second buys. Lower is better; per-example draw = 1."""
    shape = shapes.bert(16, 32, 128)
    shape.model.eval()
    options: dict[str, dict[str, Any]] = {
        "per example, 1 draw": {"labels": "sampled"},
        "per example, 4 draws": {"labels": "sampled", "samples": 4},
        "per example, 16 draws": {"labels": "sampled", "samples": 16},
        "per batch, 1 draw": {"labels": "sampled", "reduction": "batch"},
        "exact expectation (2 classes)": {"labels": "exact"},
    }
    rows, first = [], None
    data = [
        {key: value[torch.randint(0, 16, (16,))] for key, value in shape.batch.items()} for _ in range(runs)
    ]
    for name, given in options.items():
        traces, times = [], []
        for seed in range(runs):
            started = time.perf_counter()
            found = estimate(shape.model, [data[seed]], seed=seed, progress=False, **given)
            times.append(time.perf_counter() - started)
            traces.append(sum(float(value.sum()) for value in found.values()))
        relative = statistics.variance(traces) / statistics.mean(traces) ** 2
        cost = relative * statistics.median(times)
        first = first or cost
        rows.append(
            [name, f"{relative:.3f}", f"{statistics.median(times) * 1e3:.0f} ms", f"{cost / first:.2f}"]
        )
    return rows


def show(title: str, head: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table."""
    lines = [f"\n### {title}\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"comma separated, of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--tables", default=",".join(TABLES), help=f"comma separated, of {', '.join(TABLES)}")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    tables = args.tables.split(",")
    for name in tqdm(args.shapes.split(",") if "speed" in tables else (), desc="shapes", file=sys.stderr):
        shape = SHAPES[name]()
        rows = compare(shape, args.repeats, not args.no_peers)
        head = ["model, batch", "what", "time", "peak memory", "error, or why not"]
        print(
            show(
                f"{shape.name} ({shape.parameters() / 1e6:.0f}M parameters; target {shape.target})",
                head,
                rows,
            ),
            flush=True,
        )
    if "growth" in tables:
        head = ["", "shape", "time ratio", "with the kernel"]
        print(show("Growth, Fisher with labels drawn", head, growth(args.repeats)), flush=True)
    if "general" in tables:
        head = ["model", "general path", "time ratio"]
        print(show("Models on the general path", head, general(args.repeats)), flush=True)
    if "largest" in tables:
        head = ["BERT 6 x 384, 64 tokens", "peak of 8", "peak of 16", "largest batch in 4 GiB"]
        print(show("Largest batch", head, largest(4.0)), flush=True)
    if "variance" in tables:
        head = ["labels", "relative variance of the trace", "time", "variance x time"]
        print(show("Error bought by a second", head, variance(40)), flush=True)


if __name__ == "__main__":
    main()
