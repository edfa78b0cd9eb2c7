"""Going through the batches: sharing out, adding up, saving, stopping, and saying how far it got."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler
from tqdm import tqdm

from gradmatch.estimators import distributed
from gradmatch.estimators.batches import BatchReader
from gradmatch.estimators.convergence import Convergence
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.kronecker import FACTOR_A
from gradmatch.estimators.problem import Problem
from gradmatch.estimators.protocol import Estimator
from gradmatch.estimators.resume import Journal
from gradmatch.estimators.sinks import DIAGONAL


@dataclass
class Loop:
    """How a run goes through its batches.

    Attributes:
        title: for the progress bar.
        progress: whether there is one.
        tolerance: relative error of the trace at which to stop, or None.
        journal: where the sums are saved every `seconds`, or None.
        done: batches that an interrupted run had done.
    """

    title: str
    progress: bool
    tolerance: float | None
    journal: Journal | None
    seconds: float
    done: int = 0


def run(
    problem: Problem, estimator: Estimator, batches: Iterable[Any], convergence: Convergence, loop: Loop
) -> None:
    """Add every batch that is this rank's; stop where the tolerance is reached."""
    rank, world = distributed.place()
    reader = BatchReader(problem.model, problem.device)
    saved = time.monotonic()
    silent = not loop.progress or rank > 0
    with tqdm(desc=loop.title, unit=" examples", disable=silent, total=count_examples(batches)) as bar:
        index = -1
        for index, seen, batch, mine in distributed.shared_out(batches, reader):
            if index < loop.done:  # before the interruption
                if loop.journal and index + 1 == loop.done:
                    loop.journal.check(batch)
            elif mine:
                for part in problem.parts(batch):
                    estimator.step(problem, part)
                problem.counts["examples"] += batch.size
                if convergence.due(batch.size * problem.draws):
                    convergence.add(traces(problem))
            bar.update(seen - bar.n)
            if loop.journal and index >= loop.done and time.monotonic() - saved > loop.seconds:
                loop.journal.save(problem, convergence, index + 1, batch)
                saved = time.monotonic()
            if (
                loop.tolerance is not None
                and (index + 1) % world == 0
                and converged(convergence, loop.tolerance)
            ):
                problem.notes["stopped"] = f"relative error of the trace below {loop.tolerance}"
                break
    if index + 1 < loop.done:
        raise GradmatchError(
            f"the interrupted run had done {loop.done} batches, here there are {index + 1}: these are other data or another "
            f"batch size; remove {loop.journal.path if loop.journal else ''}, or give the batches of that run",
            "other_weights",
        )


def count_examples(batches: Iterable[Any]) -> int | None:
    """The examples that a DataLoader goes through, where there is one."""
    sampler = getattr(batches, "sampler", None)
    picks = isinstance(sampler, (SubsetRandomSampler, WeightedRandomSampler))  # some rows of the dataset
    try:
        return len(sampler if picks else batches.dataset)  # type: ignore[attr-defined, arg-type]
    except (AttributeError, TypeError, NotImplementedError):
        return None


def traces(problem: Problem) -> list[float]:
    """Trace of every tensor's accumulated diagonal so far; none for Kronecker factors, of which it would miss most."""
    if any(key.startswith(FACTOR_A) for key in problem.sums):
        return []
    diagonals = [problem.sums[key] for name in problem.parameters if (key := DIAGONAL + name) in problem.sums]
    return [float(value) for value in torch.stack([value.sum() for value in diagonals])] if diagonals else []


def converged(convergence: Convergence, tolerance: float) -> bool:
    """The same answer on every rank, from the groups of all."""
    together = Convergence.merged(distributed.gather(convergence))
    if any(not row for row in together.traces):
        raise GradmatchError(
            f"tolerance has nothing to watch: the estimator says that it gives it, but adds to no {DIAGONAL}<parameter> in "
            "problem.sums",
            "bad_request",
        )
    return together.reached(tolerance)


def add_up_ranks(problem: Problem, convergence: Convergence) -> None:
    """Everything that adds up, added up over ranks; what was settled at the first batch, from a rank that saw one."""
    _, world = distributed.place()
    if world == 1:
        return
    distributed.add_up(problem.sums, problem.device)
    mine = (
        problem.counts, problem.label_kind, problem.columns, problem.draws, problem.likelihood_name, problem.notes,
    )  # fmt: skip
    everyone = distributed.gather(mine)
    settled = max(everyone, key=lambda each: each[0]["examples"])
    _, problem.label_kind, problem.columns, problem.draws, problem.likelihood_name, notes = settled
    problem.counts = sum((each[0] for each in everyone), start=Counter())
    problem.notes = {**notes, "processes": str(world)}
    together = Convergence.merged(distributed.gather(convergence))
    convergence.sizes, convergence.traces = together.sizes, together.traces


def advice(convergence: Convergence, seen: int) -> str:
    """One line about the noise: the error of the trace is halved by four times the examples."""
    error = convergence.relative_error()
    if error is None or not convergence.relative_errors():
        return "relative error of the trace: unknown, it takes two batches of a diagonal"
    return f"relative error of the trace {100 * error:.2g} % after {seen:,} examples; {3 * seen:,} more would halve it"


def _transformers(problem: Problem) -> dict[str, str]:
    """The version of transformers, for its models."""
    library = sys.modules.get("transformers")
    return (
        {"transformers": library.__version__}
        if library is not None and hasattr(problem.model, "config")
        else {}
    )


def provenance(
    problem: Problem, method: str, print_of_weights: str, convergence: Convergence
) -> dict[str, str]:
    """Everything about the run that a reader of the file should know."""
    info = {
        "estimator": method,
        "examples_seen": str(problem.counts["examples"]),
        "predictions_seen": str(problem.counts["predictions"]),
        "samples": str(problem.samples),
        "reduction": problem.reduction,
        "labels": problem.label_kind,
        "likelihood": problem.likelihood_name
        or (problem.likelihood.name if problem.likelihood is not None else "none"),
        "seed": str(problem.seed),
        "fingerprint": print_of_weights,
        "torch": torch.__version__,
        **_transformers(problem),
        **problem.notes,
    }
    error, errors = convergence.relative_error(), convergence.relative_errors()
    if error is not None and errors:
        names = [name for name in problem.parameters if DIAGONAL + name in problem.sums]
        info["relative_error"] = f"{error:.4g}"
        pairs = zip(names, errors, strict=True)
        info["relative_errors"] = json.dumps({name: float(f"{value:.3g}") for name, value in pairs})
    return info
