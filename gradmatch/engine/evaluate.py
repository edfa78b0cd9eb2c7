"""One piece of one tensor, as the plan says: coefficients, Eq. 12 or TIES in place, or the readable rule on all that it must see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from gradmatch.engine.context import Context, add, curvature, fetch
from gradmatch.engine.electing import ties
from gradmatch.engine.explain import not_positive
from gradmatch.engine.kernels import Buffers, eq12, in_cache, linear_combination
from gradmatch.engine.matrices import solve_matrix
from gradmatch.engine.stacked import global_threshold, gram_matrix, make_block, prior_of, task_vectors
from gradmatch.models.stores import torch_dtype
from gradmatch.plan.step import scale_of_ties
from gradmatch.rules import Elementwise, Linear, Whole
from gradmatch.rules.edits import trims
from gradmatch.rules.rowwise import as_rows

if TYPE_CHECKING:
    from gradmatch.plan.step import Coefficients, Step

Merged = Iterator[
    tuple[int, Tensor, Tensor, Tensor | None]
]  # first element, where it is to be written, merged values, theta0 as stored


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
        raise ValueError(f"{step.name!r}: {error}") from None
    if branch:
        stats[f"branch:{branch.split(' = ')[0]}"] = 1.0
    return c0, c


def evaluate(
    context: Context,
    step: Step,
    first: int,
    written: Tensor,
    coefficients: Coefficients | None,
    buffers: Buffers,
    stats: dict[str, float],
) -> Merged:
    """Merge the elements from `first` on that `written` (n,) will hold, in blocks.

    Yields (first element of the block, its part of `written`, merged values, theta0 as it is stored or None where there is
    none). The merged values are that part of `written` already where the dtype of the arithmetic is the output's.
    """
    if step.path == "linear" and coefficients is not None:
        yield from _linear(context, step, first, written, coefficients, buffers)
    elif step.path == "ties" and coefficients is not None:
        yield from _ties(context, step, first, written, coefficients, buffers, stats)
    elif step.path == "eq12":
        yield from _eq12(context, step, first, written, buffers, stats)
    elif step.path == "solve":
        yield first, written, *solve_matrix(context, step, buffers, stats)
    else:
        yield first, written, *_stacked(context, step, first, written, coefficients, buffers, stats)


def _blocks(
    step: Step, first: int, written: Tensor, buffers: Buffers, *sources: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor, list[Tensor]]]:
    """(first element, part of `written`, where to compute, sources) of blocks that stay in cache."""
    dtype = torch_dtype(step.compute)
    for part, *values in in_cache(written, *sources):
        count = part.numel()
        yield first, part, part if part.dtype == dtype else buffers.get("out", count, dtype), values
        first += count


def _linear(
    context: Context, step: Step, first: int, written: Tensor, coefficients: Coefficients, buffers: Buffers
) -> Merged:
    """c0 theta0 + sum_t c_t theta_t; models whose coefficient is 0 are not read."""
    inputs, last = context.inputs, first + written.numel()
    stores = [inputs.store, *(inputs.tasks[t].store for t in step.tasks)]
    c = [coefficients[0], *coefficients[1]]
    sources = [
        fetch(buffers, str(slot), store, step.name, first, last) if ck else None
        for slot, (ck, store) in enumerate(zip(c, stores, strict=True))
    ]
    theta0 = sources[0]
    if theta0 is None and step.spec.dtype != step.compute and step.name in inputs.store:
        theta0 = fetch(buffers, "0", inputs.store, step.name, first, last)  # what rounding lost is told by it
    c = [ck for ck in c if ck]
    for at, part, out, (base, *values) in _blocks(step, first, written, buffers, theta0, *sources):
        used = [x for x in values if x is not None]
        linear_combination(out, buffers.get("load", out.numel(), out.dtype), c, used)
        yield at, part, out, base


def _eq12(
    context: Context, step: Step, first: int, written: Tensor, buffers: Buffers, stats: dict[str, float]
) -> Merged:
    """The in-place kernel, for the rules that are Eq. 12 with some H0 and sign."""
    request, inputs, last = context.plan.request, context.inputs, first + written.numel()
    tasks = [inputs.tasks[t] for t in step.tasks]
    alphas = [step.sign * alpha for alpha in step.alpha]
    examples = [float(task.mean.num_examples) if task.mean else 0.0 for task in tasks]
    h0, scale = prior_of(context, step, first, last, buffers)
    theta0 = fetch(buffers, "theta0", inputs.store, step.name, first, last)
    sources = [theta0, h0 if isinstance(h0, Tensor) else None]
    sources += [fetch(buffers, f"{t}", task.store, step.name, first, last) for t, task in enumerate(tasks)]
    sources += [
        curvature(buffers, f"mean {t}", task.mean, step.name, first, last) for t, task in enumerate(tasks)
    ]
    guarded = step.guarded
    keep, guard = (step.options["keep"], step.options["guard"]) if guarded else (None, "floor")
    for at, part, out, (base, mean0, *values) in _blocks(step, first, written, buffers, *sources):
        thetas, means = values[: len(tasks)], values[len(tasks) :]
        health = eq12(
            buffers, out, base, h0 if mean0 is None else mean0, scale, request.delta0,
            list(zip(alphas, examples, thetas, means, strict=True)), keep, guard,
        )  # fmt: skip
        if health.cancelled:
            raise ValueError(not_positive(step, health.cancelled, at, at + out.numel()))
        add(stats, {"floored": health.floored, "update": health.update, "weights": out.numel()})
        if guarded:
            add(stats, {"clamped": health.clamped, "update_h0": health.update_h0})
        yield at, part, out, base


def ties_terms(context: Context, step: Step, coefficients: Coefficients) -> tuple[list[float], float, float]:
    """(each task's threshold, scale of the sum, share of theta0 beyond one) where the path is "ties"."""
    options = step.edits[0][1]
    trimmed = options["trim"] == "global" and trims(options)
    thresholds = global_threshold(context, step, 0) if trimmed else [0.0] * len(step.tasks)
    scale = scale_of_ties(step.edits, step.alpha, coefficients[1])
    rest = coefficients[0] + sum(coefficients[1]) - 1
    assert scale is not None
    return thresholds, scale, rest if abs(rest) > 1e-12 else 0.0


def _ties(
    context: Context,
    step: Step,
    first: int,
    written: Tensor,
    coefficients: Coefficients,
    buffers: Buffers,
    stats: dict[str, float],
) -> Merged:
    """The in-place kernel for TIES by itself under a rule that adds task vectors."""
    inputs, last, options = context.inputs, first + written.numel(), step.edits[0][1]
    thresholds, scale, rest = ties_terms(context, step, coefficients)
    stores = [inputs.store, *(inputs.tasks[t].store for t in step.tasks)]
    sources = [fetch(buffers, f"{t}", store, step.name, first, last) for t, store in enumerate(stores)]
    for at, part, out, (theta0, *theta) in _blocks(step, first, written, buffers, *sources):
        health = ties(
            buffers, out, theta0, theta, thresholds, step.alpha, scale, context.majority,
            normalize=options["normalize"],
        )  # fmt: skip
        if rest:
            out.add_(theta0, alpha=rest)
        add(stats, vars(health) | {"weights": out.numel()})
        yield at, part, out, theta0


def _stacked(
    context: Context,
    step: Step,
    first: int,
    written: Tensor,
    coefficients: Coefficients | None,
    buffers: Buffers,
    stats: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """A piece by the readable rule and transforms: merged values and theta0, flat."""
    last, rule, shape = first + written.numel(), step.rule, step.spec.shape
    if isinstance(rule, Elementwise):
        block = make_block(context, step, first, last, buffers, stats)
        merged = _checked(step, rule.elementwise(block), block.theta0)
        if rule.guarded:
            left, update = block.h0 - (block.alpha * block.h).sum(0), (merged - block.theta0).square()
            add(stats, {
                "clamped": float((left < block.options.keep * block.h0).sum()), "update": float(update.sum()),
                "update_h0": float((block.h0 * update).sum()),
            })  # fmt: skip
        return merged, block.theta0
    theta0, tau = task_vectors(context, step, first, last, buffers, stats)
    if coefficients is not None:
        c0, c = coefficients
        return (c0 + sum(c)) * theta0 + tau.new_tensor(c) @ tau, theta0
    if isinstance(rule, Linear) and rule.rows is not None:
        one, stacked = (as_rows(values, shape, step.along) for values in (theta0, tau))
        merged = _checked(step, rule.rows(one, stacked, step.alpha, step.options), one)
        return (merged.mT if step.along == "columns" and len(shape) > 1 else merged).reshape(-1), theta0
    assert isinstance(rule, Whole)
    if not written.numel():
        return theta0, theta0
    seen = shape if rule.otherwise is None else (shape[0], -1)
    one, stacked = theta0.reshape(seen), tau.reshape(len(tau), *seen)
    return _checked(step, rule.whole(one, stacked, step.alpha, step.options), one).reshape(-1), theta0


def _checked(step: Step, merged: Tensor, like: Tensor) -> Tensor:
    """What a rule returned, where it is what it must be.

    Raises:
        ValueError: a tensor of another shape, or something that is no tensor.
    """
    shape = list(merged.shape) if isinstance(merged, Tensor) else type(merged).__name__
    if shape != list(like.shape):
        raise ValueError(
            f"{step.name!r}: the {step.kind} rule must return a tensor of shape {list(like.shape)}, got {shape}"
        )
    return merged.to(like.dtype)
