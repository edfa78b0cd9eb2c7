"""Diagonal of the generalised Gauss-Newton, diag of J' Lambda J: the Fisher, with the expectation over labels exact.

Lambda is the covariance of the gradient at the outputs; its square root has C - 1 columns for C classes, one per
output for Gaussian and Bernoulli likelihoods, and each column costs one backward pass of a single forward. Above
`EXACT_UP_TO` columns, and for sequences of tokens, labels are sampled instead, and `info["labels"]` says so.
"""

from __future__ import annotations

from gradmatch.estimators import fisher
from gradmatch.estimators.batches import Batch
from gradmatch.estimators.fisher import GIVES, finish, start
from gradmatch.estimators.problem import Problem

__all__ = ["EXACT_UP_TO", "GIVES", "finish", "start", "step"]

EXACT_UP_TO = 100  # columns, each one backward pass a batch


def step(problem: Problem, batch: Batch) -> None:
    """Add one batch."""
    fisher.step(problem, batch, limit=EXACT_UP_TO)
