"""`make bench-estimators`: time and memory of per-example curvature, as multiples of an ordinary step.

The ordinary step is a forward and backward of the same batch in the same process; contenders take turns with it, and
medians of the paired ratios are printed. Peers that are not installed are left out; install them beside the project's
own environment:

    python -m venv .venv-peers && .venv-peers/bin/pip install -r experiments/bench/constraints-peers.txt
    PYTHONPATH=. .venv-peers/bin/python -m experiments.bench.estimators --out FOLDER

`--tables` and `--shapes` choose pieces; every table is written when it is done.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.bench import shapes
from experiments.bench.measuring import (
    at_most,
    error_of,
    ordinary,
    ours,
    part,
    peak_of,
    peak_of_ordinary,
    ratios,
    reference,
    repeated,
    times_of_matrix,
    with_kernel,
)
from experiments.bench.peers import PEERS, Step, TooSlow, Unavailable
from experiments.bench.shapes import SHAPES, Shape
from gradmatch.estimators import estimate

Table = list[list[str]]

DRAWN = "ours, Fisher (labels drawn)"
OURS: dict[str, Callable[[Shape], Step]] = {
    DRAWN: lambda shape: ours(shape, "fisher", labels="sampled"),
    "ours, Fisher, compiled kernel": with_kernel,
    "ours, Fisher, whole batch": lambda shape: ours(shape, "fisher", labels="sampled", chunk=None),
    "ours, empirical Fisher": ours,
    "ours, Fisher of batches": lambda shape: ours(shape, "fisher", reduction="batch", labels="sampled"),
}
SURE = "ours, empirical Fisher"  # the others draw labels: no error to state


def compare(shape: Shape, repeats: int, seconds: float, peers: bool) -> Table:
    """Time, memory and error of every contender on one shape."""
    shape.model.eval()
    small = part(shape, min(4, shape.examples))
    exact = reference(small)
    ordinary(shape)()
    base_peak = peak_of_ordinary(shape)
    rows: Table = []
    steps: dict[str, Step] = {}
    facts: dict[str, tuple[float, str]] = {}
    for name, make in {**OURS, **(PEERS if peers else {})}.items():
        try:
            with at_most(seconds):
                steps[name], peak = prepare(shape, make, name in OURS)
                stated = ""
                if name == SURE:
                    stated = f"{error_of(ours(small, results=True)(), exact):.0e}"
                elif name not in OURS:
                    stated = f"{error_of(make(small)(), exact):.0e}"
            facts[name] = peak / base_peak, stated
        except Unavailable as reason:
            steps.pop(name, None)
            verdict = "not timed" if isinstance(reason, TooSlow) else "cannot run"
            rows.append([shape.name, name, verdict, "", str(reason)])
        except Exception as failure:  # a peer may fail in any way; that is a finding
            steps.pop(name, None)
            text = str(failure).strip().splitlines() or [type(failure).__name__]
            rows.append([shape.name, name, "fails", "", f"{type(failure).__name__}: {text[0][:80]}"])
    times, plain = ratios(shape, steps, repeats, seconds)
    measured = [
        [shape.name, name, f"{times[name]:.2f}", f"{facts[name][0]:.2f}", facts[name][1]] for name in facts
    ]
    step = [shape.name, "ordinary step", f"{plain * 1e3:.0f} ms", f"{base_peak / 2**20:.0f} MiB", ""]
    return [step, *measured, *rows]


def prepare(shape: Shape, make: Callable[[Shape], Step], mine: bool) -> tuple[Step, float]:
    """A step ready to be timed, and its peak with what it returns or adds to, but without a peer's copy of the model.

    The ordinary step's peak has its gradients, so ours has the sums, and the plan that is made once.
    """
    step = make(shape)
    step()  # what is loaded or planned once is nobody's peak, and nobody's time
    return step, peak_of((lambda: make(shape)()) if mine else step)


def speed(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """A table for every shape: ours, the peers, the batch-size-1 loop."""
    for name in tqdm(args.shapes.split(","), desc="shapes", file=sys.stderr):
        torch.manual_seed(0)
        shape = SHAPES[name]()
        rows = compare(shape, args.repeats, args.seconds, not args.no_peers)
        title = f"{shape.name} ({shape.parameters() / 1e6:.0f}M parameters; target {shape.target})"
        yield (
            f"speed-{name}",
            show(title, ["model, batch", "what", "time", "peak memory", "error, or why not"], rows),
        )


def growth(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """How the ratio moves with batch, sequence length and width."""
    cases: dict[str, Callable[[], Shape]] = {
        "batch 1": lambda: shapes.bert(1, 64), "batch 4": lambda: shapes.bert(4, 64),
        "batch 16": lambda: shapes.bert(16, 64), "batch 64": lambda: shapes.bert(64, 64),
        "length 8": lambda: shapes.bert(16, 8), "length 16": lambda: shapes.bert(16, 16),
        "length 32": lambda: shapes.bert(16, 32), "length 256": lambda: shapes.bert(16, 256),
        "width 128": lambda: shapes.bert(16, 64, 128), "width 768": lambda: shapes.bert(16, 64, 768),
    }  # fmt: skip
    rows = []
    for name, make in cases.items():
        shape = make()
        shape.model.eval()
        steps = {key: OURS[key](shape) for key in (DRAWN, "ours, Fisher, compiled kernel")}
        for step in steps.values():
            step()
        times, plain = ratios(shape, steps, args.repeats, args.seconds)
        rows.append([name, shape.name, f"{plain * 1e3:.0f} ms", *(f"{times[key]:.2f}" for key in steps)])
    head = ["", "shape", "ordinary step", "time ratio", "with the kernel"]
    yield "growth", show("Growth, Fisher with labels drawn", head, rows)


def general(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """What the general path costs the models that need it."""
    rows = []
    for make in shapes.GENERAL:
        shape = make()
        shape.model.eval()
        info = estimate(shape.model, [shape.batch], progress=False, labels="sampled").info
        steps = {DRAWN: OURS[DRAWN](shape)}
        steps[DRAWN]()
        times, plain = ratios(shape, steps, args.repeats, args.seconds)
        named = info.get("general_path", "nothing").split(", ")
        told = named[0] + (f" and {len(named) - 1} more" if len(named) > 1 else "")
        rows.append([shape.name, told, f"{plain * 1e3:.0f} ms", f"{times[DRAWN]:.2f}"])
    head = ["model", "general path", "ordinary step", "time ratio"]
    yield "general", show("Models with parts of their own", head, rows)


def largest(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The largest batch of BERT that fits: peaks at two batch sizes, and the straight line through them."""
    gibibytes, sizes, rows = 4.0, (8, 16), []
    makers: dict[str, Callable[[Shape], Callable[[], Any]]] = {"ordinary step": ordinary, **OURS, **PEERS}
    for name, make in makers.items():
        try:
            peaks = []
            for examples in sizes:
                shape = shapes.bert(examples, 64)
                shape.model.eval()
                if name == "ordinary step":
                    ordinary(shape)()
                    peaks.append(peak_of_ordinary(shape))
                else:
                    with at_most(args.seconds):
                        peaks.append(prepare(shape, make, name in OURS)[1])
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
    head = ["BERT 6 x 384, 64 tokens", "peak of 8", "peak of 16", f"largest batch in {gibibytes:.0f} GiB"]
    yield "largest", show("Largest batch", head, rows)


def variance(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """How much error a second buys: variance over runs, each of 16 examples of a pool and draws of its own, times seconds.

    Of the trace, var(tr) / tr^2, and of the whole diagonal, sum_i var_i / sum_i mean_i^2. The output layer is scaled until the
    logits are as far apart as a trained model's: where both labels are equally likely, their squares are the same and a draw
    adds no error.
    """
    runs, pool, apart = 60, shapes.bert(256, 32, 128), 3.0
    pool.model.eval()
    with torch.no_grad():
        logits = pool.model(input_ids=pool.batch["input_ids"]).logits
        gap = (logits[:, 1] - logits[:, 0]).std()
        pool.model.classifier.weight.mul_(apart / gap)
        pool.model.classifier.bias.copy_(-logits.mean(0) * apart / gap)
    options: dict[str, dict[str, Any]] = {
        "per example, 1 draw": {"labels": "sampled"},
        "per example, 4 draws": {"labels": "sampled", "samples": 4},
        "per example, 16 draws": {"labels": "sampled", "samples": 16},
        "per batch, 1 draw": {"labels": "sampled", "reduction": "batch"},
        "exact expectation (2 classes)": {"labels": "exact"},
    }
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 256, (16,), generator=generator) for _ in range(runs)]
    batches = [{key: value[index] for key, value in pool.batch.items()} for index in data]
    errors: dict[str, tuple[float, float]] = {}
    for name, given in tqdm(options.items(), desc="variance", file=sys.stderr):
        traces, squares, total = [], 0.0, torch.zeros(pool.parameters(), dtype=torch.float64)
        for flat in repeated(pool.model, batches, 16, **given):
            traces.append(float(flat.sum()))
            squares += float(flat.square().sum())
            total += flat
        mean = float((total / runs).square().sum())
        errors[name] = (
            statistics.variance(traces) / statistics.mean(traces) ** 2,
            (squares - runs * mean) / (runs - 1) / mean,
        )
    one = shapes.Shape("", pool.model, batches[0], pool.loss, 16, 0.0)
    steps = {name: ours(one, "fisher", **given) for name, given in options.items()}
    for step in steps.values():
        step()
    times, plain = ratios(one, steps, args.repeats, args.seconds)
    first = next(iter(options))
    rows = []
    for name, (trace, diagonal) in errors.items():
        slower = times[name] / times[first]
        told = [f"{error * slower / of:.2f}" for error, of in zip(errors[name], errors[first], strict=True)]
        rows.append([name, f"{times[name]:.2f}", f"{trace:.4f}", told[0], f"{diagonal:.3f}", told[1]])
    rows.insert(0, ["ordinary step", f"{plain * 1e3:.0f} ms", "", "", "", ""])
    head = ["labels", "time", "variance of the trace", "x time", "variance of the diagonal", "x time"]
    yield "variance", show("Error bought by a second", head, rows)


def matrices(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """One weight matrix alone: squares of its per-example gradients, as multiples of its ordinary gradient."""
    sizes = [(128, 8, 384, 384), (128, 8, 1536, 384), (128, 8, 384, 1536), (16, 64, 384, 384), (16, 64, 1536, 384),
             (16, 64, 384, 1536), (4, 64, 3072, 768)]  # fmt: skip
    rows = []
    for examples, positions, outputs, inputs in sizes:
        left, right = torch.randn(examples, positions, outputs), torch.randn(examples, positions, inputs)
        plain, mine, kernels = times_of_matrix(left, right, 2 * args.repeats)
        name = f"{examples} x {positions}, {outputs} x {inputs}"
        rows.append([name, f"{plain * 1e3:.1f} ms", f"{mine / plain:.2f}", f"{kernels / plain:.2f}"])
    head = ["examples x tokens, matrix", "ordinary gradient", "ours", "ours, compiled kernel"]
    yield "matrices", show("One weight matrix at a time", head, rows)


TABLES: dict[str, Callable[[argparse.Namespace], Iterator[tuple[str, str]]]] = {
    "speed": speed, "growth": growth, "general": general, "largest": largest, "variance": variance,
    "matrices": matrices,
}  # fmt: skip


def show(title: str, head: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table."""
    lines = [f"\n### {title}\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"comma separated, of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=30, help="of preparing, and again of timing, for each contender"
    )
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--tables", default=",".join(TABLES), help=f"comma separated, of {', '.join(TABLES)}")
    parser.add_argument("--out", type=Path, help="folder in which every table is written when it is done")
    args = parser.parse_args(given)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(machine)
    for table in args.tables.split(","):
        torch.manual_seed(0)
        for name, text in TABLES[table](args):
            print(text, flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"{name}.md").write_text(f"{machine}\n{text}")


if __name__ == "__main__":
    main()
