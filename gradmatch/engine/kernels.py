"""The hot arithmetic on blocks that stay in cache, in place. Tests hold each kernel equal to the readable rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

# elements of a block: less would fit a core's cache better, but threads hand over the interpreter at every operation
CACHE = 131_072


class Buffers:
    """Named scratch buffers of one worker, allocated once."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer of `count` elements; its contents are whatever was left there."""
        held = self._held.get((name, dtype))
        if held is None or held.numel() < count:
            held = self._held[name, dtype] = torch.empty(count, dtype=dtype)
        return held if held.numel() == count else held[:count]


def in_cache(written: Tensor, *sources: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Cut flat tensors of one length into the same blocks of CACHE elements; None stays None."""
    parts = [repeat(None) if source is None else torch.split(source, CACHE) for source in sources]
    yield from zip(torch.split(written, CACHE), *parts, strict=False)  # None repeats for ever


def stored(values: Tensor, buffer: Tensor) -> Tensor:
    """Values in the buffer's dtype: as they are stored where that is it, else converted into the buffer."""
    return values if values.dtype == buffer.dtype else buffer.copy_(values)


def linear_combination(
    out: Tensor, scratch: Tensor, coefficients: Sequence[float], x: Sequence[Tensor]
) -> Tensor:
    """sum_k c_k x_k into `out`.

    out, scratch, x_k: (n,), x_k in any dtype.
    """
    if not x:
        return out.zero_()
    for position, (coefficient, values) in enumerate(zip(coefficients, x, strict=True)):
        if position:
            out.add_(stored(values, scratch), alpha=coefficient)
        elif coefficient == 1:
            out.copy_(values)  # exact: a model at weight 1 returns itself, bit for bit
        else:
            torch.mul(stored(values, scratch), coefficient, out=out)
    return out


@dataclass
class Eq12Health:
    """Coordinates of one block that the floor decides, were clamped, lack positive curvature; squared norms of the update."""

    floored: int = 0
    clamped: int = 0
    cancelled: int = 0
    update: float = 0.0
    update_h0: float = 0.0


def eq12(
    buffers: Buffers,
    out: Tensor,
    theta0: Tensor,
    h0: Tensor | float,
    h0_scale: float,
    delta0: float,
    tasks: Sequence[tuple[float, float, Tensor, Tensor | None]],
    keep: float | None = None,
    guard: str = "floor",
) -> Eq12Health:
    """theta0 + (H0 + sum alpha_t H_t)^-1 sum alpha_t (H0 + H_t) tau_t into `out`, H0 = h0_scale * h0 + delta0, H_t = N_t F_t.

    Args:
        buffers: of the worker.
        out: (n,), in the dtype of the arithmetic; all others are (n,), as they are stored.
        theta0: the base's values.
        h0: the base's mean curvature, or a number.
        h0_scale: what it is multiplied by.
        delta0: the floor.
        tasks: (alpha_t, N_t, theta_t, F_t or None where flat); alpha_t < 0 removes.
        keep: the share of H0 that must remain of a removal, or None where nothing is guarded.
        guard: how it is kept, see `gradmatch.rules.removal`.

    Returns:
        The health of the block.
    """
    count, dtype = out.numel(), out.dtype
    base = stored(theta0, buffers.get("theta0", count, dtype))
    load, prior = buffers.get("load", count, dtype), buffers.get("h0", count, dtype)
    if isinstance(h0, Tensor):
        torch.add(_number(delta0, dtype), stored(h0, load), alpha=h0_scale, out=prior)
    else:
        prior.fill_(h0 * h0_scale + delta0)
    h_bar, numerator = buffers.get("h_bar", count, dtype), buffers.get("numerator", count, dtype)
    tau, weight = buffers.get("tau", count, dtype), buffers.get("weight", count, dtype)
    drift = (
        buffers.get("drift", count, dtype) if keep is not None else tau
    )  # sum_t alpha_t tau_t, for the guard
    known = False
    for position, (alpha, examples, theta, mean) in enumerate(tasks):
        torch.sub(stored(theta, load), base, out=tau)
        values = prior
        if mean is not None:
            fisher = stored(mean, load)
            values = torch.add(prior, fisher, alpha=examples, out=weight)
            torch.add(h_bar if known else prior, fisher, alpha=alpha * examples, out=h_bar)
            known = True
        if position:
            numerator.addcmul_(values, tau, value=alpha)
        else:
            torch.mul(values, tau, out=numerator)
            if alpha != 1:
                numerator.mul_(alpha)
        if keep is not None:
            torch.mul(tau, alpha, out=drift) if position == 0 else drift.add_(tau, alpha=alpha)
    if not known:
        h_bar.copy_(prior)
    health = Eq12Health()
    if keep is not None:
        flags = buffers.get("flags", count, torch.bool)
        torch.mul(prior, keep, out=weight)
        clamped = torch.lt(h_bar, weight, out=flags).nonzero().squeeze(1)
        health.clamped = len(clamped)
        if health.clamped and guard == "scale":  # few, so by index
            free = prior[clamped] * drift[clamped]  # the part of the numerator without the tasks' curvature
            share = (1 - keep) * prior[clamped] / (prior[clamped] - h_bar[clamped])
            numerator[clamped] = free + share * (numerator[clamped] - free)
        torch.maximum(h_bar, weight, out=h_bar)
        if count and float(prior.min()) < 0:  # nothing that a guard could keep a share of
            health.cancelled = int((prior < 0).sum())
    else:
        below = buffers.get(
            "flags", count, torch.bool
        ).numpy()  # numpy compares several times faster than torch
        np.less_equal(h_bar.numpy(), 2 * delta0, out=below)
        floored = int(np.count_nonzero(below))
        if floored or any(task[0] < 0 for task in tasks):
            size = torch.abs(prior, out=tau)
            for alpha, examples, _, mean in tasks:
                if mean is not None:
                    torch.abs(stored(mean, load), out=weight)
                    size.add_(weight, alpha=abs(alpha) * examples)
            health.cancelled = cancelled(h_bar, size, delta0)
        health.floored = floored if delta0 else 0
    update = numerator.div_(h_bar)
    health.update = float(torch.dot(update, update))
    if keep is not None:
        torch.mul(update, update, out=weight)
        health.update_h0 = float(torch.dot(weight, prior))
    torch.add(update, base, out=out)
    return health


@lru_cache(maxsize=16)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor, (), for operations that add a multiple of another to it."""
    return torch.tensor(value, dtype=dtype)


def cancelled(h_bar: Tensor, size: Tensor, delta0: float) -> int:
    """Coordinates at which Hbar = H0 + sum alpha_t H_t is not positive: below 0, or the remainder of a cancellation.

    A remainder is what is left at about delta0, or at the rounding error of the sum. h_bar, size: (n,), with size =
    |H0| + sum |alpha_t H_t| (equal to h_bar where nothing is negative, and 0 where nothing is known, which does not count).
    """
    rounding = 8 * torch.finfo(h_bar.dtype).eps
    remainder = (h_bar <= 2 * delta0) & (h_bar < 0.1 * size) | (h_bar < rounding * size)
    return int((remainder | (h_bar < 0)).sum())
