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
from gradmatch.estimators.randomness import draw_index

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


class Categorical:
    """Softmax over classes, for one or several predictions a row.

    Args:
        name: "classification", "token_classification", "causal_lm", "masked_lm" or "seq2seq".
        ignore_index: labels of this value do not count.
        class_dim: where the logits keep their classes (1 for images of labels).

    Example:
        >>> segmentation = Categorical("token_classification", class_dim=1)  # logits (B, classes, height, width)
    """

    def __init__(self, name: str = "classification", ignore_index: int = IGNORE, class_dim: int = -1) -> None:
        self.name, self.ignore_index, self.class_dim = name, ignore_index, class_dim

    def read(self, output: Any, batch: Batch) -> Reading:
        """Logits as (B, T, C), labels as (B, T), and which predictions count."""
        logits = checked_logits(output, batch)
        if logits.dim() < 2:
            raise GradmatchError(
                f"{self.name} needs logits of shape (B, ..., classes), got {list(logits.shape)} in batch {batch.index}; "
                'a single logit per example is likelihood="bernoulli"',
                "bad_batch",
                self.name,
            )
        view = logits.detach().movedim(self.class_dim, -1)
        places = list(view.shape[1:-1])
        view = view.reshape(batch.size, -1, view.shape[-1])
        if view.shape[2] == 1:
            raise GradmatchError(
                f"{self.name} with logits {list(logits.shape)} has one class, whose probability is always 1: its curvature is "
                'zero; pass likelihood="bernoulli" for a yes/no logit or "regression" for a number',
                "bad_batch",
                self.name,
            )
        labels = batch.labels
        if self.name == "classification" and labels is not None and labels.is_floating_point():
            return Reading(logits, view, self._soft(labels, logits, batch).reshape(view.shape), None, batch)
        if self.name == "causal_lm" and labels is None:
            labels = batch.ids
        if self.name in ("masked_lm", "seq2seq") and labels is None:
            raise GradmatchError(
                f"{self.name} needs labels: they say which tokens are predicted (others: {IGNORE})",
                "bad_batch",
                self.name,
            )
        if labels is not None:
            if labels.is_floating_point() or labels.numel() != view.shape[0] * view.shape[1]:
                raise GradmatchError(
                    f"batch {batch.index}: {self.name} with logits {list(logits.shape)} needs whole-number labels of "
                    f"shape {[batch.size, *places]}, got {labels.dtype} of shape {list(labels.shape)}",
                    "bad_batch",
                    self.name,
                )
            labels = labels.reshape(view.shape[:2]).long()
        mask = batch.mask if batch.mask is not None and batch.mask.shape == view.shape[:2] else None
        valid = None if labels is None else labels != self.ignore_index
        if self.name == "causal_lm" and labels is not None:
            labels, valid = (
                shift_left(labels, self.ignore_index),
                shift_left(labels != self.ignore_index, False),
            )
            if mask is not None:  # a token is predicted where it and the one before it are real
                valid = valid & mask & shift_left(mask, False)
        elif self.name == "token_classification" and mask is not None:
            valid = mask if valid is None else valid & mask
        elif self.name == "causal_lm" and mask is not None:
            valid = mask & shift_left(mask, False)
        elif self.name == "causal_lm":
            valid = shift_left(torch.ones(view.shape[:2], dtype=torch.bool, device=view.device), False)
        return Reading(logits, view, labels, valid, batch)

    def true(self, reading: Reading) -> Seed:
        """d/df [-log softmax(f)_y] = p - onehot(y); p - y for labels that are probabilities."""
        if reading.labels is not None and reading.labels.is_floating_point():
            return self._finish(reading, _probabilities(reading) - reading.labels)
        return self._seed(reading, _probabilities(reading), self._classes(reading))

    def sampled(self, reading: Reading, uniforms: Uniforms) -> Seed:
        """p - onehot(y) with y ~ p."""
        probabilities = _probabilities(reading)
        flat = probabilities.flatten(0, 1)
        draws = uniforms(reading.view.shape[1])
        if (
            reading.valid is not None
        ):  # numbered by predictions that count: padding on the left changes nothing
            draws = draws.gather(1, (reading.valid.cpu().cumsum(1) - 1).clamp_(min=0))
        labels = draw_index(flat, draws.reshape(-1))
        return self._seed(reading, probabilities, labels.view(reading.view.shape[:2]))

    def columns(self, reading: Reading) -> int | None:
        """C - 1 for one prediction a row; the expectation over every token of a sequence is out of reach."""
        return reading.view.shape[2] - 1 if reading.view.shape[1] == 1 else None

    def exact(self, reading: Reading, column: int) -> Seed:
        """Column k of the Cholesky factor of diag(p) - p p' in closed form (Tanabe & Sagae 1992).

        With tails q_k = sum_{i > k} p_i: l_kk = sqrt(p_k q_k / q_{k-1}), l_ik = -l_kk p_i / q_k for i > k.
        """
        p = _probabilities(reading)
        tails = p.flip(-1).cumsum(-1).flip(-1)  # q_{k-1}
        here, after = tails[..., column], tails[..., column + 1]
        tiny = torch.finfo(p.dtype).tiny
        pivot = (p[..., column] * after / here.clamp(min=tiny)).sqrt()
        gradient = -pivot[..., None] * p / after.clamp(min=tiny)[..., None]
        gradient[..., column] = pivot
        gradient[..., :column] = 0
        return self._finish(reading, gradient)

    def log_prob(self, reading: Reading) -> Tensor:
        """sum_t log softmax(f_t)_{y_t} over the predictions that count, (B,)."""
        logits = reading.output.movedim(self.class_dim, -1).reshape(reading.view.shape)
        if reading.labels is not None and reading.labels.is_floating_point():
            soft: Tensor = (torch.log_softmax(wide(logits), -1) * reading.labels).sum((1, 2))
            return soft
        classes = self._classes(reading)
        chosen = torch.log_softmax(wide(logits), -1).gather(-1, classes.clamp(min=0)[..., None])[..., 0]
        return (chosen if reading.valid is None else chosen.masked_fill(~reading.valid, 0)).sum(1)

    def _soft(self, labels: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """Labels that are probabilities of the classes, with the classes last."""
        if labels.shape != logits.shape:
            raise GradmatchError(
                f"batch {batch.index}: {self.name} with logits {list(logits.shape)} needs whole-number labels, or probabilities in "
                f"the logits' shape; got {labels.dtype} of shape {list(labels.shape)}",
                "bad_batch",
                self.name,
            )
        soft = wide(labels).movedim(self.class_dim, -1)
        if bool((soft < 0).any()) or bool(((soft.sum(-1) - 1).abs() > 1e-2).any()):
            raise GradmatchError(
                f"batch {batch.index}: labels that are probabilities must be at least 0 and sum to 1 over the classes; for independent "
                'yes/no labels pass likelihood="bernoulli", for numbers "regression"',
                "out_of_range",
            )
        return soft

    def _classes(self, reading: Reading) -> Tensor:
        labels, classes = reading.labels, reading.view.shape[2]
        if labels is None:
            raise GradmatchError(
                f"batch {reading.batch.index} has no labels; true labels are needed here", "bad_batch"
            )
        counted = labels if reading.valid is None else labels[reading.valid]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= classes):
            wrong = counted[(counted < 0) | (counted >= classes)][0]
            raise GradmatchError(
                f"batch {reading.batch.index}: label {int(wrong)} is out of range, the model has classes 0 to {classes - 1} "
                f"({self.ignore_index} is ignored)",
                "bad_batch",
            )
        return torch.as_tensor(labels)

    def _seed(self, reading: Reading, probabilities: Tensor, labels: Tensor) -> Seed:
        ones = probabilities.new_full((*labels.shape, 1), -1.0)
        safe = labels if reading.valid is None else labels.masked_fill(~reading.valid, 0)
        return self._finish(reading, probabilities.scatter_add_(-1, safe[..., None], ones))

    def _finish(self, reading: Reading, gradient: Tensor) -> Seed:
        """Ignored predictions out, and back to the shape and dtype of the model's own output."""
        if reading.valid is not None and not bool(reading.valid.all()):
            gradient.masked_fill_(~reading.valid[..., None], 0)
        moved = reading.output.movedim(self.class_dim, -1)
        return reading.output, gradient.view(moved.shape).movedim(-1, self.class_dim).to(reading.output.dtype)


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


def _probabilities(reading: Reading) -> Tensor:
    return torch.softmax(wide(reading.view), -1)


def required(reading: Reading) -> Any:
    """The labels."""
    if reading.labels is None:
        raise GradmatchError(
            f"batch {reading.batch.index} has no labels; true labels are needed here", "bad_batch"
        )
    return reading.labels
