"""What a rule or a transform is given: one piece of a tensor, or one matrix, with what is known of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.structures import Structure


def total(x: Tensor | Sequence[Tensor]) -> Tensor:
    """sum_t x_t, one task after another, so that the bits do not depend on how tensors are cut. x: (T, *s). Returns (*s,).

    Example:
        >>> import torch
        >>> total(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [4.0, 6.0]
    """
    summed: Tensor = reduce(operator.add, x)
    return summed


@dataclass(frozen=True)
class Cut:
    """The r largest |tau_t| of a tensor or model, told by the last of them; of equal ones those that come first are larger.

    Attributes:
        value: (T, 1, ..., 1), its magnitude; infinite where r = 0, negative where nothing is beyond it.
        place: (T, 1, ..., 1), its place in the flat tensor.
    """

    value: Tensor
    place: Tensor

    def holds(self, tau: Tensor, first: int) -> Tensor:
        """Which entries of a piece that begins at place `first` are among them. tau: (T, *s). Returns (T, *s), bool."""
        import torch

        last = first + tau[0].numel() - 1
        held = torch.empty_like(tau, dtype=torch.bool)
        cuts = zip(tau, self.value.flatten().tolist(), self.place.flatten().tolist(), held, strict=True)
        for one, value, place, out in cuts:
            size = one.abs()
            torch.ge(size, value, out=out) if place >= last else torch.gt(size, value, out=out)
            if first <= place < last:  # the last of the equal ones lies in this piece
                until = place - first + 1
                out.view(-1)[:until] |= size.flatten()[:until] == value
        return held


@dataclass
class Edit:
    """One piece of the stacked task vectors, for a transform.

    Attributes:
        tau: (T, *s).
        alpha: (T, 1, ..., 1).
        noise: gives (T, *s) uniform draws, the same for the same seed, task, tensor and place.
        first: place of the piece's first entry in the tensor.
        cuts: the cuts that the transform asks for by its `ranks`.
        sums: (k, T), its `sums` over the whole tensor, in float64; None where it asks for none.
        majority: sign of the sum of all elected signs, for entries that cancel exactly.
        health: what the transform has to tell of this piece, for the report.
        theta0: (*s), of the base.
    """

    tau: Tensor
    alpha: Tensor
    noise: Callable[[], Tensor]
    first: int = 0
    cuts: Sequence[Cut] = ()
    sums: Tensor | None = None
    majority: float = 1.0
    health: dict[str, float] = field(default_factory=dict)
    theta0: Tensor | None = None

    def column(self, value: float | tuple[float, ...]) -> Tensor | float:
        """An option as a number, or (T, 1, ..., 1) where every task has its own."""
        return (
            self.tau.new_tensor(value).reshape(self.alpha.shape) if isinstance(value, tuple) else float(value)
        )


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
        damping: lambda, of a damped rule: its option `damping` times the mean of H0's diagonal over the model.
        anchor: (n,): another merge minus theta0. Needs "anchor".
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
    damping: float
    anchor: Tensor

    def __init__(self, **known: Any) -> None:
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        need = {
            "h0": "base_curvature",
            "h": "curvature",
            "counts": "curvature",
            "norms": "curvature",
            "g": "gradient",
            "anchor": "anchor",
        }.get(name)
        if need is None:
            raise AttributeError(f"a block has no {name!r}")
        raise GradmatchError(
            f"the rule reads {name!r} of its block and does not say that it needs it: add needs={{{need!r}}}",
            "bad_setting",
            name,
        )

    def mean_curvature(self) -> Tensor:
        """Per-example means F_t, (T, n), over each model's norm where the rule normalises."""
        mean: Tensor = self.h / self.counts / self.norms
        return mean


@dataclass
class Update:
    """What a rule adds to a tensor or to a piece of it, for an edit after the rule.

    Attributes:
        value: theta - theta0, (n,); of an edit of whole matrices (m, n), the kernels of a convolution as rows.
        tau: the tasks' own task vectors, before any transform, in the same shape, each read when it is asked for and valid until
            the next one is; of whole matrices alone.
        count: T.
        depth: where in the model's depth the tensor lies, 0 at the first layer, 1 at the last.
    """

    value: Tensor
    tau: Sequence[Tensor]
    count: int
    depth: float


@dataclass
class Curved:
    """The curvatures of one matrix, for a rule that solves for it.

    Attributes:
        h0: H0 = base_weight N_0 F_0 + delta0; delta0 alone where the rule needs no base curvature.
        h: H_t of the summed losses, one a task.
        options: of the rule.
        health: what the rule has to tell of this matrix, for the report ("iterations", "residual").
        g: (T, out, in), measured gradients of the summed losses, where the rule needs them.
        anchor: (out, in), another merge minus theta0, of a rule with an anchor.
        damping: lambda of a damped rule.
        delta0: the floor.
    """

    h0: Structure
    h: Sequence[Structure]
    options: Mapping[str, Any]
    health: dict[str, float] = field(default_factory=dict)
    g: Tensor | None = None
    anchor: Tensor | None = None
    damping: float = 0.0
    delta0: float = 0.0


class NotPositiveError(ArithmeticError):
    """Raised by a rule that solves, where the curvature that it inverts is not positive."""


class UnboundedError(ArithmeticError):
    """Raised by a removal whose guard leaves next to nothing to divide by; its argument is how often the task vector it goes."""
