"""One piece of one tensor, by whichever path computes it: constant coefficients, Eq. 12 in place, or the readable rule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmatch.engine.explain import not_positive
from gradmatch.engine.kernels import Buffers, cancelled, eq12, linear_combination, ties
from gradmatch.engine.loop import Context, add, curvature_loader, loader, pieces
from gradmatch.engine.passes import Block, Edit, uniform
from gradmatch.inputs.stores import torch_dtype
from gradmatch.rules.regmean import regmean
from gradmatch.rules.rowwise import as_rows
from gradmatch.transforms import TRANSFORMS, trims

if TYPE_CHECKING:
    from gradmatch.plan.plan import Step

Coefficients = tuple[float, list[float]]


def copy_piece(context: Context, step: Step, first: int, last: int) -> Tensor:
    """The base's values as they are stored."""
    return context.inputs.store.block(step.name, first, last)


def linear_terms(
    context: Context, step: Step, buffers: Buffers, stats: dict[str, float]
) -> Coefficients | None:
    """(c0, c) of a rule that combines models, after the inner products it may need; None for other rules."""
    if step.action == "average":
        return 0.0, [1 / len(step.tasks)] * len(step.tasks)
    rule = context.plan.request.rule
    if rule.linear is None or step.action == "matrix" or step.along:
        return None
    gram = gram_matrix(context, step, buffers, of_tau=rule.gram == "tau") if rule.gram else None
    c0, c, branch = rule.linear(step.alpha, gram, step.options)
    if branch:
        stats[f"branch:{branch.split(' = ')[0]}"] = 1.0
    return c0, c


def gram_matrix(context: Context, step: Step, buffers: Buffers, *, of_tau: bool) -> list[list[float]]:
    """<x_s, x_t> over a whole tensor, in float64, read piece by piece; x = theta or tau (after the transforms)."""
    count = len(step.tasks)
    total = torch.zeros(count, count, dtype=torch.float64)
    for first, last in pieces(step, context, 0, step.spec.numel):
        theta0, tau = task_vectors(context, step, first, last, buffers, {})
        x = (tau if of_tau else tau + theta0).double()
        total += x @ x.T
    matrix: list[list[float]] = total.tolist()
    return matrix


def evaluate(
    context: Context,
    step: Step,
    first: int,
    last: int,
    coefficients: Coefficients | None,
    buffers: Buffers,
    stats: dict[str, float],
) -> tuple[Tensor, Tensor | None]:
    """Merged values of elements first to last, and theta0 there (None where it was not read)."""
    rule, inputs = context.plan.request.rule, context.inputs
    dtype, count = torch_dtype(step.compute), last - first
    if step.action == "matrix":
        return _matrix(context, step, dtype), None
    if step.along:
        return _along(context, step, first, last, buffers, stats)
    load = partial(loader, first=first, last=last, dtype=dtype)
    if coefficients is not None:
        c0, c = coefficients
        if not step.edits or step.action == "average":
            narrow = step.spec.dtype != step.compute and step.name in inputs.store
            terms = [(c0, load(inputs.store, step.name))]
            terms += [
                (ct, load(inputs.tasks[t].store, step.name)) for ct, t in zip(c, step.tasks, strict=True)
            ]
            merged = linear_combination(
                buffers.get("out", count, dtype), buffers.get("load", count, dtype), terms
            )
            theta0 = load(inputs.store, step.name)(buffers.get("theta0", count, dtype)) if narrow else None
            return merged, theta0
        if len(step.edits) == 1 and step.edits[0][0] == "ties" and _in_blocks(step):
            return _ties(context, step, first, last, c0, c, buffers, stats)
        theta0, tau = task_vectors(context, step, first, last, buffers, stats)
        weights = tau.new_tensor(c)
        return (c0 + sum(c)) * theta0 + weights @ tau, theta0
    if rule.fast and not step.edits and step.options.get("hbar_weight") is None:
        return _eq12(context, step, first, last, buffers, stats)
    block = make_block(context, step, first, last, buffers, stats)
    assert rule.elementwise is not None
    merged = rule.elementwise(block)
    if "keep" in step.options:
        left = block.h0 - (block.alpha * block.h).sum(0)
        update = (merged - block.theta0).square()
        add(stats, {
            "clamped": float((left < step.options["keep"] * block.h0).sum()), "update": float(update.sum()),
            "update_h0": float((block.h0 * update).sum()),
        })  # fmt: skip
    return merged, block.theta0


def _eq12(
    context: Context, step: Step, first: int, last: int, buffers: Buffers, stats: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """The in-place kernel, for the rules that are Eq. 12 with some H0 and sign."""
    request, inputs = context.plan.request, context.inputs
    dtype, rule = torch_dtype(step.compute), request.rule
    h0, scale = _prior(context, step, first, last)
    tasks = []
    for t, alpha in zip(step.tasks, step.alpha, strict=True):
        task = inputs.tasks[t]
        assert task.mean is not None
        theta = loader(task.store, step.name, first, last, dtype)
        mean = curvature_loader(task.mean, step.name, first, last, dtype)
        tasks.append((rule.fast * alpha, float(task.mean.num_examples), theta, mean))
    keep, guard = step.options.get("keep"), step.options.get("guard", "floor")
    base = loader(inputs.store, step.name, first, last, dtype)
    merged, theta0, health = eq12(
        buffers, base, h0, scale, request.delta0, tasks, last - first, dtype, keep, guard
    )
    if health.cancelled:
        raise ValueError(not_positive(step, health.cancelled, first, last))
    add(stats, {"floored": health.floored, "update": health.update, "weights": last - first})
    if keep is not None:
        add(stats, {"clamped": health.clamped, "update_h0": health.update_h0})
    return merged, theta0


def _along(
    context: Context, step: Step, first: int, last: int, buffers: Buffers, stats: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """A rule that treats every row or column by itself."""
    theta0, tau = task_vectors(context, step, first, last, buffers, stats)
    rows, shape = context.plan.request.rule.rows, step.spec.shape
    assert rows is not None
    one, stacked = (as_rows(values, shape, step.along) for values in (theta0, tau))
    merged = rows(one, stacked, step.alpha, step.options)
    transposed = merged.mT if step.along == "columns" and len(shape) > 1 else merged
    return transposed.reshape(-1), theta0


def _in_blocks(step: Step) -> bool:
    """Whether a lone TIES edit needs no more of a tensor than a piece."""
    options = step.edits[0][1]
    return options["trim"] == "global" or not trims(options)


def _ties(
    context: Context,
    step: Step,
    first: int,
    last: int,
    c0: float,
    c: list[float],
    buffers: Buffers,
    stats: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """The in-place kernel for TIES by itself under a rule that adds task vectors."""
    inputs, dtype, options = context.inputs, torch_dtype(step.compute), step.edits[0][1]
    trimmed = options["trim"] == "global" and trims(options)
    thresholds = global_threshold(context, step, 0) if trimmed else [0.0] * len(step.tasks)
    theta = [loader(inputs.tasks[t].store, step.name, first, last, dtype) for t in step.tasks]
    base = loader(inputs.store, step.name, first, last, dtype)
    merged, theta0, health = ties(
        buffers, base, theta, thresholds, step.alpha, [options["scale"] * weight for weight in c], last - first, dtype,
        context.majority, normalize=options["normalize"],
    )  # fmt: skip
    if c0 + sum(c) != 1:
        merged.add_(theta0, alpha=c0 + sum(c) - 1)
    add(stats, vars(health) | {"weights": last - first})
    return merged, theta0


def _prior(context: Context, step: Step, first: int, last: int) -> tuple[Any, float]:
    """(h0, scale): H0 = scale * h0 + delta0, with h0 a loader of the base's mean curvature or a number."""
    request, given = context.plan.request, context.inputs.base_curvature
    if given is None:
        return 0.0, 1.0
    if isinstance(given, float):
        return given, request.base_weight
    h0 = curvature_loader(given, step.name, first, last, torch_dtype(step.compute))
    return (0.0 if h0 is None else h0), request.base_weight * given.num_examples


def task_vectors(
    context: Context,
    step: Step,
    first: int,
    last: int,
    buffers: Buffers,
    stats: dict[str, float],
    edits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """theta0 (n,) and the edited task vectors (T, n) of a piece; `edits` limits how many transforms are applied."""
    inputs, dtype, count = context.inputs, torch_dtype(step.compute), last - first
    theta0 = loader(inputs.store, step.name, first, last, dtype)(buffers.get("theta0", count, dtype))
    tau = buffers.get("tau_stack", len(step.tasks) * count, dtype).view(len(step.tasks), count)
    scratch = buffers.get("load", count, dtype)
    for row, t in enumerate(step.tasks):
        torch.sub(loader(inputs.tasks[t].store, step.name, first, last, dtype)(scratch), theta0, out=tau[row])
    chain = step.edits if edits is None else step.edits[:edits]
    if not chain:
        return theta0, tau
    shape = step.spec.shape
    whole = (
        shape if count == step.spec.numel else (-1, shape[-1]) if shape and count % shape[-1] == 0 else (-1,)
    )
    stacked = tau.reshape(len(step.tasks), *whole)
    alpha = tau.new_tensor(step.alpha).reshape(-1, *[1] * (stacked.dim() - 1))
    for position, (name, options) in enumerate(chain):
        edit = Edit(
            stacked, alpha, partial(_noise, context, step, first, stacked, options), majority=context.majority
        )
        if name == "ties" and options["trim"] == "global" and trims(options):
            edit.threshold = tau.new_tensor(global_threshold(context, step, position)).reshape(alpha.shape)
        before, stacked = stacked, TRANSFORMS[name].apply(edit, options)
        if name == "ties":
            _count_signs(before, edit, stats)
    return theta0, stacked.reshape(len(step.tasks), count)


def global_threshold(context: Context, step: Step, position: int) -> list[float]:
    """Each participating task's threshold of a global trim, from the pass over the whole model."""
    density = step.edits[position][1]["density"]
    shares = density if isinstance(density, tuple) else (density,) * len(step.tasks)
    return [
        float(context.thresholds[position, share][t]) if share < 1 else 0.0
        for t, share in zip(step.tasks, shares, strict=True)
    ]


def _count_signs(before: Tensor, edit: Edit, stats: dict[str, float]) -> None:
    """Sign statistics of a piece: conflicts, exact cancellations, and the sum of elected signs."""
    weighted = edit.alpha * (before if edit.threshold is None else before * (before.abs() >= edit.threshold))
    total = weighted.sum(0)
    conflict = (weighted > 0).any(0) & (weighted < 0).any(0)
    cancelled = (total == 0) & conflict
    add(stats, {
        "conflicts": float(conflict.sum()), "cancelled": float(cancelled.sum()), "signs": float(total.sign().sum()),
        "weights": float(total.numel()),
    })  # fmt: skip


def _noise(context: Context, step: Step, first: int, stacked: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Uniform draws for a piece of the stack: one stream per seed, task and tensor."""
    count = stacked[0].numel()
    rows = [
        uniform(int(options["seed"]), context.inputs.tasks[t].name, step.name, first, count, stacked.dtype)
        for t in step.tasks
    ]
    return torch.stack(rows).reshape(stacked.shape)


def make_block(
    context: Context, step: Step, first: int, last: int, buffers: Buffers, stats: dict[str, float]
) -> Block:
    """Everything an elementwise rule may need, stacked."""
    request, inputs = context.plan.request, context.inputs
    dtype, count, rows = torch_dtype(step.compute), last - first, len(step.tasks)
    theta0, tau = task_vectors(context, step, first, last, buffers, stats)
    prior, scale = _prior(context, step, first, last)
    h0 = (
        prior(buffers.get("load", count, dtype)) if callable(prior) else tau.new_full((count,), prior)
    ) * scale + request.delta0
    h = buffers.get("h_stack", rows * count, dtype).view(rows, count)
    g = (
        buffers.get("g_stack", rows * count, dtype).view(rows, count)
        if "gradient" in request.rule.needs
        else None
    )
    counts = tau.new_ones(rows, 1)
    for row, t in enumerate(step.tasks):
        task = inputs.tasks[t]
        mean = curvature_loader(task.mean, step.name, first, last, dtype)
        counts[row] = task.mean.num_examples if task.mean else 1
        if mean is None:
            h[row].zero_()
        else:
            torch.mul(mean(buffers.get("load", count, dtype)), counts[row], out=h[row])
        if g is not None:
            gradient = curvature_loader(task.gradient, step.name, first, last, dtype)
            g[row].zero_() if gradient is None else g[row].copy_(gradient(buffers.get("load", count, dtype)))
    norms = tau.new_tensor([context.norms[t] for t in step.tasks] if context.norms else [1.0] * rows).reshape(
        rows, 1
    )
    alpha = tau.new_tensor(step.alpha).reshape(rows, 1)
    inside = step.options.get("hbar_weight")
    terms = (alpha if inside is None else inside) * h
    h_bar = h0 + terms.sum(0)
    broken = 0
    if request.rule.divides:
        broken = cancelled(h_bar, h0.abs() + terms.abs().sum(0), request.delta0)
    elif "keep" in step.options:
        broken = int((h0 < 0).sum())
    if broken:
        raise ValueError(not_positive(step, broken, first, last))
    add(
        stats,
        {"floored": float((h_bar < 2 * request.delta0).sum()) if request.delta0 else 0.0, "weights": count},
    )
    return Block(theta0, tau, alpha, h0, h, g, counts, request.delta0, step.options, norms)


def _matrix(context: Context, step: Step, dtype: torch.dtype) -> Tensor:
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


def curvature_pair(
    context: Context, step: Step, first: int, last: int, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """H0 and sum_t alpha_t H_t of a piece."""
    dtype, count = torch_dtype(step.compute), last - first
    prior, scale = _prior(context, step, first, last)
    h0 = buffers.get("h0", count, dtype)
    h0.copy_(prior(buffers.get("load", count, dtype))) if callable(prior) else h0.fill_(prior)
    h0.mul_(scale).add_(context.plan.request.delta0)
    h = buffers.get("h_bar", count, dtype).zero_()
    for t, alpha in zip(step.tasks, step.alpha, strict=True):
        store = context.inputs.tasks[t].mean
        mean = curvature_loader(store, step.name, first, last, dtype)
        if mean is not None and store is not None:
            h.add_(mean(buffers.get("load", count, dtype)), alpha=alpha * store.num_examples)
    return h0, h
