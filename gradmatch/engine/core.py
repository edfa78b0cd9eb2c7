"""A merge of adapters by their cores: small matrices in the joint bases of the factors, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.cores import factored
from gradmatch.models.stores import torch_dtype
from gradmatch.rules.after import AFTER
from gradmatch.rules.block import Update
from gradmatch.rules.core import merge_cores
from gradmatch.rules.rule import Whole

if TYPE_CHECKING:
    from gradmatch.models.cores import Adapter
    from gradmatch.plan.step import Plan, Step

NOTHING = 1e-7  # of the largest singular value: what float32 factors cannot hold beside it


def merge_adapters(
    made: Plan, on_progress: Callable[[int], object] | None = None
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The output adapter's tensors by peft's names, with scale 1; and by weight, the update's squared norm and the share cut off.

    Raises:
        ValueError: factors that are not finite, or an update that overflows.
    """
    tensors: dict[str, Tensor] = {}
    stats: dict[str, dict[str, float]] = {}
    for step in made.steps:
        left, right, stats[step.name] = merged_factors(step, made.adapters, made.request.rank)
        kind = next(adapter for adapter in made.adapters if step.name in adapter.weights)
        dtype = torch_dtype(step.spec.dtype)
        if dtype != left.dtype:
            lost = _apart(left, right, left.to(dtype).double(), right.to(dtype).double())
            stats[step.name] |= {"rounding_error": lost, "rounded_update": stats[step.name]["update"]}
        named = {key: value.to(dtype) for key, value in factored(step.name, kind, left, right).items()}
        if not all(bool(value.isfinite().all()) for value in named.values()):
            raise GradmatchError(
                f"{step.name!r}: merged factors are not finite in {dtype}; the weights or scales overflow",
                "not_finite",
                step.name,
            )
        tensors |= named
        if on_progress:
            on_progress(step.bytes_read)
    return tensors, stats


def merged_factors(
    step: Step, adapters: list[Adapter], rank: int | None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """L (m, k) and R (k, n) of the merged update L R of one weight, of equal norms, k at most `rank`; and statistics.

    With U an orthonormal basis of all L_t and V of all R_t', the cores are M_t = (U' L_t)(R_t V); the update is U M V' with M what the
    rule makes of them. Its singular values are those of M, so what cutting it to a rank costs is known.
    """
    pairs = [adapter.pair(step.name) if step.name in adapter.weights else None for adapter in adapters]
    u = _basis([left for left, _ in filter(None, pairs)])
    v = _basis([right.mT for _, right in filter(None, pairs)])
    none = u.new_zeros(u.shape[1], v.shape[1])
    cores = [none if pair is None else (u.mT @ pair[0]) @ (pair[1] @ v) for pair in pairs]
    assert step.rule is not None
    counted = step.counted if isinstance(step.rule, Whole) else range(len(cores))
    some, alpha = [cores[row] for row in counted], [step.alpha[row] for row in counted]
    merged = merge_cores(step.rule, some, alpha, step.options, min(len(u), len(v)))
    for name, options in step.after:
        given = Update(merged, [cores[row] for row in step.counted], len(step.counted), step.depth)
        merged = AFTER[name].apply(given, options)
    p, s, qt = torch.linalg.svd(merged, full_matrices=False)
    kept = max(1, int((s > NOTHING * s[:1].sum()).sum()))
    k = min(kept, rank or kept)
    root = s[:k].sqrt()
    square = float(s.square().sum())
    told = {"update": square, "cut": float(s[k:].square().sum()) / square if square and k < kept else 0.0}
    return (u @ p[:, :k]) * root, root[:, None] * (qt[:k] @ v.mT), told


def _basis(parts: list[Tensor]) -> Tensor:
    """Orthonormal columns that span all columns of some matrices, (m, at most m)."""
    basis: Tensor = torch.linalg.qr(torch.cat(parts, 1))[0]
    return basis


def _apart(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> float:
    """|L R - L' R'|^2 of two products (m, k) (k, n), without making either."""
    one, two = torch.cat([left, other_left], 1), torch.cat([right, -other_right])
    return max(0.0, float(((one.mT @ one) * (two @ two.mT)).sum()))
