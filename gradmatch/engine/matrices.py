"""One whole matrix, for rules that solve a system per matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradmatch.engine.context import add
from gradmatch.engine.explain import not_positive
from gradmatch.engine.stacked import task_vectors
from gradmatch.rules.kronecker import Product, kronecker
from gradmatch.rules.regmean import regmean

if TYPE_CHECKING:
    from gradmatch.engine.context import Context
    from gradmatch.engine.kernels import Buffers
    from gradmatch.models.curvatures import CurvatureStore, Factors
    from gradmatch.plan.step import Step


def solve_matrix(
    context: Context, step: Step, buffers: Buffers, stats: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """One matrix (a convolution's kernels as rows) by its rule, in float64: merged and theta0, flat, in the dtype of the arithmetic.

    Raises:
        ValueError: the curvature that is to be inverted is not positive.
    """
    theta0, tau = task_vectors(context, step, 0, step.spec.numel, buffers, stats)
    rows = step.spec.shape[0]
    base = theta0.to(torch.float64).reshape(rows, -1)
    stacked = tau.to(torch.float64).reshape(len(step.tasks), rows, -1)
    if transposed(context, step, base.shape[1]):
        base, stacked = base.mT, stacked.mT
        merged = _solve(context, step, base, stacked, stats).mT
    else:
        merged = _solve(context, step, base, stacked, stats)
    return merged.reshape(-1).to(theta0.dtype), theta0


def transposed(context: Context, step: Step, columns: int) -> bool:
    """Whether a matrix is stored [in, out] (Conv1D): as the size of its A says, and for square ones the config or the option."""
    inputs, given = context.inputs, step.options["conv1d"]
    known = [*(inputs.tasks[t].factors for t in step.tasks), inputs.base_factors]
    specs = [(factors.a, key) for factors in known if factors and (key := factors.a.key(step.name))]
    store, key = specs[0]
    conv1d = inputs.is_conv1d(step.name) if given is None else bool(given)
    return columns != store.spec(key).shape[0] or (columns == step.spec.shape[0] and conv1d)


def _solve(context: Context, step: Step, theta0: Tensor, tau: Tensor, stats: dict[str, float]) -> Tensor:
    """Merged W (out, in) from theta0 (out, in) and tau (T, out, in)."""
    if "gram" in context.plan.request.rule.needs:
        return _regmean(context, step, theta0 + tau)
    return theta0 + _kronecker(context, step, tau, stats)


def _regmean(context: Context, step: Step, theta: Tensor) -> Tensor:
    """RegMean with the second moments of every task's inputs."""
    grams = []
    for t in step.tasks:
        factors = context.inputs.tasks[t].factors
        found = factors.read(step.name) if factors else None
        assert factors is not None
        assert found is not None
        grams.append(found[0] * factors.a.num_examples)
    alpha = theta.new_tensor(step.alpha).reshape(-1, 1, 1)
    return regmean(theta, alpha, torch.stack(grams), step.options["off_diagonal"], step.options["ridge"])


def _kronecker(context: Context, step: Step, tau: Tensor, stats: dict[str, float]) -> Tensor:
    """The update of Eq. 12 with Kronecker factors, diagonals where a curvature has none; counts iterations and the residual."""
    inputs, request, shape = context.inputs, context.plan.request, tau.shape[1:]
    given, floor = inputs.base_curvature, request.delta0
    if given is None or isinstance(given, float):
        h0 = Product(diagonal=(given or 0.0) * request.base_weight + floor)
    else:
        h0 = _product(
            step, given, inputs.base_factors, request.base_weight * given.num_examples, shape, floor
        )
    h = []
    for t in step.tasks:
        task = inputs.tasks[t]
        assert task.mean is not None
        h.append(_product(step, task.mean, task.factors, float(task.mean.num_examples), shape, 0.0))
    found = kronecker(tau, step.alpha, h0, h, int(step.options["iterations"]), step.options["tolerance"])
    if not found.positive:
        raise ValueError(not_positive(step, step.spec.numel, 0, step.spec.numel))
    add(stats, {"iterations": float(found.iterations), "residual": found.residual})
    return found.update


def _product(
    step: Step, mean: CurvatureStore, factors: Factors | None, scale: float, shape: torch.Size, floor: float
) -> Product:
    """One curvature of a matrix W (out, in) = `shape`, times `scale`, plus the floor."""
    found = factors.read(step.name) if factors else None
    if found is not None:
        return Product(scale, *found, diagonal=floor)
    key = mean.key(step.name)
    if key is None:
        return Product(diagonal=floor)
    diagonal = mean.block(key, 0, step.spec.numel).to(torch.float64).reshape(step.spec.shape[0], -1)
    return Product(diagonal=scale * (diagonal if diagonal.shape == shape else diagonal.mT) + floor)
