"""Pieces as stacked tensors, for what no kernel does in place: task vectors after their edits, and everything for a rule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmatch.engine.context import Context, add, curvature, fetch, pieces
from gradmatch.engine.draws import uniform
from gradmatch.engine.explain import not_positive
from gradmatch.engine.kernels import Buffers, cancelled, stored
from gradmatch.models.stores import torch_dtype
from gradmatch.rules import Elementwise
from gradmatch.rules.block import Block, Edit
from gradmatch.rules.edits import TRANSFORMS, trims

if TYPE_CHECKING:
    from gradmatch.plan.step import Step


def gram_matrix(context: Context, step: Step, buffers: Buffers) -> list[list[float]]:
    """<x_s, x_t> over a whole tensor, in float64, read piece by piece; x = theta or tau (after the transforms), as `step.gram`."""
    count = len(step.tasks)
    total = torch.zeros(count, count, dtype=torch.float64)
    for first, last in pieces(step, 0, step.spec.numel):
        theta0, tau = task_vectors(context, step, first, last, buffers, {})
        x = (tau if step.gram == "tau" else tau + theta0).double()
        total += x @ x.T
    matrix: list[list[float]] = total.tolist()
    return matrix


def prior_of(
    context: Context, step: Step, first: int, last: int, buffers: Buffers
) -> tuple[Tensor | float, float]:
    """(h0, scale): H0 = scale * h0 + delta0, with h0 the base's mean curvature as it is stored, or a number."""
    request, given = context.plan.request, context.inputs.base_curvature
    if given is None:
        return 0.0, 1.0
    if isinstance(given, float):
        return given, request.base_weight
    h0 = curvature(buffers, "h0", given, step.name, first, last)
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
    theta0 = stored(
        fetch(buffers, "theta0", inputs.store, step.name, first, last), buffers.get("theta0", count, dtype)
    )
    tau = buffers.get("tau_stack", len(step.tasks) * count, dtype).view(len(step.tasks), count)
    scratch = buffers.get("load", count, dtype)
    for row, t in enumerate(step.tasks):
        theta = fetch(buffers, "theta", inputs.tasks[t].store, step.name, first, last)
        torch.sub(stored(theta, scratch), theta0, out=tau[row])
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
    """Everything that an elementwise rule needs, stacked.

    Raises:
        ValueError: the rule divides by Hbar, or keeps a share of H0, and that is not positive.
    """
    request, needs, rows = context.plan.request, step.needs, len(step.tasks)
    theta0, tau = task_vectors(context, step, first, last, buffers, stats)
    column = tau.new_tensor(step.alpha).reshape(rows, 1)
    block = Block(theta0=theta0, tau=tau, alpha=column, delta0=request.delta0, options=step.options)
    if "curvature" in needs:
        block.h, block.counts = _curvatures(context, step, first, last, buffers)
        norms = [context.norms[t] for t in step.tasks] if context.norms else [1.0] * rows
        block.norms = tau.new_tensor(norms).reshape(rows, 1)
    h0 = tau.new_full((1,), request.delta0)
    if "base_curvature" in needs:
        prior, scale = prior_of(context, step, first, last, buffers)
        load = buffers.get("load", last - first, tau.dtype)
        mean0 = stored(prior, load) if isinstance(prior, Tensor) else tau.new_full((last - first,), prior)
        h0 = block.h0 = mean0 * scale + request.delta0
    if "gradient" in needs:
        block.g = buffers.get("g_stack", rows * (last - first), tau.dtype).view(rows, last - first)
        for row, t in enumerate(step.tasks):
            gradient = curvature(buffers, "mean", context.inputs.tasks[t].gradient, step.name, first, last)
            block.g[row].zero_() if gradient is None else block.g[row].copy_(gradient)
    broken = 0
    if isinstance(step.rule, Elementwise) and step.rule.divides:
        inside: Any = step.options.get("hbar_weight")
        terms: Tensor = (column if inside is None else inside) * block.h
        h_bar = terms.sum(0) + h0
        broken = cancelled(h_bar, h0.abs() + terms.abs().sum(0), request.delta0)
        floored = float((h_bar < 2 * request.delta0).sum()) if request.delta0 else 0.0
        add(stats, {"floored": floored, "weights": last - first})
    elif step.guarded:
        broken = int((h0 < 0).sum())
        add(stats, {"weights": last - first})
    if broken:
        raise ValueError(not_positive(step, broken, first, last))
    return block


def _curvatures(
    context: Context, step: Step, first: int, last: int, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """H_t = N_t F_t of a piece, (T, n), flat ones zero; and N_t, (T, 1)."""
    dtype, count, rows = torch_dtype(step.compute), last - first, len(step.tasks)
    h = buffers.get("h_stack", rows * count, dtype).view(rows, count)
    counts = h.new_ones(rows, 1)
    for row, t in enumerate(step.tasks):
        store = context.inputs.tasks[t].mean
        mean = curvature(buffers, "mean", store, step.name, first, last)
        counts[row] = store.num_examples if store else 1
        if mean is None:
            h[row].zero_()
        else:
            torch.mul(stored(mean, buffers.get("load", count, dtype)), counts[row], out=h[row])
    return h, counts


def curvature_pair(
    context: Context, step: Step, first: int, last: int, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """H0 and sum_t alpha_t H_t of a piece."""
    dtype, count = torch_dtype(step.compute), last - first
    prior, scale = prior_of(context, step, first, last, buffers)
    h0 = buffers.get("h0", count, dtype)
    h0.copy_(prior) if isinstance(prior, Tensor) else h0.fill_(prior)
    h0.mul_(scale).add_(context.plan.request.delta0)
    h = buffers.get("h_bar", count, dtype).zero_()
    for t, alpha in zip(step.tasks, step.alpha, strict=True):
        store = context.inputs.tasks[t].mean
        mean = curvature(buffers, "mean", store, step.name, first, last)
        if mean is not None and store is not None:
            h.add_(stored(mean, buffers.get("load", count, dtype)), alpha=alpha * store.num_examples)
    return h0, h
