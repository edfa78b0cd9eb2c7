"""Pieces as stacked tensors, for what no kernel does in place: task vectors after their edits, and everything for a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmatch.engine.buffers import Buffers, stored
from gradmatch.engine.context import BLOCK, Context, Found, add, curvature, fetch, pieces
from gradmatch.engine.draws import uniform
from gradmatch.engine.explain import not_positive
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.curvatures import Prior
from gradmatch.models.stores import torch_dtype
from gradmatch.rules import Elementwise
from gradmatch.rules.block import Block, Cut, Edit, total
from gradmatch.rules.edits import TRANSFORMS

if TYPE_CHECKING:
    from gradmatch.models.stores import Store
    from gradmatch.plan.step import Step

PART = 32 * BLOCK  # elements that are read at a time of what is then held whole


def gram_matrix(context: Context, step: Step, buffers: Buffers) -> list[list[float]]:
    """<x_s, x_t> over a whole tensor, in float64, read piece by piece; x = theta or tau (after the transforms), as `step.gram`."""
    count = len(step.tasks)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for first, last in pieces(step, 0, step.spec.numel):
        theta0, tau = task_vectors(context, step, first, last, buffers, {})
        x = (tau if step.gram == "tau" else tau + theta0).double()
        gram += (x @ x.T).cpu()
    matrix: list[list[float]] = gram.tolist()
    return matrix


def prior(context: Context) -> Prior:
    """H0 as the recipe asks for it."""
    return Prior.of(context.inputs.base_curvature, context.plan.request.base_weight, context.delta0)


def prior_of(context: Context, step: Step, first: int, last: int, buffers: Buffers) -> Tensor:
    """H0 of a piece, (n,), in the dtype of the arithmetic."""
    given, dtype, h0 = context.inputs.base_curvature, torch_dtype(step.compute), prior(context)
    mean = None
    if given is not None and not isinstance(given, float):
        mean = curvature(buffers, "h0", given, step.name, first, last)
    if mean is None:
        return torch.full((last - first,), h0.number, dtype=dtype, device=buffers.device)
    return h0.at(mean.to(buffers.device, dtype))


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
    for position in range(len(step.edits) if edits is None else edits):
        name, options = step.edits[position]
        edit = edit_of(context, step, position, first, theta0, tau)
        tau = TRANSFORMS[name].apply(edit, options).reshape(len(step.tasks), count)
        add(stats, edit.health)
    return theta0, tau


class TaskVectors(Sequence[Tensor]):
    """The task vectors of a whole tensor, before any edit, each read when it is asked for, into the place of the one before.

    Args:
        context: of the merge.
        step: of the tensor.
        theta0: (n,), in the dtype of the arithmetic.
        buffers: of the worker.
        shape: that each is given.
        rows: which of the step's tasks; None: all.
    """

    def __init__(
        self,
        context: Context,
        step: Step,
        theta0: Tensor,
        buffers: Buffers,
        shape: Sequence[int],
        rows: Sequence[int] | None = None,
    ) -> None:
        tasks = [context.inputs.tasks[t] for t in step.tasks]
        self._stores = [task.store for task in (tasks if rows is None else [tasks[row] for row in rows])]
        self._step, self._theta0, self._buffers = step, theta0, buffers
        self._as: Callable[[Tensor], Tensor] = lambda tau: tau.view(tuple(shape))

    def __len__(self) -> int:
        return len(self._stores)

    def __getitem__(self, row: Any) -> Any:
        tau = self._buffers.get("one tau", self._theta0.numel(), self._theta0.dtype)
        for first, last, theta in _parts(self._stores[row], self._step, "theta", tau.dtype, self._buffers):
            torch.sub(theta, self._theta0[first:last], out=tau[first:last])
        return self._as(tau)

    def turned(self, to: Callable[[Tensor], Tensor]) -> TaskVectors:
        """The same, each as `to` makes it of the flat one."""
        self._as = to
        return self


def decomposed(call: Callable[[], Tensor], like: Tensor) -> Tensor:
    """What a rule or an edit of whole matrices returns; NaN where it cannot decompose them, which `finish` explains."""
    try:
        return call()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return torch.full_like(like, torch.nan)


def whole_base(context: Context, step: Step, buffers: Buffers) -> Tensor:
    """theta0 of a whole tensor, (n,), in the dtype of the arithmetic."""
    theta0 = buffers.get("theta0", step.spec.numel, torch_dtype(step.compute))
    for first, last, values in _parts(context.inputs.store, step, "theta0", theta0.dtype, buffers):
        theta0[first:last].copy_(values)
    return theta0


def _parts(
    store: Store, step: Step, slot: str, dtype: torch.dtype, buffers: Buffers
) -> Iterator[tuple[int, int, Tensor]]:
    """A tensor in the dtype of the arithmetic, in parts of which one is held at a time: (first, last, values)."""
    for first in range(0, step.spec.numel, PART):
        last = min(first + PART, step.spec.numel)
        yield first, last, fetch(buffers, slot, store, step.name, first, last).to(buffers.device, dtype)


def edit_of(context: Context, step: Step, position: int, first: int, theta0: Tensor, tau: Tensor) -> Edit:
    """What a transform is given of a piece, from theta0 (n,) and the task vectors (T, n) after those before it."""
    shape, count = step.spec.shape, tau.shape[1]
    rows = (-1, shape[-1]) if shape and shape[-1] and count % shape[-1] == 0 else (-1,)
    stacked = tau.reshape(len(tau), *(shape if count == step.spec.numel else rows))
    alpha = tau.new_tensor(step.alpha).reshape(-1, *[1] * (stacked.dim() - 1))
    noise = partial(_noise, context, step, first, stacked, step.edits[position][1])
    found = context.found.get((position, step.name), Found())
    cuts = [
        Cut(
            tau.new_tensor([value for value, _ in cut]).reshape(alpha.shape),
            torch.tensor([place for _, place in cut], device=tau.device).reshape(alpha.shape),
        )
        for cut in found.cuts
    ]
    base = theta0.reshape(stacked.shape[1:])
    return Edit(stacked, alpha, noise, first, cuts, found.sums, context.majority, theta0=base)


def _noise(context: Context, step: Step, first: int, stacked: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Uniform draws for a piece of the stack: one stream per seed, task and tensor."""
    count = stacked[0].numel()
    rows = [
        uniform(int(options["seed"]), context.inputs.tasks[t].name, step.name, first, count, stacked.dtype)
        for t in step.tasks
    ]
    return torch.stack(rows).reshape(stacked.shape).to(stacked.device)


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
    if step.rule and step.rule.damped:
        block.damping = step.options["damping"] * context.mean_h0
    if "anchor" in needs:
        block.anchor = anchor_of(context, step, first, last, buffers) - theta0
    if "curvature" in needs:
        block.h, block.counts = _curvatures(context, step, first, last, buffers)
        norms = [context.norms[t] for t in step.tasks] if context.norms else [1.0] * rows
        block.norms = tau.new_tensor(norms).reshape(rows, 1)
    h0 = tau.new_full((1,), request.delta0)
    if "base_curvature" in needs:
        h0 = block.h0 = prior_of(context, step, first, last, buffers)
    if "gradient" in needs:
        block.g = gradients(context, step, first, last, buffers)
    broken = 0
    if isinstance(step.rule, Elementwise) and step.rule.divides:
        inside: Any = step.options.get("hbar_weight")
        terms: Tensor = (column if inside is None else inside) * block.h
        h_bar = h0 + total(terms)
        broken = cancelled(h_bar, h0.abs() + total(terms.abs()), request.delta0)
        floored = float((h_bar <= 2 * request.delta0).sum()) if request.delta0 else 0.0
        add(stats, {"floored": floored, "weights": last - first})
    elif step.guarded:
        broken = int((h0 < 0).sum())
        add(stats, {"weights": last - first})
    if broken:
        raise GradmatchError(not_positive(step, broken, first, last), "not_positive")
    return block


def anchor_of(context: Context, step: Step, first: int, last: int, buffers: Buffers) -> Tensor:
    """A piece of the merge that a rule holds on to, (n,), in the dtype of the arithmetic."""
    anchor = context.inputs.anchor
    assert anchor is not None
    values = fetch(buffers, "theta", anchor.store, step.name, first, last)
    return values.to(buffers.device, torch_dtype(step.compute), copy=True)


def gradients(context: Context, step: Step, first: int, last: int, buffers: Buffers) -> Tensor:
    """Measured gradients of a piece, (T, n), zero where a curvature has none."""
    g = buffers.get("g_stack", len(step.tasks) * (last - first), torch_dtype(step.compute))
    g = g.view(len(step.tasks), last - first)
    for row, t in enumerate(step.tasks):
        gradient = curvature(buffers, "mean", context.inputs.tasks[t].gradient, step.name, first, last)
        g[row].zero_() if gradient is None else g[row].copy_(gradient)
    return g


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
    h0 = prior_of(context, step, first, last, buffers)
    h = buffers.get("h_bar", count, dtype).zero_()
    for t, alpha in zip(step.tasks, step.alpha, strict=True):
        store = context.inputs.tasks[t].mean
        mean = curvature(buffers, "mean", store, step.name, first, last)
        if mean is not None and store is not None:
            h.add_(stored(mean, buffers.get("load", count, dtype)), alpha=alpha * store.num_examples)
    return h0, h


def cancelled(h_bar: Tensor, size: Tensor, delta0: float) -> int:
    """Coordinates at which Hbar = H0 + sum alpha_t H_t is not positive: below 0, or the remainder of a cancellation.

    A remainder is what is left at about delta0, or at the rounding error of the sum. h_bar, size: (n,), with size =
    |H0| + sum |alpha_t H_t| (equal to h_bar where nothing is negative, and 0 where nothing is known, which does not count).
    """
    rounding = 8 * torch.finfo(h_bar.dtype).eps
    remainder = (h_bar <= 2 * delta0) & (h_bar < 0.1 * size) | (h_bar < rounding * size)
    return int((remainder | (h_bar < 0)).sum())
