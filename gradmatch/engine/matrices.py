"""One whole matrix, for rules that solve a system per matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradmatch.rules.regmean import regmean

if TYPE_CHECKING:
    from gradmatch.engine.context import Context
    from gradmatch.plan.plan import Step


def solve_matrix(context: Context, step: Step, dtype: torch.dtype) -> Tensor:
    """RegMean of one matrix (a convolution's kernels as rows); stored [in, out] where the second moments say so (Conv1D)."""
    theta, grams = [], []
    for t in step.tasks:
        task = context.inputs.tasks[t]
        assert task.factor is not None
        key = task.factor.key(step.name)
        assert key is not None
        spec = task.factor.spec(key)
        factor = task.factor.block(key, 0, spec.numel).to(torch.float64).reshape(spec.shape)
        grams.append(factor * task.factor.num_examples)
        values = task.store.block(step.name, 0, step.spec.numel).to(torch.float64)
        theta.append(values.reshape(step.spec.shape[0], -1))
    gram, stacked = torch.stack(grams), torch.stack(theta)
    alpha = stacked.new_tensor(step.alpha).reshape(-1, 1, 1)
    given = step.options["conv1d"]  # tells for square matrices; other shapes tell by themselves
    square = stacked.shape[1] == stacked.shape[2]
    conv1d = context.inputs.is_conv1d(step.name) if given is None else bool(given)
    transposed = stacked.shape[2] != gram.shape[1] or (square and conv1d)
    if transposed:
        stacked = stacked.transpose(1, 2)
    merged = regmean(stacked, alpha, gram, step.options["off_diagonal"], step.options["ridge"])
    return (merged.transpose(0, 1) if transposed else merged).reshape(-1).to(dtype)
