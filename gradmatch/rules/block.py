"""What a rule or a transform is given: one piece of a tensor, or one matrix, with what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


class Block:
    """One piece of everything, for an elementwise rule. What the rule does not need is not there, and asking for it is an error.

    Attributes:
        theta0: (n,).
        tau: (T, n), after the transforms.
        alpha: (T, 1).
        delta0: the floor.
        options: of the rule.
        h0: (n,): base_weight N_0 F_0 + delta0. Needs "base_curvature".
        h: (T, n): N_t F_t, summed losses. Needs "curvature".
        counts: (T, 1): N_t. Needs "curvature".
        norms: (T, 1): each model's Fisher norm, 1 unless the option normalize_fishers is set. Needs "curvature".
        g: (T, n): measured gradients of the summed losses. Needs "gradient".
    """

    theta0: Tensor
    tau: Tensor
    alpha: Tensor
    delta0: float
    options: Any
    h0: Tensor
    h: Tensor
    counts: Tensor
    norms: Tensor
    g: Tensor

    def __init__(self, **known: Any) -> None:
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        need = {
            "h0": "base_curvature",
            "h": "curvature",
            "counts": "curvature",
            "norms": "curvature",
            "g": "gradient",
        }.get(name)
        if need is None:
            raise AttributeError(f"a block has no {name!r}")
        raise ValueError(
            f"the rule reads {name!r} of its block and does not say that it needs it: add needs={{{need!r}}}"
        )

    def mean_curvature(self) -> Tensor:
        """Per-example means F_t, (T, n), over each model's norm where the rule normalises."""
        mean: Tensor = self.h / self.counts / self.norms
        return mean


@dataclass(frozen=True)
class Product:
    """A curvature of one matrix W (out, in) as a linear map: scale * B W A + diagonal * W (elementwise).

    Attributes:
        scale: N of the summed loss, times its weight; 0 where there are no factors.
        a: second moments of the inputs, (in, in), or None.
        b: those of the gradients at the outputs, (out, out), or None for the identity.
        diagonal: (out, in) or a number, in nats per squared unit of weight.
    """

    scale: float = 0.0
    a: Tensor | None = None
    b: Tensor | None = None
    diagonal: Tensor | float = 0.0

    def __call__(self, w: Tensor) -> Tensor:
        """The curvature times a matrix of weights, (out, in)."""
        result = self.diagonal * w
        if self.a is not None:
            result = result + self.scale * ((w if self.b is None else self.b @ w) @ self.a)
        return result


@dataclass
class Curved:
    """The curvatures of one matrix, for a rule that solves for it.

    Attributes:
        h0: H0 = base_weight N_0 F_0 + delta0; delta0 alone where the rule needs no base curvature.
        h: H_t of the summed losses, one a task.
        options: of the rule.
        health: what the rule has to tell of this matrix, for the report ("iterations", "residual").
    """

    h0: Product
    h: Sequence[Product]
    options: Mapping[str, Any]
    health: dict[str, float] = field(default_factory=dict)


class NotPositiveError(ArithmeticError):
    """Raised by a rule that solves, where the curvature that it inverts is not positive."""
