"""What becomes of the gradients of a backward pass: squares, sums, or both. All accumulators are plain sums.

A sink writes into a dict of tensors named `diagonal/<parameter>`, `spread/<parameter>` and `gradient/<parameter>`, so
that ranks can be added up and an interrupted run resumed without knowing which estimator it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from gradmatch.estimators.gradients import CHUNK_BYTES, Gradients, Outer, Rows, SetAside, add_cross_terms
from gradmatch.estimators.products import Workspace

Sums = dict[str, Tensor]
DIAGONAL, SPREAD, GRADIENT = "diagonal/", "spread/", "gradient/"


def zeros(parameters: Mapping[str, Tensor], prefix: str, sums: Sums) -> None:
    """Add accumulators of at least single precision for every parameter, unless they are there already."""
    for name, value in parameters.items():
        if prefix + name not in sums:
            kind = torch.float64 if value.dtype == torch.float64 else torch.float32
            sums[prefix + name] = torch.zeros(value.shape, dtype=kind, device=value.device)


class SquareSink:
    """sum over examples of squared per-example gradients; with `spread` also of their squares, for standard errors."""

    whole = False
    summed = False

    def __init__(self, sums: Sums, space: Workspace, *, spread: bool = False, gradient: bool = False) -> None:
        self.sums, self.space, self.spread, self.gradient = sums, space, spread, gradient

    def add(self, name: str, gradients: Gradients) -> None:
        """squares += sum_n g_n^2 (and gradient += sum_n g_n)."""
        gradients.add_squares(self.sums[DIAGONAL + name], self._spread(name), self.space)
        if self.gradient:
            self.sums[GRADIENT + name].add_(gradients.total())

    def add_aside(self, name: str, outer: Outer) -> bool:
        """The output layer's share of a shared embedding."""
        self.add(name, outer)
        return True

    def add_rest(self, name: str, aside: SetAside, rows: Rows) -> None:
        """The cross terms with the embedding's share."""
        add_cross_terms(aside, rows, self.sums[DIAGONAL + name], self._spread(name))
        if self.gradient:
            self.sums[GRADIENT + name].add_(rows.total())

    def _spread(self, name: str) -> Tensor | None:
        return self.sums[SPREAD + name] if self.spread else None


class GradientSink:
    """gradient += sum_n g_n."""

    whole = False
    summed = True

    def __init__(self, sums: Sums) -> None:
        self.sums = sums

    def add(self, name: str, gradients: Gradients) -> None:
        """Sum over the batch."""
        self.sums[GRADIENT + name].add_(gradients.total())

    def add_aside(self, name: str, outer: Outer) -> bool:
        """Wait for the other uses: a sum has no use for it."""
        return False

    def add_rest(self, name: str, aside: SetAside, rows: Rows) -> None:
        """Never called, since nothing is set aside."""


class BatchSquareSink:
    """squares += (sum_n g_n)^2: with labels drawn from the model, unbiased for the sum of squares, whatever the batch.

    E[(sum_n g_n)^2] = sum_n E[g_n^2], because the gradients of different examples are independent and of mean zero
    (Gauss-Newton-Bartlett estimator; Liu et al. 2023, Sophia). spread += squares^2 / n, n the size of the batch.
    """

    whole = False
    summed = True

    def __init__(self, sums: Sums, *, spread: bool, draws: int) -> None:
        self.sums, self.spread, self.draws = sums, spread, draws
        self._squares: dict[str, Tensor] = {}

    def add(self, name: str, gradients: Gradients) -> None:
        """Square of the sum."""
        square = gradients.total().square_()
        if self.spread:
            kept = self._squares.get(name)
            self._squares[name] = square if kept is None else kept.add_(square)
        self.sums[DIAGONAL + name].add_(square)

    def add_aside(self, name: str, outer: Outer) -> bool:
        """Wait for the other uses."""
        return False

    def add_rest(self, name: str, aside: SetAside, rows: Rows) -> None:
        """Never called, since nothing is set aside."""

    def finish(self, examples: int) -> None:
        """End of a batch: the square of its (mean over draws) estimate, over its size."""
        for name, square in self._squares.items():
            mean = square / self.draws
            self.sums[SPREAD + name].addcmul_(mean, mean, value=1 / examples)
        self._squares = {}


class DrawsSink:
    """Standard errors with several draws or columns: what an example contributes is known only after all of them.

    s_n = weight * sum_d g_nd^2; squares += sum_n s_n / weight (as SquareSink does), spread += sum_n s_n^2.
    Keeps the factors of every draw until `finish`.
    """

    whole = True
    summed = False

    def __init__(self, sums: Sums, weight: float) -> None:
        self.sums, self.weight = sums, weight
        self._draws: dict[str, list[Gradients]] = defaultdict(list)

    def add(self, name: str, gradients: Gradients) -> None:
        """One more draw."""
        self._draws[name].append(gradients)

    def add_aside(self, name: str, outer: Outer) -> bool:
        """Wait for the other uses."""
        return False

    def add_rest(self, name: str, aside: SetAside, rows: Rows) -> None:
        """Never called, since nothing is set aside."""

    def finish(self, examples: int) -> None:
        """End of a batch: dense gradients of a few examples at a time, all draws together."""
        for name, draws in self._draws.items():
            squares, spread = self.sums[DIAGONAL + name], self.sums[SPREAD + name]
            step = max(1, CHUNK_BYTES // max(1, squares.numel() * squares.element_size()))
            for first in range(0, examples, step):
                last = min(first + step, examples)
                found = torch.zeros(last - first, *squares.shape, dtype=squares.dtype, device=squares.device)
                for gradients in draws:
                    found.add_(gradients.dense(first, last).square())
                squares.add_(found.sum(0))
                spread.add_(found.mul_(self.weight).square_().sum(0))
        self._draws = defaultdict(list)
