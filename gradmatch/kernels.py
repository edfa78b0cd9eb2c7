"""The hot arithmetic, in place and in buffers that stay in cache. Tests hold each kernel equal to the readable rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Load = Callable[
    [Tensor], Tensor
]  # given a scratch buffer, returns the values: in the buffer, or as a read-only view


class Buffers:
    """Named scratch buffers of one worker, allocated once."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer of `count` elements; its contents are whatever was left there."""
        held = self._held.get((name, dtype))
        if held is None or held.numel() < count:
            held = self._held[name, dtype] = torch.empty(count, dtype=dtype)
        return held[:count]


def linear_combination(out: Tensor, scratch: Tensor, terms: Sequence[tuple[float, Load]]) -> Tensor:
    """sum_k c_k x_k into `out`; terms with c_k = 0 are not read."""
    started = False
    for coefficient, load in terms:
        if coefficient == 0:
            continue
        values = load(scratch)
        if not started and coefficient == 1:
            out.copy_(values)  # exact: a model at weight 1 returns itself, bit for bit
        elif not started:
            torch.mul(values, coefficient, out=out)
        else:
            out.add_(values, alpha=coefficient)
        started = True
    return out if started else out.zero_()


@dataclass
class Eq12Health:
    """Sums over one piece: coordinates that the floor decides, that were clamped, and squared norms of the update."""

    floored: int = 0
    clamped: int = 0
    update: float = 0.0
    update_h0: float = 0.0


def eq12(
    buffers: Buffers,
    theta0: Load,
    h0: Load | float,
    h0_scale: float,
    delta0: float,
    tasks: Sequence[tuple[float, float, Load, Load | None]],
    count: int,
    dtype: torch.dtype,
    keep: float | None = None,
) -> tuple[Tensor, Tensor, Eq12Health]:
    """theta0 + (H0 + sum alpha_t H_t)^-1 sum alpha_t (H0 + H_t) tau_t, with H0 = h0_scale * h0 + delta0, H_t = N_t F_t.

    Args:
        buffers: of the worker.
        theta0: loads the base's values.
        h0: loads the base's mean curvature, or a number.
        h0_scale: what it is multiplied by.
        delta0: the floor.
        tasks: (alpha_t, N_t, load theta_t, load F_t or None where flat); alpha_t < 0 removes.
        count: elements.
        dtype: of the arithmetic.
        keep: floor of the denominator as a share of H0 (removal), or None.

    Returns:
        The merged values (a buffer), theta0 (a buffer or view), and the health of the piece.
    """
    base = theta0(buffers.get("theta0", count, dtype))
    prior = buffers.get("h0", count, dtype)
    if callable(h0):
        torch.mul(h0(buffers.get("load", count, dtype)), h0_scale, out=prior)
        prior.add_(delta0)
    else:
        prior.fill_(h0 * h0_scale + delta0)
    h_bar = buffers.get("h_bar", count, dtype).copy_(prior)
    numerator = buffers.get("numerator", count, dtype)
    tau, weight = buffers.get("tau", count, dtype), buffers.get("weight", count, dtype)
    for position, (alpha, examples, theta, mean) in enumerate(tasks):
        torch.sub(theta(buffers.get("load", count, dtype)), base, out=tau)
        values = prior
        if mean is not None:
            fisher = mean(buffers.get("load", count, dtype))
            values = torch.add(prior, fisher, alpha=examples, out=weight)
            h_bar.add_(fisher, alpha=alpha * examples)
        if position == 0:
            torch.mul(values, tau, out=numerator).mul_(alpha)
        else:
            numerator.addcmul_(values, tau, value=alpha)
    health = Eq12Health()
    flags = buffers.get("flags", count, torch.bool)
    if keep is not None:
        torch.mul(prior, keep, out=weight)
        health.clamped = int(torch.lt(h_bar, weight, out=flags).count_nonzero())
        torch.maximum(h_bar, weight, out=h_bar)
    else:
        health.floored = int(torch.lt(h_bar, 2 * delta0, out=flags).count_nonzero()) if delta0 else 0
    update = numerator.div_(h_bar)
    health.update = float(torch.dot(update, update))
    if keep is not None:
        torch.mul(update, update, out=weight)
        health.update_h0 = float(torch.dot(weight, prior))
    return update.add_(base), base, health
