"""How well a run has converged: the relative standard error of every tensor's trace, from groups of batches.

The trace of a tensor's block is one number a batch. Batches are grouped; when there are `GROUPS` groups, neighbours are
merged, so that memory and cost stay small however long the run is. The spread between groups gives the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

GROUPS = 64
ENOUGH = 8  # groups; an error from fewer is not to be trusted with a decision


@dataclass
class Convergence:
    """Per group: how many examples (or draws) it holds and the sum of each tensor's trace over them."""

    sizes: list[float] = field(default_factory=list)
    traces: list[list[float]] = field(default_factory=list)
    batches_a_group: int = 1
    _batches: int = 0
    _last: list[float] = field(default_factory=list)
    _pending: float = 0.0

    @classmethod
    def merged(cls, several: Sequence[Convergence]) -> Convergence:
        """The groups of several ranks side by side."""
        sizes = [size for each in several for size in each.sizes]
        return cls(sizes, [row for each in several for row in each.traces])

    def due(self, examples: float) -> bool:
        """Count a batch; true if the traces are wanted now."""
        self._batches += 1
        self._pending += examples
        return self._batches % self.batches_a_group == 0

    def add(self, cumulative: Sequence[float]) -> None:
        """Close a group, given the traces accumulated since the start of the run."""
        before = self._last or [0.0] * len(cumulative)
        self.traces.append([now - then for now, then in zip(cumulative, before, strict=True)])
        self.sizes.append(self._pending)
        self._last, self._pending = list(cumulative), 0.0
        if len(self.sizes) == GROUPS:
            self.sizes = [a + b for a, b in zip(self.sizes[::2], self.sizes[1::2], strict=True)]
            pairs = zip(self.traces[::2], self.traces[1::2], strict=True)
            self.traces = [[x + y for x, y in zip(a, b, strict=True)] for a, b in pairs]
            self.batches_a_group *= 2

    def relative_errors(self) -> list[float] | None:
        """Of every tensor's trace, or None with fewer than two groups."""
        if len(self.sizes) < 2:
            return None
        return [relative_error(self.sizes, column) for column in zip(*self.traces, strict=True)]

    def relative_error(self) -> float | None:
        """Of the trace over all tensors."""
        if len(self.sizes) < 2:
            return None
        return relative_error(self.sizes, [sum(row) for row in self.traces])

    def reached(self, tolerance: float) -> bool:
        """Whether the trace is known to this relative error, from enough groups to say so; nothing measured is not known."""
        found = self.relative_error() if any(map(any, self.traces)) else None
        return len(self.sizes) >= ENOUGH and found is not None and found <= tolerance


def relative_error(sizes: Sequence[float], sums: Sequence[float]) -> float:
    """sqrt(K / (K - 1) sum_k (S_k - n_k m)^2) / |sum_k S_k|, m = sum S / sum n: of a ratio estimate from K groups."""
    count, total = len(sizes), math.fsum(sums)
    mean = total / math.fsum(sizes)
    spread = math.fsum((s - n * mean) ** 2 for n, s in zip(sizes, sums, strict=True))
    if spread == 0:
        return 0.0
    return math.sqrt(count / (count - 1) * spread) / abs(total) if total else math.inf
