"""Means of losses with their 95 % intervals, per example and per prediction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 0.95


def mean_interval(losses: Tensor, counts: Tensor | None = None) -> tuple[float, float, float]:
    """sum losses / sum counts with the ends of its 95 % interval (Student's t over examples).

    With counts it is a ratio of two sums over the same examples, such as nats per token: its error is that of the residuals
    losses - ratio * counts (linearised).

    Args:
        losses: (n,) nats of each example.
        counts: (n,) predictions of each example; None: one each.

    Returns:
        The mean and the two ends; the ends are nan for a single example.

    Example:
        >>> import torch
        >>> [round(value, 3) for value in mean_interval(torch.tensor([1.0, 2.0, 3.0]))]
        [2.0, -0.484, 4.484]
    """
    from scipy.stats import t

    n = len(losses)
    values = losses.double()
    sizes = values.new_ones(n) if counts is None else counts.double()
    mean = float(values.sum() / sizes.sum())
    if n < 2:
        return mean, math.nan, math.nan
    error = float((values - mean * sizes).square().sum() / (n - 1) / n) ** 0.5 / float(sizes.mean())
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
    return mean, mean - half, mean + half
