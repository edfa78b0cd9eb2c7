"""What the model's outputs mean: p(y | x), and with it the gradients that every curvature estimate is made of.

A likelihood turns the outputs of one batch into *seeds*: a tensor of the model's graph and the gradient of the summed
loss -log p(y | x) with respect to it. An example is a row of the batch; the log-probability of a row sums over its
predicted positions (tokens, outputs), padding and ignored labels excluded. Seeds come with three kinds of labels:
the true ones, sampled ones, and the exact expectation over all labels, as the columns of a square root of the
covariance of the gradient.

One's own likelihood is any object with `sample(output, generator) -> labels` and `log_prob(output, labels) -> (B,)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError

IGNORE = -100
LOGITS = ("logits", "prediction_logits", "out")  # what outputs call them
Uniforms = Callable[[int], Tensor]  # number of values per example -> (B, count) in [0, 1)
Seed = tuple[Tensor, Tensor]


@runtime_checkable
class OwnLikelihood(Protocol):
    """What a user's own likelihood offers; `output` is exactly what the model returned."""

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        """Labels drawn from the model, one per example."""

    def log_prob(self, output: Any, labels: Any) -> Tensor:
        """log p(labels | x) of every example, (B,), differentiable; example n must depend on row n alone."""


@dataclass
class Reading:
    """What a likelihood reads off one batch.

    Attributes:
        output: the tensor of the model's graph that seeds differentiate.
        view: the same values as (B, T, C): T predictions of C numbers for each example.
        labels: (B, T) classes or (B, T, C) values (probabilities of classes, numbers), or None.
        valid: (B, T) bool, the predictions that count, or None for all.
        batch: where it came from, for messages.
    """

    output: Any
    view: Tensor
    labels: Any
    valid: Tensor | None
    batch: Batch

    def count(self) -> int:
        """Number of predictions that count."""
        return int(self.valid.sum()) if self.valid is not None else self.view.shape[0] * self.view.shape[1]


class Likelihood(Protocol):
    """The interface between likelihoods and estimators."""

    name: str

    def read(self, output: Any, batch: Batch) -> Reading:
        """Check shapes and find labels and padding."""

    def true(self, reading: Reading) -> Seed:
        """Gradient of the summed loss at the true labels."""

    def sampled(self, reading: Reading, uniforms: Uniforms) -> Seed:
        """Gradient of the summed loss at labels drawn from the model."""

    def columns(self, reading: Reading) -> int | None:
        """How many backward passes the exact expectation over labels takes, or None where it is out of reach."""

    def exact(self, reading: Reading, column: int) -> Seed:
        """One column l_k of a square root of the covariance of the gradient: sum_k l_k l_k' = E[g g']."""

    def log_prob(self, reading: Reading) -> Tensor:
        """log p(y | x) of the true labels, (B,), differentiable."""


def checked_logits(output: Any, batch: Batch) -> Tensor:
    """The tensor of predictions in whatever the model returned, with B rows and no NaN."""
    if batch.labels is not None and not isinstance(batch.labels, Tensor):
        raise TypeError(
            f"batch {batch.index}: labels are a {type(batch.labels).__name__}; the built-in likelihoods take a tensor or numbers"
        )
    logits = find_logits(output)
    if logits.dim() == 0 or logits.shape[0] != batch.size:
        raise GradmatchError(
            f"batch {batch.index} has {batch.size} examples but the model returned logits of shape {list(logits.shape)}; "
            "the first dimension must be the example"
            + (
                ", and a single number is a loss, not a prediction: return the logits beside it"
                if logits.dim() == 0
                else ""
            ),
            "bad_batch",
        )
    values = logits.detach()
    if not bool(torch.isfinite(values.sum())):  # minus infinity is legitimate: a class that is ruled out
        bad = torch.isnan(values) | (values == math.inf)
        if bool(bad.any()):
            row = int(bad.flatten(1).any(1).nonzero()[0])
            raise GradmatchError(
                f"the model's output is NaN or infinite in batch {batch.index}, row {row}: so is the loss, and no curvature exists",
                "not_finite",
            )
    return logits


def find_logits(output: Any) -> Tensor:
    """A tensor itself; else `.logits` / ["logits"] (also "prediction_logits"); else the first floating tensor, however deep."""
    if isinstance(output, Tensor):
        return output
    for key in LOGITS:
        value = field_of(output, key)
        if isinstance(value, Tensor):
            return value
    for value in pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value
    raise TypeError(
        f"found no logits in the model's output of type {type(output).__name__}; return a tensor or an object with "
        "`logits`, or pass your own likelihood (sample and log_prob)"
    )


def field_of(output: Any, key: str) -> Any:
    """An entry of a mapping or an attribute of anything else; None where there is none."""
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)


def shift_left(values: Tensor, fill: Any) -> Tensor:
    """values[:, t + 1] at t, and `fill` in the last place; (B, T)."""
    return torch.cat([values[:, 1:], values.new_full((values.shape[0], 1), fill)], 1)


def wide(values: Tensor) -> Tensor:
    """At least single precision."""
    return values if values.dtype == torch.float64 else values.float()


def required(reading: Reading) -> Any:
    """The labels."""
    if reading.labels is None:
        raise GradmatchError(
            f"batch {reading.batch.index} has no labels; true labels are needed here", "bad_batch"
        )
    return reading.labels
