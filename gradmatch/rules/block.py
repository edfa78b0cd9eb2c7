"""What a rule or a transform is given of one piece of a tensor: values, weights, curvature, noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Edit:
    """One piece of the stacked task vectors, for a transform.

    Attributes:
        tau: (T, *s).
        alpha: (T, 1, ..., 1).
        noise: gives (T, *s) uniform draws, the same for the same seed, task, tensor and place.
        threshold: (T, 1, ..., 1), from a pass over the whole model, or None where the piece is the whole tensor.
        majority: sign of the sum of all elected signs, for entries that cancel exactly.
    """

    tau: Tensor
    alpha: Tensor
    noise: Callable[[], Tensor]
    threshold: Tensor | None = None
    majority: float = 1.0


@dataclass
class Block:
    """One piece of everything, for an elementwise rule.

    Attributes:
        theta0: (n,).
        tau: (T, n), after the transforms.
        alpha: (T, 1).
        h0: (n,) or a number: base_weight N_0 F_0 + delta0.
        h: (T, n): N_t F_t, summed losses.
        g: (T, n): measured gradients of the summed losses, or None.
        counts: (T, 1): N_t.
        delta0: the floor.
        options: of the rule.
        norms: (T, 1): each model's Fisher norm, 1 unless the rule asks for it.
    """

    theta0: Tensor
    tau: Tensor
    alpha: Tensor
    h0: Any
    h: Any
    g: Any
    counts: Tensor
    delta0: float
    options: Mapping[str, Any]
    norms: Tensor

    def mean_curvature(self) -> Tensor:
        """Per-example means F_t, (T, n), over each model's norm where the rule normalises."""
        mean: Tensor = self.h / self.counts / self.norms
        return mean
