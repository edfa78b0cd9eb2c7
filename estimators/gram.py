"""Gram matrices of linear layers, as RegMean needs them (Jin et al. 2023): A = sum_nt x_nt x_nt' / N, B = I.

One forward a batch, no labels and no backward pass. Only weights of linear and ungrouped convolutional layers have one.
"""

from __future__ import annotations

from typing import Any

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.handlers import convolution, linear, patches, positions, transposed_linear
from gradmatch.estimators.kronecker import FACTOR_A, LARGEST_FACTOR, blocks, real_positions, second_moments
from gradmatch.estimators.problem import Problem
from gradmatch.estimators.units import examples_first, wide

UNITS = "squared inputs of a layer (no loss)"


def start(problem: Problem) -> None:
    """The factors are made when their sizes are known; labels play no part."""
    problem.label_kind = "none"


def step(problem: Problem, batch: Batch) -> None:
    """Add one batch: A += sum of x x' over real positions, for every call of every linear layer."""
    problem.forward(batch)
    problem.counts["predictions"] += batch.size
    for call in problem.listening.calls:
        unit = call.unit
        name = unit.parameters.get("weight")
        if name is None or unit.handler not in (linear, transposed_linear, convolution):
            continue
        x = examples_first(wide(call.input), unit, batch.size, flatten=True)
        if unit.handler is convolution:
            layer: Any = unit.module
            if layer.groups != 1:
                continue
            x = patches(layer, x)
        x = positions(x.reshape(batch.size, -1, x.shape[-1]))
        if x.shape[2] > LARGEST_FACTOR:
            continue
        real = real_positions(batch, name, x.shape[0], x.shape[1])
        second_moments(problem.sums, FACTOR_A + name, x.flatten(0, 1) if real is None else x[real])


def finish(problem: Problem, seen: int) -> dict[str, Any]:
    """Per-example means."""
    factor_a = {
        name: problem.sums[FACTOR_A + name] / seen
        for name in problem.parameters
        if FACTOR_A + name in problem.sums
    }
    if not factor_a:
        raise GradmatchError(
            f"{type(problem.model).__name__} has no trainable linear layer: there is no Gram matrix to take",
            "unsupported_model",
        )
    return {"mean": blocks(problem, seen, factor_a, {}), "factor_a": factor_a}
