"""Softmax over classes: of one prediction a row, of every token, of every pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.likelihood import (
    IGNORE,
    Reading,
    Seed,
    Uniforms,
    checked_logits,
    required,
    shift_left,
    wide,
)
from gradmatch.estimators.randomness import draw_index


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
        labels, classes = required(reading), reading.view.shape[2]
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


def _probabilities(reading: Reading) -> Tensor:
    return torch.softmax(wide(reading.view), -1)
