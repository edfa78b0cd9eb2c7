"""Losses of language models as one reads them, and how many continuations a comparison of toxicity takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from gradmatch.measure.intervals import mean_interval

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.measure.objective import Objective


@dataclass(frozen=True)
class Loss:
    """A loss with its 95 % interval over examples (Student's t), per token where the model predicts tokens, else per example.

    Attributes:
        mean, low, high: nats.
        tokens: predicted in all; None where every example has one prediction.
        examples: how many.
    """

    mean: float
    low: float
    high: float
    tokens: int | None
    examples: int

    @classmethod
    def of(cls, losses: Tensor, counts: Tensor | None) -> Loss:
        """From each example's summed loss and its number of predictions.

        Example:
            >>> import torch
            >>> Loss.of(torch.tensor([2.0, 6.0]), torch.tensor([2.0, 2.0])).mean
            2.0
        """
        mean, low, high = mean_interval(losses, counts)
        return cls(mean, low, high, None if counts is None else int(counts.sum()), len(losses))

    @property
    def perplexity(self) -> float:
        """exp(mean); inf where it overflows."""
        return exponent(self.mean)

    def __str__(self) -> str:
        unit = "example" if self.tokens is None else "token"
        text = f"{self.mean:.3f} nats a{'n' if unit == 'example' else ''} {unit} [{self.low:.3f}, {self.high:.3f}]"
        if self.tokens is None:
            return text
        ends = ", ".join(f"{exponent(end):.2f}" for end in (self.low, self.high))
        return f"{text}, perplexity {self.perplexity:.2f} [{ends}]"


def exponent(nats: float) -> float:
    """exp, and inf where it overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def measured_loss(objective: Objective, weights: object) -> Loss:
    """The loss of a model on an objective's examples."""
    losses = objective.losses(weights)  # type: ignore[arg-type]
    return Loss.of(losses, objective.predictions())


def continuations_needed(spread: float, difference: float, power: float = 0.8) -> int:
    """Continuations of each model that a difference of mean scores takes to be seen: 2 ((z_.975 + z_power) spread / difference)^2.

    spread: standard deviation of one continuation's score. Two-sided 5 %, continuations of both models independent; pairs by prompt
    take fewer.

    Example:
        >>> continuations_needed(0.2, 0.03)
        698
    """
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power)
    return math.ceil(2 * (z * spread / difference) ** 2)
