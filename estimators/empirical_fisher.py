"""Empirical Fisher diagonal, mean of (d log p(y_n|x_n))^2 at the true labels; the gradient comes with it for free."""

from __future__ import annotations

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.fisher import GIVES, accumulators, finish, start
from gradmatch.estimators.problem import Problem
from gradmatch.estimators.sinks import SquareSink

__all__ = ["GIVES", "finish", "start", "step"]


def step(problem: Problem, batch: Batch) -> None:
    """Add one batch: squares and, where wanted, the sum of the same per-example gradients."""
    reading = problem.read(batch)
    accumulators(problem)
    problem.label_kind = "true labels"
    sink = SquareSink(problem.sums, problem.space, spread=problem.standard_error, gradient=problem.gradient)
    problem.listening.backward(problem.known_likelihood.true(reading), sink)
    problem.counts["spread_units"] += batch.size
    problem.counts["spread_examples"] += batch.size
