"""KFAC (Martens & Grosse 2015): the Fisher of a linear layer's weight as A (x) B, for shared weights in one of two forms.

Eschenhagen et al. 2023 name them, for inputs x_nt and gradients g_nt of example n at position t, R positions in all:

    expand:  A = sum_nt x_nt x_nt' / R,   B = sum_nt g_nt g_nt' / N      positions taken as independent
    reduce:  A = sum_n x_n x_n' / N,      B = sum_n g_n g_n' / N         x_n = mean_t x_nt, g_n = sum_t g_nt

Both are per-example means on the scale of the diagonal Fisher. Parameters that are no matrix of a linear or ungrouped
convolutional layer, those used more than once in a forward, and matrices with more than `LARGEST_FACTOR` rows have the diagonal Fisher.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from gradmatch.estimators import fisher
from gradmatch.estimators.batches import Batch
from gradmatch.estimators.gradients import Gradients, Outer, Patches, Rows, SetAside
from gradmatch.estimators.kronecker import (
    FACTOR_A,
    FACTOR_B,
    LARGEST_FACTOR,
    POSITIONS,
    blocks,
    real_positions,
    second_moments,
)
from gradmatch.estimators.problem import Problem
from gradmatch.estimators.sinks import DIAGONAL, SquareSink, zeros


def start(problem: Problem) -> None:
    """Diagonal accumulators; the factors are made when their sizes are known."""
    zeros(problem.parameters, DIAGONAL, problem.sums)


def step(problem: Problem, batch: Batch) -> None:
    """Add one batch: factors from every draw or column of labels."""
    reading = problem.read(batch)
    for number, last, seed in fisher.seeds(problem, reading, batch, problem.samples):
        sink = KroneckerSink(problem, batch, first_draw=number == 0)
        problem.listening.backward(seed, sink, keep=not last)


def finish(problem: Problem, seen: int) -> dict[str, Any]:
    """Per-example means of the factors and of the diagonal blocks."""
    sums = problem.sums
    names = [name for name in problem.parameters if FACTOR_A + name in sums]
    factor_a = {
        name: sums[FACTOR_A + name] / sums[POSITIONS + name].clamp(min=1).to(sums[FACTOR_A + name])
        for name in names
    }
    factor_b = {name: sums[FACTOR_B + name] / (seen * problem.draws) for name in names}
    return {"mean": blocks(problem, seen, factor_a, factor_b), "factor_a": factor_a, "factor_b": factor_b}


class KroneckerSink:
    """Adds the factors of every matrix, and squares for everything else."""

    whole = False
    summed = False

    def __init__(self, problem: Problem, batch: Batch, first_draw: bool) -> None:
        self.problem, self.batch, self.first_draw = problem, batch, first_draw
        self.squares = SquareSink(problem.sums, problem.space)
        self.uses = Counter(
            name for call in problem.listening.calls for name in call.unit.parameters.values()
        )

    def add(self, name: str, gradients: Gradients) -> None:
        """Factors of a matrix; squares of anything else."""
        outer = gradients.outer() if isinstance(gradients, Patches) and self.uses[name] == 1 else gradients
        if self.uses[name] == 1 and isinstance(outer, Outer) and _largest(outer) <= LARGEST_FACTOR:
            left_is_input = self.problem.is_transposed(name)
            x, g = (outer.left, outer.right) if left_is_input else (outer.right, outer.left)
            self._add_factors(name, x, g)
        else:
            self.squares.add(name, gradients)

    def add_aside(self, name: str, outer: Outer) -> bool:
        """A shared embedding has the diagonal."""
        return self.squares.add_aside(name, outer)

    def add_rest(self, name: str, aside: SetAside, rows: Rows) -> None:
        """Its other part."""
        self.squares.add_rest(name, aside, rows)

    def _add_factors(self, name: str, x: Tensor, g: Tensor) -> None:
        """A += sum x x', once a forward; B += sum g g'. x (B, T, I), g (B, T, O)."""
        sums = self.problem.sums
        real = real_positions(self.batch, name, x.shape[0], x.shape[1])
        if self.problem.kfac_form == "reduce":
            if real is None:
                x = x.mean(1)
            else:
                x = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
            g = g.sum(1)
        elif real is None:
            x, g = x.flatten(0, 1), g.flatten(0, 1)
        else:
            x, g = x[real], g[real]
        if self.first_draw:
            second_moments(sums, FACTOR_A + name, x)
            sums[POSITIONS + name] = sums.get(POSITIONS + name, x.new_zeros(1).double()) + x.shape[0]
        second_moments(sums, FACTOR_B + name, g)


def _largest(outer: Outer) -> int:
    """Rows of the larger of its two factors."""
    return max(outer.left.shape[2], outer.right.shape[2])
