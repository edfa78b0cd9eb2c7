"""One whole matrix, for rules that solve a system per matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmatch.common.warning import warn
from gradmatch.engine.context import add
from gradmatch.engine.explain import not_positive
from gradmatch.engine.stacked import TaskVectors, anchor_of, gradients, prior, task_vectors, whole_base
from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules import Solve
from gradmatch.rules.beliefs import Known
from gradmatch.rules.block import Curved, NotPositiveError, UnboundedError
from gradmatch.rules.structures import Product, Structure, Sum

PRODUCTS = ("kfac", "gram", "laplace")  # estimates whose diagonal of a matrix is that of its factors

if TYPE_CHECKING:
    from gradmatch.engine.buffers import Buffers
    from gradmatch.engine.context import Context
    from gradmatch.models.curvatures import CurvatureStore, Factors
    from gradmatch.plan.step import Step

APART = (
    0.02  # of the norms: what a diagonal and that of its factors may differ by, each in a dtype of its own
)


def solve_matrix(
    context: Context, step: Step, buffers: Buffers, stats: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """One matrix (a convolution's kernels as rows) by its rule: merged and theta0, flat, in the dtype of the arithmetic.

    In float64, unless the rule says that float32 is enough.

    Raises:
        ValueError: the curvature that is to be inverted is not positive.
    """
    assert isinstance(step.rule, Solve)
    theta0, base, tau, curved, turned = _read(context, step, buffers, stats)
    try:
        merged = step.rule.solve(base, tau, step.alpha, curved)
    except NotPositiveError:
        raise GradmatchError(
            not_positive(step, step.spec.numel, 0, step.spec.numel), "not_positive", step.name
        ) from None
    except UnboundedError as error:
        raise GradmatchError(
            f"{step.name!r}: the removal goes {error.args[0]:.2g} times as far as the task vector: the base's curvature sees next to nothing "
            "in directions that the task's does (few examples, factors of low rank), and a share of nothing is all that guard='floor' keeps; "
            "take guard='scale', which bounds the step, structure='diagonal', a curvature of the base from more examples, or a larger delta0",
            "unbounded",
            step.name,
        ) from None
    add(stats, curved.health)
    if "update" not in curved.health and not step.after:
        add(stats, {"update": float((merged - base).square().sum())})
    return (merged.mT if turned else merged).reshape(-1).to(theta0.dtype), theta0


def known_matrix(context: Context, step: Step, buffers: Buffers) -> tuple[Known, bool]:
    """What the beliefs about one matrix are made of, and whether it is stored [in, out]."""
    _, theta0, tau, curved, turned = _read(context, step, buffers, {})
    return Known.of_matrix(theta0, tau, step.alpha, curved), turned


def _read(
    context: Context, step: Step, buffers: Buffers, stats: dict[str, float]
) -> tuple[Tensor, Tensor, Any, Curved, bool]:
    """theta0 flat; theta0 (out, in), tau (T, out, in), or one after the other, and the curvatures in the rule's precision; whether it is stored [in, out]."""
    rule, rows = step.rule, step.spec.shape[0]
    assert isinstance(rule, Solve)
    tau: Any
    if rule.streams and not step.edits:
        theta0 = whole_base(context, step, buffers)
        tau = TaskVectors(context, step, theta0, buffers, theta0.shape)
    else:
        theta0, tau = task_vectors(context, step, 0, step.spec.numel, buffers, stats)
    dtype = theta0.dtype if rule.single(step.options) else torch.float64
    turned = transposed(context, step, max(1, step.spec.numel // max(1, rows)))

    def matrix(values: Tensor) -> Tensor:
        found = values.to(dtype).reshape(*values.shape[:-1], rows, -1)
        return found.mT.contiguous() if turned else found

    base, curved = matrix(theta0), _curved(context, step, dtype, theta0.device, turned)
    if "gradient" in step.needs:
        curved.g = matrix(gradients(context, step, 0, step.spec.numel, buffers))
    if "anchor" in step.needs:
        curved.anchor = matrix(anchor_of(context, step, 0, step.spec.numel, buffers)) - base
    stacked = tau.turned(matrix) if isinstance(tau, TaskVectors) else matrix(tau)
    return theta0, base, stacked, curved, turned


def transposed(context: Context, step: Step, columns: int) -> bool:
    """Whether a matrix is stored [in, out] (Conv1D): as the size of its A says, and where that cannot, the option or the module."""
    inputs, given = context.inputs, step.options.get("conv1d")
    known = [*(inputs.tasks[t].factors for t in step.tasks), inputs.base_factors]
    conv1d = len(step.spec.shape) == 2 and bool(inputs.conv1d.get(step.name) if given is None else given)
    size = next((f.a.spec(step.name).shape[-1] for f in known if f and step.name in f.a), None)
    if size is not None and (columns != size or columns != step.spec.shape[0]):
        return bool(columns != size)
    return conv1d


def _curved(context: Context, step: Step, dtype: torch.dtype, device: torch.device, turn: bool) -> Curved:
    """The curvatures of one matrix, as far as the rule needs them."""
    inputs, request = context.inputs, context.plan.request
    given = inputs.base_curvature
    read = partial(_product, step, dtype, device, turn)
    base = prior(context)
    h0: Structure = Product(diagonal=base.number)
    if given is not None and not isinstance(given, float):
        h0 = read(given, inputs.base_factors, base.scale, base.number)
    h = []
    for t in step.tasks if step.needs & {"curvature", "gram"} else ():
        task = inputs.tasks[t]
        store = task.mean or (task.factors and task.factors.a)  # Gram matrices come without a diagonal
        h.append(read(task.mean, task.factors, float(store.num_examples if store else 0), 0.0))
    damping = step.options["damping"] * context.mean_h0 if request.rule.damped else 0.0
    return Curved(h0, h, step.options, damping=damping, delta0=context.delta0)


def _product(
    step: Step,
    dtype: torch.dtype,
    device: torch.device,
    turn: bool,
    mean: CurvatureStore | None,
    factors: Factors | None,
    scale: float,
    floor: float,
) -> Structure:
    """One curvature of a matrix W (out, in), times `scale`, plus the floor; by its diagonal where it has no factors."""
    found = factors.read(step.name, dtype) if factors else ()
    if found:
        if mean is not None and step.name in mean:
            _check_diagonal(step, mean, found, turn)
        products = [Product(scale, a.to(device), None if b is None else b.to(device)) for a, b in found]
        return Sum((*products, Product(diagonal=floor))) if floor or len(products) > 1 else products[0]
    if mean is None or step.name not in mean:
        return Product(diagonal=floor)
    diagonal = mean.block(step.name, 0, step.spec.numel).to(device, dtype).reshape(step.spec.shape[0], -1)
    return Product(diagonal=scale * (diagonal.mT if turn else diagonal) + floor)


def _check_diagonal(
    step: Step, mean: CurvatureStore, found: Sequence[tuple[Tensor, Tensor | None]], turn: bool
) -> None:
    """Compare the first and the last row of a curvature's diagonal with those of its factors.

    Estimates write the product's own diagonal, so there another one is a fault; who puts factors beside the exact diagonal is warned.

    Raises:
        GradmatchError: in an estimate they differ: the factors are those of another layer of the same shape.
    """
    rows = step.spec.shape[0]
    columns = step.spec.numel // max(1, rows)
    for row in sorted({0, rows - 1}):
        stored = mean.block(step.name, row * columns, (row + 1) * columns).double()
        expected = torch.zeros_like(stored)
        for a, b in found:
            one = (
                torch.ones(1, dtype=torch.float64).expand(columns if turn else rows)
                if b is None
                else b.diagonal().double()
            )
            each = a.diagonal().double()
            expected += each[row] * one if turn else one[row] * each
        if float((stored - expected).norm()) > APART * float(stored.norm() + expected.norm()):
            text = (
                f"the factors of {step.name!r} in {mean.path or 'a curvature'} are not those of its own diagonal: in row {row} the diagonal "
                f"has the mean {float(stored.mean()):.3g} and the factors give {float(expected.mean()):.3g}; they may be another layer's, or "
                "scaled: the block of a matrix is A (x) B, and the diagonal beside it diag(B) diag(A)'"
            )
            if mean.curvature.info.get("estimator") in PRODUCTS:
                raise GradmatchError(text, "bad_curvature", step.name)
            warn(text)
            return
