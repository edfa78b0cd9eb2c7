"""One piece of one tensor, as the plan says: by coefficients, or by the readable rule on all that it must see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmatch.engine.buffers import Buffers
from gradmatch.engine.context import Context, add, fetch
from gradmatch.engine.explain import not_positive
from gradmatch.engine.matrices import solve_matrix
from gradmatch.engine.stacked import (
    TaskVectors,
    decomposed,
    gram_matrix,
    make_block,
    task_vectors,
    whole_base,
)
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.stores import torch_dtype
from gradmatch.rules import Elementwise, Linear, Whole
from gradmatch.rules.block import NotPositiveError, total
from gradmatch.rules.rowwise import as_rows

if TYPE_CHECKING:
    from gradmatch.plan.step import Coefficients, Step


def linear_terms(
    context: Context, step: Step, buffers: Buffers, stats: dict[str, float]
) -> Coefficients | None:
    """(c0, c) of a rule that combines models, after the inner products it may need; None for other rules.

    Raises:
        ValueError: the models have no such combination.
    """
    if step.coefficients or not step.gram or not isinstance(step.rule, Linear):
        return step.coefficients
    try:
        c0, c, branch = step.rule.terms(step.alpha, gram_matrix(context, step, buffers), step.options)
    except ValueError as error:
        raise GradmatchError(f"{step.name!r}: {error}", "bad_result", step.name) from None
    if branch:
        stats[f"branch:{branch.split(' = ')[0]}"] = 1.0
    return c0, c


def evaluate(
    context: Context,
    step: Step,
    first: int,
    last: int,
    coefficients: Coefficients | None,
    buffers: Buffers,
    stats: dict[str, float],
) -> tuple[Tensor, Tensor | None]:
    """Elements first to last merged, in the dtype of the arithmetic, and theta0 as it is stored, or None where it is not read."""
    if step.path == "linear" and coefficients is not None:
        return _linear(context, step, first, last, coefficients, buffers, stats)
    if step.path == "solve":
        return solve_matrix(context, step, buffers, stats)
    return _stacked(context, step, first, last, coefficients, buffers, stats)


def _linear(
    context: Context,
    step: Step,
    first: int,
    last: int,
    coefficients: Coefficients,
    buffers: Buffers,
    stats: dict[str, float],
) -> tuple[Tensor, Tensor | None]:
    """c0 theta0 + sum_t c_t theta_t; models whose coefficient is 0 are not read."""
    inputs, dtype = context.inputs, torch_dtype(step.compute)
    stores = [inputs.store, *(inputs.tasks[t].store for t in step.tasks)]
    c = [coefficients[0], *coefficients[1]]
    x = [
        fetch(buffers, str(slot), store, step.name, first, last) if ck else None
        for slot, (ck, store) in enumerate(zip(c, stores, strict=True))
    ]
    theta0 = x[0]
    if theta0 is None and step.spec.dtype != step.compute and step.name in inputs.store:
        theta0 = fetch(buffers, "0", inputs.store, step.name, first, last)  # what rounding lost is told by it
    terms = [
        ck * values.to(buffers.device, dtype) for ck, values in zip(c, x, strict=True) if values is not None
    ]
    merged = total(terms) if terms else torch.zeros(last - first, dtype=dtype)
    if step.rule and step.rule.removes and theta0 is not None and not step.after:
        add(
            stats, {"update": float((merged - theta0).square().sum())}
        )  # where a removal spends its step is told
    return merged, theta0


def _stacked(
    context: Context,
    step: Step,
    first: int,
    last: int,
    coefficients: Coefficients | None,
    buffers: Buffers,
    stats: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """A piece by the readable rule and transforms: merged values and theta0, flat."""
    rule, shape = step.rule, step.spec.shape
    if isinstance(rule, Elementwise):
        block = make_block(context, step, first, last, buffers, stats)
        try:
            merged = _checked(step, rule.elementwise(block), block.theta0)
        except NotPositiveError:
            raise GradmatchError(
                not_positive(step, last - first, first, last), "not_positive", step.name
            ) from None
        update = merged - block.theta0
        if not step.after:
            add(stats, {"update": float(torch.dot(update, update))})
        if rule.guarded:
            left = block.h0 - (block.alpha * block.h).sum(0)
            clamped = (left < block.options.keep * block.h0).sum()
            add(stats, {"clamped": float(clamped), "update_h0": float((block.h0 * update.square()).sum())})
        return merged, block.theta0
    tau: Any
    alpha, counted = step.alpha, step.counted
    if isinstance(rule, Whole) and rule.streams and not step.edits:
        theta0 = whole_base(context, step, buffers)
        tau = TaskVectors(
            context, step, theta0, buffers, (shape[0], theta0.numel() // max(1, shape[0])), counted
        )
    else:
        theta0, tau = task_vectors(context, step, first, last, buffers, stats)
    if coefficients is not None:
        c0, c = coefficients
        return (c0 + sum(c)) * theta0 + total([ck * row for ck, row in zip(c, tau, strict=True)]), theta0
    if isinstance(rule, Linear) and rule.rows is not None:
        one, stacked = (as_rows(values, shape, step.along) for values in (theta0, tau))
        merged = _checked(step, rule.rows(one, stacked, step.alpha, step.options), one)
        return (merged.mT if step.along == "columns" and len(shape) > 1 else merged).reshape(-1), theta0
    assert isinstance(rule, Whole)
    if first == last:
        return theta0, theta0
    if len(counted) < len(alpha):
        alpha = tuple(alpha[row] for row in counted)
        tau = tau if isinstance(tau, TaskVectors) else tau[counted]
    seen = shape if rule.otherwise is None else (shape[0], -1)
    one, each = theta0.reshape(seen), tau if isinstance(tau, TaskVectors) else tau.reshape(len(tau), *seen)
    merged = decomposed(lambda: rule.whole(one, each, alpha, step.options), one)
    return _checked(step, merged, one).reshape(-1), theta0


def _checked(step: Step, merged: Tensor, like: Tensor) -> Tensor:
    """What a rule returned, where it is what it must be."""
    shape = list(merged.shape) if isinstance(merged, Tensor) else type(merged).__name__
    if shape != list(like.shape):
        raise GradmatchError(
            f"{step.name!r}: the {step.kind} rule must return a tensor of shape {list(like.shape)}, got {shape}",
            "bad_result",
            step.name,
        )
    return merged.to(like.dtype)
