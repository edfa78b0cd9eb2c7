"""TIES in place: the kernel beside `gradmatch.rules.edits.ties`, which tests hold it equal to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradmatch.engine.kernels import Buffers, stored


@dataclass
class TiesHealth:
    """Counts over one block: tasks in conflict, exact cancellations, and the sum of elected signs."""

    conflicts: int = 0
    cancelled: int = 0
    signs: float = 0.0


def ties(
    buffers: Buffers,
    out: Tensor,
    theta0: Tensor,
    theta: Sequence[Tensor],
    thresholds: Sequence[float],
    alpha: Sequence[float],
    scale: float,
    majority: float,
    *,
    normalize: bool = True,
) -> TiesHealth:
    """theta0 + scale * sum_t alpha_t tau'_t into `out`, with tau' by TIES: trim, elect, share among those who agree.

    With S = sum_t w_t tau_t and A = sum_t |w_t tau_t| of the trimmed task vectors and e = sign(S), the sum over those who
    agree with e is (S + e A) / 2: no second round over the tasks. How many agree is counted in bytes, per distinct |w_t|.

    Args:
        buffers: of the worker.
        out: (n,), in the dtype of the arithmetic; all others are (n,), as they are stored.
        theta0: the base's values.
        theta: the tasks' values.
        thresholds: entries with |tau_t| below are dropped.
        alpha: weights of the election, the shares and the sum.
        scale: of the whole.
        majority: sign that entries which cancel exactly take.
        normalize: divide by the weights that agree.

    Returns:
        The health of the block.
    """
    count, dtype = out.numel(), out.dtype
    base = stored(theta0, buffers.get("theta0", count, dtype))
    load, tau = buffers.get("load", count, dtype), buffers.get("tau", count, dtype)
    total, size = buffers.get("numerator", count, dtype).zero_(), buffers.get("weight", count, dtype).zero_()
    sizes = {abs(given) for given in alpha if given}
    unit = sizes.pop() if len(sizes) == 1 else 1.0  # equal weights count as 1, which is exact
    flags = buffers.get("flags", count, torch.bool).numpy()
    votes: dict[float, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}  # |w| -> how many push up, and down
    for values, threshold, given in zip(theta, thresholds, alpha, strict=True):
        w = given / unit
        if w == 0:
            continue
        torch.sub(stored(values, load), base, out=tau)
        if threshold > 0:
            torch.hardshrink(tau, just_below(threshold, dtype), out=tau)
        if abs(w) not in votes:
            pair = [buffers.get(f"{way} {len(votes)}", count, torch.uint8).numpy() for way in ("up", "down")]
            votes[abs(w)] = (pair[0], pair[1])
            pair[0].fill(0)
            pair[1].fill(0)
        up, down = votes[abs(w)] if w > 0 else votes[abs(w)][::-1]
        up += np.greater(tau.numpy(), 0, out=flags).view(np.uint8)
        down += np.less(tau.numpy(), 0, out=flags).view(np.uint8)
        total.add_(tau, alpha=w)
        size.add_(tau.abs_(), alpha=abs(w))
    health = TiesHealth()
    opposed = buffers.get("opposed", count, torch.bool).numpy()
    ups, downs = (
        _any(buffers, count, name, [pair[way] for pair in votes.values()])
        for way, name in enumerate(("u", "d"))
    )
    health.conflicts = int(np.count_nonzero(np.logical_and(ups, downs, out=opposed)))
    elected = torch.sign(total, out=tau)
    health.signs = float(elected.sum())
    if health.conflicts:
        opposed &= np.equal(total.numpy(), 0, out=flags)
        health.cancelled = int(np.count_nonzero(opposed))
        if health.cancelled:
            elected.numpy()[opposed] = majority
    numerator = total.addcmul_(elected, size)  # twice the sum over those who agree
    if not normalize or not votes:
        torch.add(base, numerator, alpha=scale * unit / 2, out=out)
        return health
    rising = np.greater(elected.numpy(), 0, out=flags).view(np.uint8)
    weight = size.zero_() if len(votes) > 1 else size
    for w, (up, down) in votes.items():
        up -= down
        up *= rising
        up += down  # as many as agree; modulo 256, like the two lines above
        if len(votes) == 1:  # then w = 1
            np.copyto(weight.numpy(), up)
        else:
            np.copyto(load.numpy(), up)
            weight.add_(load, alpha=w)
    weight.clamp_(min=min(votes))  # nobody agrees where nothing is left
    torch.addcdiv(base, numerator, weight, value=scale / 2, out=out)
    return health


def _any(buffers: Buffers, count: int, name: str, votes: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Where any of several counts is not zero."""
    if len(votes) == 1:
        return votes[0]
    union = buffers.get(f"any {name}", count, torch.uint8).numpy()
    union.fill(0)
    for one in votes:
        union |= one
    return union


@lru_cache(maxsize=256)
def just_below(threshold: float, dtype: torch.dtype) -> float:
    """The largest value that a threshold excludes: hardshrink keeps what is beyond it, TIES what reaches it."""
    value = torch.tensor(threshold, dtype=dtype)
    return float(torch.nextafter(value, value.new_zeros(())))
