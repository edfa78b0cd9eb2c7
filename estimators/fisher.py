"""Fisher diagonal, E_{y ~ p(.|x)} [(d log p(y|x))^2] per example, with labels from the model itself.

Labels are sampled, `samples` draws a forward; or, where that takes no more backward passes than the draws asked for,
the expectation over all labels is taken exactly, which has less variance at the same price (one column for two
classes). `info["labels"]` says which.
"""

from __future__ import annotations

from estimators.batches import Batch
from estimators.problem import Problem
from estimators.sinks import (
    FOURTHS,
    GRADIENT,
    SQUARES,
    BatchSquareSink,
    DrawsSink,
    GradientSink,
    SquareSink,
    zeros,
)


def start(problem: Problem) -> None:
    """Make the accumulators."""
    zeros(problem.parameters, SQUARES, problem.sums)
    if problem.standard_error:
        zeros(problem.parameters, FOURTHS, problem.sums)
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
    likelihood, engine = problem.likelihood, problem.engine
    assert likelihood is not None and engine is not None
    problem.predictions += reading.count()
    if not problem.label_kind:
        choose_labels(problem, likelihood.columns(reading), problem.samples if limit is None else limit)
    exact = problem.columns is not None
    passes = problem.columns if problem.columns is not None else problem.samples
    sink = make_sink(problem, passes)
    for number in range(passes):
        if exact:
            seed = likelihood.exact(reading, number)
        else:
            seed = likelihood.sampled(reading, problem.uniforms(batch, number))
        engine.backward(seed, sink, keep=number + 1 < passes or problem.gradient)
    if isinstance(sink, (DrawsSink, BatchSquareSink)):
        sink.finish(batch.size)
    if problem.gradient:
        engine.backward(likelihood.true(reading), GradientSink(problem.sums))


def choose_labels(problem: Problem, columns: int | None, limit: int) -> None:
    """Settle once, at the first batch, between sampled labels and the exact expectation.

    Raises:
        ValueError: labels="exact" where the likelihood has no exact expectation.
    """
    if problem.labels == "exact" and columns is None:
        assert problem.likelihood is not None
        raise ValueError(
            f'labels="exact" is out of reach for the likelihood {problem.likelihood.name} (it predicts several tokens a '
            'row, or is your own); use labels="sampled"'
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


def make_sink(problem: Problem, passes: int) -> SquareSink | BatchSquareSink | DrawsSink:
    """Where the squares go."""
    if problem.reduction == "batch":
        return BatchSquareSink(problem.sums, fourths=problem.standard_error, draws=problem.draws)
    if problem.standard_error and passes > 1:
        return DrawsSink(problem.sums, 1 / problem.draws)
    return SquareSink(problem.sums, fourths=problem.standard_error, space=problem.space)
