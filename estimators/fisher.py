"""Fisher diagonal, E_{y ~ p(.|x)} [(d log p(y|x))^2] per example, with labels from the model itself.

Labels are sampled, `samples` draws a forward; or, where that takes no more backward passes than the draws asked for,
the expectation over all labels is taken exactly, which has less variance at the same price (one column for two
classes). `info["labels"]` says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.likelihood import Reading, Seed
from gradmatch.estimators.problem import Problem
from gradmatch.estimators.sinks import (
    DIAGONAL,
    GRADIENT,
    SPREAD,
    BatchSquareSink,
    DrawsSink,
    GradientSink,
    SquareSink,
    zeros,
)

GIVES = ("standard_error", "gradient", "tolerance")


def start(problem: Problem) -> None:
    """Nothing yet: the accumulators come with the first batch, so that they and the plan never need memory together."""


def accumulators(problem: Problem) -> None:
    """Make them, unless they are there."""
    zeros(problem.parameters, DIAGONAL, problem.sums)
    if problem.standard_error:
        zeros(problem.parameters, SPREAD, problem.sums)
    if problem.gradient:
        zeros(problem.parameters, GRADIENT, problem.sums)


def step(problem: Problem, batch: Batch, limit: int | None = None) -> None:
    """Add one batch: squares of every draw or column, and the gradient at the true labels where it is wanted.

    Args:
        problem: the run.
        batch: its next batch.
        limit: the exact expectation is preferred up to so many columns; as many as draws were asked for by default.
    """
    reading = problem.read(batch)
    accumulators(problem)
    sink = None
    for _, last, seed in seeds(problem, reading, batch, problem.samples if limit is None else limit):
        sink = sink or make_sink(problem)
        problem.listening.backward(seed, sink, keep=not last or problem.gradient)
    if isinstance(sink, (DrawsSink, BatchSquareSink)):
        sink.finish(batch.size)
    if problem.gradient:
        problem.listening.backward(problem.known_likelihood.true(reading), GradientSink(problem.sums))
    problem.counts["spread_units"] += 1 if problem.reduction == "batch" else batch.size
    problem.counts["spread_examples"] += batch.size


def seeds(problem: Problem, reading: Reading, batch: Batch, limit: int) -> Iterator[tuple[int, bool, Seed]]:
    """The seeds of one batch: its number, whether it is the last, and the seed; draws of labels or exact columns."""
    likelihood = problem.known_likelihood
    if not problem.label_kind:
        choose_labels(problem, likelihood.columns(reading), limit)
    passes = problem.samples if problem.columns is None else problem.columns
    for number in range(passes):
        if problem.columns is None:
            yield number, number + 1 == passes, likelihood.sampled(reading, problem.uniforms(batch, number))
        else:
            yield number, number + 1 == passes, likelihood.exact(reading, number)


def finish(problem: Problem, seen: int) -> dict[str, Any]:
    """Sums into per-example means, and standard errors where they were asked for."""
    scale = seen * problem.draws
    mean = {name: problem.sums[DIAGONAL + name] / scale for name in problem.parameters}
    if not problem.standard_error:
        return {"mean": mean}
    errors = {
        name: standard_error(
            value,
            problem.sums[SPREAD + name],
            problem.counts["spread_examples"],
            problem.counts["spread_units"],
        )
        for name, value in mean.items()
    }
    return {"mean": mean, "standard_error": errors}


def standard_error(mean: Tensor, spread: Tensor, examples: int, units: int) -> Tensor:
    """sqrt((sum_k S_k^2 / n_k - n m^2) / (n (K - 1))): of the mean m of K sums S_k over n_k examples each, n in all.

    With one example a unit this is the usual sqrt(sum_n (s_n - m)^2 / (n (n - 1))). `spread` is sum_k S_k^2 / n_k.
    """
    if units < 2:
        raise GradmatchError(
            "a standard error needs at least two examples (two batches with reduction='batch', two probes for the Hessian)",
            "bad_request",
        )
    return ((spread - examples * mean * mean).clamp(min=0) / (examples * (units - 1))).sqrt()


def choose_labels(problem: Problem, columns: int | None, limit: int) -> None:
    """Settle once, at the first batch, between sampled labels and the exact expectation."""
    if problem.labels == "exact" and columns is None:
        raise GradmatchError(
            f'labels="exact" is out of reach for the likelihood {problem.known_likelihood.name} (it predicts several tokens a '
            'row, or is your own); use labels="sampled"',
            "bad_request",
        )
    affordable = columns is not None and columns <= limit
    if problem.reduction == "example" and (
        problem.labels == "exact" or (problem.labels == "auto" and affordable)
    ):
        problem.columns, problem.draws = columns, 1
        problem.label_kind = "exact expectation over labels"
    else:
        problem.columns, problem.draws = None, problem.samples
        problem.label_kind = "sampled from the model"


def make_sink(problem: Problem) -> SquareSink | BatchSquareSink | DrawsSink:
    """Where the squares go."""
    passes = problem.samples if problem.columns is None else problem.columns
    if problem.reduction == "batch":
        return BatchSquareSink(problem.sums, spread=problem.standard_error, draws=problem.draws)
    if problem.standard_error and passes > 1:
        return DrawsSink(problem.sums, 1 / problem.draws)
    return SquareSink(problem.sums, problem.space, spread=problem.standard_error)
