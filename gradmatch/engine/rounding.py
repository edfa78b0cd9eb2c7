"""The last step of every block: finite or refused, and in the output's dtype, with what rounding lost measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradmatch.engine.buffers import Buffers, stored
from gradmatch.engine.context import BLOCK, add
from gradmatch.engine.draws import uniform
from gradmatch.engine.explain import explain, same_everywhere
from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from gradmatch.engine.context import Context
    from gradmatch.plan.step import Step

MEASURED = 8  # of so many blocks of a large tensor, one tells what rounding loses
# bits of inf, -inf; NaNs are above
INFINITE = {torch.bfloat16: (0x7F80, 0xFF80), torch.float16: (0x7C00, 0xFC00)}


def finish(
    context: Context,
    step: Step,
    first: int,
    merged: Tensor,
    theta0: Tensor | None,
    out: Tensor,
    buffers: Buffers,
    stats: dict[str, float],
) -> None:
    """Check a block for NaN and Inf and round it into `out`, measuring what that loses on one block in eight.

    merged, out: (n,), elements `first` on of a tensor; the same memory where nothing is rounded. theta0: (n,), the base as
    it is stored, or None where it is not there. A tensor of no more than a block is always measured.

    Raises:
        ValueError: the block is not finite, or the output's dtype cannot hold it.
    """
    request, count, dtype = context.plan.request, merged.numel(), out.dtype
    if dtype == merged.dtype:
        out = out if out.data_ptr() == merged.data_ptr() else out.copy_(merged)
        if not math.isfinite(float(out.sum())) and not bool(out.isfinite().all()):
            out.copy_(_known(context, step, first, merged))
        return
    if request.rounding == "stochastic" and dtype == torch.bfloat16 and merged.dtype == torch.float32:
        noise = uniform(request.seed, "rounding", step.name, first, count, torch.float32)
        out.copy_(stochastic_bfloat16(merged, noise))
    else:
        out.copy_(merged)
    lost = None
    if dtype not in INFINITE or first // BLOCK % MEASURED == 0:
        error = buffers.host("load", count, merged.dtype).copy_(out).sub_(merged)
        lost = float(torch.dot(error, error))
    if not (finite_bits(out) if dtype in INFINITE else math.isfinite(lost or 0.0)):
        _refuse_overflow(step, merged, out)
        if not bool(merged.isfinite().all()):
            out.copy_(_known(context, step, first, merged))
            return
    if theta0 is not None and lost is not None:
        update = buffers.host("load", count, merged.dtype)
        torch.sub(merged, stored(theta0, update), out=update)
        add(stats, {"rounding_error": lost, "rounded_update": float(torch.dot(update, update))})


def finite_bits(values: Tensor) -> bool:
    """Whether bfloat16 or float16 values are all finite, from their bits: infinities and NaNs are the largest of each sign."""
    if not values.numel():
        return True
    bits = values.view(torch.int16).numpy()
    highest, lowest = INFINITE[values.dtype]
    return bool(bits.max() < highest and bits.view(np.uint16).max() < lowest)


def _refuse_overflow(step: Step, merged: Tensor, out: Tensor) -> None:
    """Raise where a finite value became infinite."""
    lost = merged.isfinite() & ~out.float().isfinite()  # torch asks no 8-bit float
    if bool(lost.any()):
        raise GradmatchError(
            f"{step.name}: merged values reach {float(merged[lost].abs().max()):g}, beyond what {out.dtype} holds; choose a wider dtype",
            "not_finite",
            step.name,
        )


def _known(context: Context, step: Step, first: int, merged: Tensor) -> Tensor:
    """A block that is not finite with the infinite values (of masks) that all inputs share."""
    same = same_everywhere(context, step, first, merged)
    if same is None:
        raise GradmatchError(explain(context, step, first, first + merged.numel(), merged), "not_finite")
    return same


def converted(step: Step, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copied piece in another dtype; infinite values (of masks) stay as they are.

    Raises:
        ValueError: a finite value that the dtype cannot hold.
    """
    rounded = values.to(dtype)
    lost = values.float().isfinite() & ~rounded.float().isfinite()
    if bool(lost.any()):
        largest = float(values[lost].double().abs().max())
        raise GradmatchError(
            f"{step.name}: values reach {largest:g}, beyond what {dtype} holds; choose a wider dtype",
            "not_finite",
            step.name,
        )
    return rounded


def stochastic_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to one of its two bfloat16 neighbours at random, so that the expectation is the value."""
    bits = values.view(torch.int32) + (noise * 65536).to(torch.int32)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)
