"""One whole matrix, for rules that solve a system per matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradmatch.engine.context import add
from gradmatch.engine.explain import not_positive
from gradmatch.engine.stacked import task_vectors
from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules import Solve
from gradmatch.rules.block import Curved, NotPositiveError, Product

if TYPE_CHECKING:
    from gradmatch.engine.buffers import Buffers
    from gradmatch.engine.context import Context
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
    """Whether a matrix is stored [in, out] (Conv1D): as the size of its A says, and for square ones the option or the module."""
    inputs, given = context.inputs, step.options.get("conv1d")
    known = [*(inputs.tasks[t].factors for t in step.tasks), inputs.base_factors]
    specs = [(factors.a, key) for factors in known if factors and (key := factors.a.key(step.name))]
    store, key = specs[0]
    if columns != store.spec(key).shape[0] or columns != step.spec.shape[0]:
        return columns != store.spec(key).shape[0]
    return bool(inputs.conv1d.get(step.name) if given is None else given)


def _solve(context: Context, step: Step, theta0: Tensor, tau: Tensor, stats: dict[str, float]) -> Tensor:
    """Merged W (out, in) from theta0 (out, in) and tau (T, out, in), with the curvatures that the rule needs."""
    inputs, request, shape = context.inputs, context.plan.request, tau.shape[1:]
    given, floor = inputs.base_curvature, request.delta0
    h0 = Product(diagonal=floor)
    if isinstance(given, float):
        h0 = Product(diagonal=given * request.base_weight + floor)
    elif given is not None:
        weight = request.base_weight * given.num_examples
        h0 = _product(step, given, inputs.base_factors, weight, shape, floor, tau.device)
    h = []
    for t in step.tasks:
        task = inputs.tasks[t]
        store = task.mean or (task.factors and task.factors.a)  # Gram matrices come without a diagonal
        count = float(store.num_examples if store else 0)
        h.append(_product(step, task.mean, task.factors, count, shape, 0.0, tau.device))
    curved = Curved(h0, h, step.options)
    assert isinstance(step.rule, Solve)
    try:
        merged = step.rule.solve(theta0, tau, step.alpha, curved)
    except NotPositiveError:
        raise GradmatchError(
            not_positive(step, step.spec.numel, 0, step.spec.numel), "not_positive"
        ) from None
    add(stats, curved.health)
    return merged


def _product(
    step: Step,
    mean: CurvatureStore | None,
    factors: Factors | None,
    scale: float,
    shape: torch.Size,
    floor: float,
    device: torch.device,
) -> Product:
    """One curvature of a matrix W (out, in) = `shape`, times `scale`, plus the floor."""
    found = factors.read(step.name) if factors else None
    if found is not None:
        a, b = (None if factor is None else factor.to(device) for factor in found)
        return Product(scale, a, b, diagonal=floor)
    key = mean.key(step.name) if mean else None
    if key is None or mean is None:
        return Product(diagonal=floor)
    diagonal = mean.block(key, 0, step.spec.numel).to(device, torch.float64).reshape(step.spec.shape[0], -1)
    return Product(diagonal=scale * (diagonal if diagonal.shape == shape else diagonal.mT) + floor)
