"""Empirical Fisher diagonal, mean of (d log p(y_n|x_n))^2 at the true labels; the gradient comes with it for free."""

from __future__ import annotations

from estimators.batches import Batch
from estimators.fisher import start
from estimators.problem import Problem
from estimators.sinks import SquareSink

__all__ = ["start", "step"]


def step(problem: Problem, batch: Batch) -> None:
    """Add one batch: squares and, where wanted, the sum of the same per-example gradients."""
    reading = problem.read(batch)
    likelihood, engine = problem.likelihood, problem.engine
    assert likelihood is not None and engine is not None
    problem.predictions += reading.count()
    problem.label_kind = "true labels"
    sink = SquareSink(
        problem.sums, fourths=problem.standard_error, gradient=problem.gradient, space=problem.space
    )
    engine.backward(likelihood.true(reading), sink)
