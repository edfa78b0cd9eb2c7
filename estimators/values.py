"""Likelihoods of numbers rather than classes: yes/no outputs, Gaussian noise, and whatever a user defines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.likelihood import (
    IGNORE,
    OwnLikelihood,
    Reading,
    Seed,
    Uniforms,
    checked_logits,
    required,
    wide,
)


class Bernoulli:
    """Independent yes/no outputs (multi-label): log p = sum_k y_k log s(f_k) + (1 - y_k) log(1 - s(f_k)), s the sigmoid.

    Labels are 0, 1 or -100 (ignored), in the shape of the logits.

    Example:
        >>> from gradmatch.estimators import estimate
        >>> batch = (torch.randn(4, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, -100.0]]))
        >>> found = estimate(torch.nn.Linear(2, 2), [batch], likelihood=Bernoulli(), progress=False)
        >>> found.info["likelihood"]
        'bernoulli'
    """

    name = "bernoulli"

    def read(self, output: Any, batch: Batch) -> Reading:
        """Logits as (B, K, 1), labels likewise."""
        logits = checked_logits(output, batch)
        view = logits.detach().reshape(batch.size, -1, 1)
        labels, valid = _values(batch, view, logits), None
        if labels is not None:
            valid = (labels != IGNORE)[..., 0]
            if bool(((labels < 0) | (labels > 1))[valid].any()):
                raise GradmatchError(
                    f"batch {batch.index}: bernoulli labels must lie in 0 .. 1 ({IGNORE} is ignored)",
                    "out_of_range",
                )
        return Reading(logits, view, labels, valid, batch)

    def true(self, reading: Reading) -> Seed:
        """d/df = s(f) - y."""
        return _finish_values(reading, torch.sigmoid(wide(reading.view)) - required(reading))

    def sampled(self, reading: Reading, uniforms: Uniforms) -> Seed:
        """s(f) - y with y ~ Bernoulli(s(f))."""
        p = torch.sigmoid(wide(reading.view))
        draws = uniforms(p.shape[1]).to(p.device)[..., None] < p
        return _finish_values(reading, p - draws.to(p.dtype))

    def columns(self, reading: Reading) -> int | None:
        """One column per output."""
        return int(reading.view.shape[1])

    def exact(self, reading: Reading, column: int) -> Seed:
        """sqrt(s (1 - s)) e_k."""
        p = torch.sigmoid(wide(reading.view))
        return _finish_values(reading, _only((p * (1 - p)).sqrt(), column))

    def log_prob(self, reading: Reading) -> Tensor:
        """sum_k y_k log s(f_k) + (1 - y_k) log s(-f_k), (B,)."""
        y, f = required(reading), wide(reading.output.reshape(reading.view.shape))
        terms: Tensor = y * torch.nn.functional.logsigmoid(f) + (1 - y) * torch.nn.functional.logsigmoid(-f)
        return (terms if reading.valid is None else terms.masked_fill(~reading.valid[..., None], 0)).sum(
            (1, 2)
        )


class Gaussian:
    """Regression with noise of known variance: log p = -(y - f)^2 / (2 variance) + const, summed over outputs.

    Args:
        variance: of the noise, in squared units of the target. 1 makes the Fisher that of half the squared error.

    Example:
        >>> from gradmatch.estimators import estimate
        >>> batch = (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
        >>> estimate(torch.nn.Linear(1, 1), [batch], method="ggn", likelihood=Gaussian(2.0), progress=False)["weight"]
        tensor([[2.5000]])
    """

    name = "regression"

    def __init__(self, variance: float = 1.0) -> None:
        if not variance > 0 or not math.isfinite(variance):
            raise GradmatchError(
                f"the noise variance must be positive and finite, got {variance}", "out_of_range"
            )
        self.variance = variance

    def read(self, output: Any, batch: Batch) -> Reading:
        """Outputs as (B, K, 1), targets likewise."""
        means = checked_logits(output, batch)
        view = means.detach().reshape(batch.size, -1, 1)
        return Reading(means, view, _values(batch, view, means), None, batch)

    def true(self, reading: Reading) -> Seed:
        """d/df = (f - y) / variance."""
        return _finish_values(reading, (wide(reading.view) - required(reading)) / self.variance)

    def sampled(self, reading: Reading, uniforms: Uniforms) -> Seed:
        """(f - y) / variance with y ~ N(f, variance), so a standard normal over its deviation."""
        noise = torch.special.ndtri(uniforms(reading.view.shape[1]).clamp(min=2.0**-54))
        return _finish_values(reading, -noise[..., None].to(reading.view.device) / math.sqrt(self.variance))

    def columns(self, reading: Reading) -> int | None:
        """One column per output."""
        return int(reading.view.shape[1])

    def exact(self, reading: Reading, column: int) -> Seed:
        """e_k / sqrt(variance)."""
        flat = torch.ones_like(wide(reading.view)) / math.sqrt(self.variance)
        return _finish_values(reading, _only(flat, column))

    def log_prob(self, reading: Reading) -> Tensor:
        """-(y - f)^2 / (2 variance), without its constant, (B,)."""
        f = wide(reading.output.reshape(reading.view.shape))
        squares: Tensor = (required(reading) - f) ** 2
        return -squares.sum((1, 2)) / (2 * self.variance)


class Own:
    """A user's likelihood (`sample`, `log_prob`) behind the interface of the others."""

    def __init__(self, given: OwnLikelihood) -> None:
        self.given = given
        self.name = str(getattr(given, "name", type(given).__name__))

    def read(self, output: Any, batch: Batch) -> Reading:
        """Keep the output as it is."""
        return Reading(output, torch.empty(batch.size, 1, 1), batch.labels, None, batch)

    def true(self, reading: Reading) -> Seed:
        """Seed at log_prob itself."""
        loss = -self.log_prob(reading)
        return loss, torch.ones_like(loss)

    def sampled(self, reading: Reading, uniforms: Uniforms) -> Seed:
        """Seed at log_prob of labels that `sample` drew from a generator seeded by the run and the batch."""
        word = int(float(uniforms(1)[0, 0]) * 2**53)
        labels = self.given.sample(reading.output, torch.Generator().manual_seed(word))
        loss = -self._log_prob(reading, labels)
        return loss, torch.ones_like(loss)

    def columns(self, reading: Reading) -> int | None:
        """Unknown for an arbitrary likelihood."""
        return None

    def exact(self, reading: Reading, column: int) -> Seed:
        """Not available."""
        raise GradmatchError(
            f"the likelihood {self.name} has no exact expectation over labels; use sampled labels",
            "bad_batch",
            self.name,
        )

    def log_prob(self, reading: Reading) -> Tensor:
        """The user's log_prob at the true labels, (B,)."""
        return self._log_prob(reading, required(reading))

    def _log_prob(self, reading: Reading, labels: Any) -> Tensor:
        value = self.given.log_prob(reading.output, labels)
        if value.shape != (reading.batch.size,):
            raise GradmatchError(
                f"log_prob of {self.name} returned shape {list(value.shape)}, it must give one number per example: "
                f"[{reading.batch.size}]",
                "bad_batch",
                self.name,
            )
        if bool(torch.isnan(value).any()):
            raise GradmatchError(
                f"log_prob of {self.name} is NaN in batch {reading.batch.index}", "not_finite", self.name
            )
        return value


def _values(batch: Batch, view: Tensor, output: Tensor) -> Tensor | None:
    """Labels as (B, K, 1) numbers."""
    if batch.labels is None:
        return None
    if batch.labels.numel() != view.numel():
        raise GradmatchError(
            f"batch {batch.index}: labels of shape {list(batch.labels.shape)} do not fit outputs of shape {list(output.shape)}",
            "bad_batch",
        )
    labels: Tensor = batch.labels.to(wide(view).dtype).reshape(view.shape)
    return labels


def _only(values: Tensor, column: int) -> Tensor:
    """All but one output set to zero; (B, K, 1)."""
    kept = torch.zeros_like(values)
    kept[:, column] = values[:, column]
    return kept


def _finish_values(reading: Reading, gradient: Tensor) -> Seed:
    if reading.valid is not None:
        gradient = gradient.masked_fill(~reading.valid[..., None], 0)
    return reading.output, gradient.reshape(reading.output.shape).to(reading.output.dtype)
