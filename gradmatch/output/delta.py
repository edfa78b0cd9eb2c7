"""Outputs that hold merged - base instead of the merged weights (form="delta"); `gradmatch.inputs.delta` reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from estimators.fingerprint import fingerprint
from gradmatch.inputs.stores import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.plan.plan import Plan, Step


def as_delta(made: Plan) -> None:
    """Make a plan one of differences: nothing that is the base's is written, everything else in the dtype of the arithmetic.

    Raises:
        ValueError: the output has other shapes than the base, so that there is no difference.
    """
    base = made.inputs.base
    if base.changed or base.original is not base:
        raise ValueError(
            "form='delta' writes merged - base, and this output has other layers or another vocabulary than the base; "
            "write whole weights: form='weights' with dtype='float32'"
        )
    made.steps = [
        replace(step, spec=Spec(step.compute, step.spec.shape))
        for step in made.steps
        if step.action != "copy"
    ]


def difference(made: Plan, step: Step, first: int, values: Tensor) -> Tensor:
    """merged - theta0 from element `first` on, flat, in the merged values' dtype."""
    theta0 = made.inputs.store.block(step.name, first, first + values.numel())
    return values - theta0.to(values.dtype)


def provenance(made: Plan) -> dict[str, Any]:
    """What the card must say so that the delta finds its base again, and no other is taken for it."""
    base = made.inputs.base
    return {
        "base": str(base.path.resolve()) if base.path else None,
        "fingerprint": fingerprint([step.name for step in made.steps], base.sample),
    }
