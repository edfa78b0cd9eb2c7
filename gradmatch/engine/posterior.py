"""The posterior precision of a merge, sum_k w_k H_k, tensor by tensor: what its rule adds up before it divides by it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from gradmatch.engine.buffers import Buffers
from gradmatch.engine.context import Context, pieces
from gradmatch.engine.matrices import known_matrix
from gradmatch.engine.stacked import make_block
from gradmatch.engine.stream import mean_of_h0
from gradmatch.estimators.blocks import units
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.fingerprint import fingerprint
from gradmatch.plan.step import no_posterior
from gradmatch.rules.beliefs import BELIEFS, Known
from gradmatch.rules.matrix_options import is_exact
from gradmatch.rules.structures import Basis, Structure
from gradmatch.rules.system import TOLERANCE, posterior

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gradmatch.estimators.fingerprint import Sample
    from gradmatch.plan.step import Plan, Step

UNIT = Basis(None, None)
CLOSE = (
    1e-10  # residual of a merge of which a task can be divided out: what is left is divided by a difference
)


def posterior_of(made: Plan, sample: Callable[[str], Sample]) -> Curvature:
    """The sum of the precisions of a plan as a curvature at the merged weights, N the number of all examples.

    Diagonals always; Kronecker factors of the matrices that were solved with them, stacked (k, n, n) where the sum has several
    products. `sample` gives the fingerprint of the merged weights.

    Raises:
        ValueError: the rule has no precision in nats.
    """
    if error := no_posterior(made.request):
        raise error
    context, buffers = Context(made), Buffers()
    context.mean_h0 = mean_of_h0(context)
    inputs = made.inputs
    counts = [t.curvature.num_examples for t in inputs.tasks if t.curvature is not None]
    if not isinstance(inputs.base_curvature, (float, type(None))):
        counts.append(inputs.base_curvature.num_examples)
    count = max(1, sum(counts))
    why = inexact(made)
    mean: dict[str, Tensor] = {}
    factors: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for step in made.merged:
        if step.rule is None or not step.rule.family:
            continue
        if step.kind == "solve":
            known, turned = known_matrix(context, step, buffers)
            precision = posterior(BELIEFS[step.rule.family](known)[0])
            diagonal = UNIT.diagonal(precision, known.theta0) / count
            mean[step.name] = (diagonal.mT if turned else diagonal).reshape(step.spec.shape).contiguous()
            stacked = _stacked(precision, known.theta0, count)
            if stacked is None:
                why = (
                    why
                    or f"of {step.name!r} some curvatures have factors and others a diagonal, of whose sum only the diagonal is kept"
                )
            for held, one in zip(factors, stacked or (), strict=False):
                held[step.name] = one
        else:
            mean[step.name] = _diagonal(context, step, buffers) / count
    info = {
        "estimator": "posterior",
        "units": units(count),
        "method": made.request.method,
        "weights": json.dumps({task.name: task.weight for task in inputs.tasks}),
        "base_weight": repr(made.request.base_weight),
        "delta0": repr(context.delta0),
        **({"inexact": why} if why else {}),
        **(made.origin.info if made.origin else {}),
        "fingerprint": fingerprint(mean, sample),
        "torch": torch.__version__,
    }
    return Curvature.from_dict(mean, count, info, factor_a=factors[0], factor_b=factors[1])


def inexact(made: Plan) -> str:
    """Why the merge is not, to rounding, the mode of the tasks' own beliefs, so that none can be divided out of it; "" where it is."""
    if made.request.edits:
        return f"its task vectors were edited by {made.request.edits[0][0]}"
    for step in made.merged:
        if step.options.get("hbar_weight") is not None:
            return "it was merged with hbar_weight"
        if step.kind == "solve":
            given = step.options.get("tolerance")
            if not is_exact(step.options) or (TOLERANCE if given is None else given) > CLOSE:
                return (
                    f"its matrices were not solved to {CLOSE:g}: merge with solver='exact', tolerance=1e-12"
                )
    return ""


def _diagonal(context: Context, step: Step, buffers: Buffers) -> Tensor:
    """Of a tensor whose curvatures are diagonal, in its shape; where a removal is guarded, what the guard leaves."""
    assert step.rule is not None
    parts = []
    for first, last in pieces(step, 0, step.spec.numel):
        block = make_block(context, step, first, last, buffers, {})
        precision = posterior(BELIEFS[step.rule.family](Known.of(block))[0])
        part = UNIT.diagonal(precision, block.theta0[None])[0]
        parts.append(part.maximum(step.options["keep"] * block.h0) if step.guarded else part)
    return torch.cat(parts).reshape(step.spec.shape)


def _stacked(precision: Structure, like: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """(A (k, in, in), B (k, out, out)) whose products sum to the precision over `count`; None where it has a diagonal beside them."""
    a, b = (torch.eye(size, dtype=like.dtype, device=like.device) for size in (like.shape[-1], len(like)))
    pairs, flat = [], 0.0
    for term in precision.terms:
        if not isinstance(term.diagonal, (int, float)):
            return None
        flat += term.diagonal
        if not term.is_diagonal:
            pairs.append(
                (term.scale / count * (a if term.a is None else term.a), b if term.b is None else term.b)
            )
    if flat:
        pairs.append((flat / count * a, b))
    return torch.stack([one for one, _ in pairs]).cpu(), torch.stack([two for _, two in pairs]).cpu()
