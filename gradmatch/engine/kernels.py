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
    """Coordinates of one piece that the floor decides, were clamped, lack positive curvature; squared norms of the update."""

    floored: int = 0
    clamped: int = 0
    cancelled: int = 0
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
    guard: str = "floor",
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
        keep: the share of H0 that must remain of a removal, or None where nothing is guarded.
        guard: how it is kept, see `gradmatch.rules.removal`.

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
    drift = buffers.get("drift", count, dtype)  # sum_t alpha_t tau_t, for the guard
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
        if keep is not None:
            torch.mul(tau, alpha, out=drift) if position == 0 else drift.add_(tau, alpha=alpha)
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
    else:  # 0 and 1 as floats: comparing into booleans takes five times as long
        below = torch.le(h_bar, 2 * delta0, out=buffers.get("load", count, dtype))
        floored = int(below.sum())
        if floored or any(task[0] < 0 for task in tasks):
            size = torch.abs(prior, out=tau)
            for alpha, examples, _, mean in tasks:
                if mean is not None:
                    torch.abs(mean(buffers.get("load", count, dtype)), out=weight)
                    size.add_(weight, alpha=abs(alpha) * examples)
            health.cancelled = cancelled(h_bar, size, delta0)
        health.floored = floored if delta0 else 0
    update = numerator.div_(h_bar)
    health.update = float(torch.dot(update, update))
    if keep is not None:
        torch.mul(update, update, out=weight)
        health.update_h0 = float(torch.dot(weight, prior))
    return update.add_(base), base, health


def cancelled(h_bar: Tensor, size: Tensor, delta0: float) -> int:
    """Coordinates at which Hbar = H0 + sum alpha_t H_t is not positive: below 0, or the remainder of a cancellation.

    A remainder is what is left at about delta0, or at the rounding error of the sum. h_bar, size: (n,), with size =
    |H0| + sum |alpha_t H_t| (equal to h_bar where nothing is negative, and 0 where nothing is known, which does not count).
    """
    rounding = 8 * torch.finfo(h_bar.dtype).eps
    remainder = (h_bar <= 2 * delta0) & (h_bar < 0.1 * size) | (h_bar < rounding * size)
    return int((remainder | (h_bar < 0)).sum())


@dataclass
class TiesHealth:
    """Counts over one piece: tasks in conflict, exact cancellations, and the sum of elected signs."""

    conflicts: int = 0
    cancelled: int = 0
    signs: float = 0.0


def ties(
    buffers: Buffers,
    theta0: Load,
    theta: Sequence[Load],
    thresholds: Sequence[float],
    alpha: Sequence[float],
    c: Sequence[float],
    count: int,
    dtype: torch.dtype,
    majority: float,
    *,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, TiesHealth]:
    """theta0 + sum_t c_t tau'_t with tau' by TIES: trim at the thresholds, elect, share among those who agree.

    Args:
        buffers: of the worker.
        theta0: loads the base's values.
        theta: load the tasks' values.
        thresholds: entries with |tau_t| below are dropped.
        alpha: weights that the election and the shares use.
        c: coefficients of the sum.
        count: elements.
        dtype: of the arithmetic.
        majority: sign that entries which cancel exactly take.
        normalize: divide by the weights that agree.

    Returns:
        The merged values (a buffer), theta0 (a buffer or view), and the health of the piece.
    """
    base = theta0(buffers.get("theta0", count, dtype))
    tau = buffers.get("tau_stack", len(theta) * count, dtype).view(len(theta), count)
    load, total = buffers.get("load", count, dtype), buffers.get("numerator", count, dtype)
    signs, opposing = buffers.get("h_bar", count, dtype), buffers.get("weight", count, dtype)
    flags = buffers.get(
        "tau", count, dtype
    )  # 0 and 1 as floats: comparing into booleans takes five times as long
    for row, values in enumerate(theta):
        torch.sub(values(load), base, out=tau[row])
        if thresholds[row] > 0:
            torch.ops.aten.hardshrink.out(tau[row], _just_below(thresholds[row], dtype), out=tau[row])
        torch.sign(tau[row], out=load)
        if alpha[row] < 0:
            load.neg_()
        elif alpha[row] == 0:
            load.zero_()
        if row == 0:
            torch.mul(tau[row], alpha[row], out=total)
            signs.copy_(load)
            torch.abs(load, out=opposing)
        else:
            total.add_(tau[row], alpha=alpha[row])
            signs.add_(load)
            opposing.add_(load.abs_())
    health = TiesHealth()
    torch.gt(opposing, signs.abs_(), out=flags)  # somebody pushes the other way
    health.conflicts = int(flags.sum())
    elected = total.sign_()
    health.signs = float(elected.sum())
    torch.eq(elected, 0, out=load)
    if health.conflicts:
        health.cancelled = int(flags.mul_(load).sum())
    elected.add_(load, alpha=majority)
    merged, agreeing = signs.zero_(), opposing.zero_()
    for row in range(len(theta)):
        torch.sign(tau[row], out=load)
        direction = 1.0 if alpha[row] > 0 else -1.0
        load.mul_(elected).mul_(direction).clamp_(min=0)  # 1 where it agrees, else 0
        if alpha[row] == 0:
            load.zero_()
        merged.addcmul_(tau[row], load, value=c[row])
        agreeing.add_(load, alpha=abs(alpha[row]))
    if normalize:
        torch.eq(agreeing, 0, out=flags)
        merged.div_(agreeing.add_(flags))
    return merged.add_(base), base, health


def _just_below(threshold: float, dtype: torch.dtype) -> float:
    """The largest value that a threshold excludes: hardshrink keeps what is beyond it, TIES what reaches it."""
    value = torch.tensor(threshold, dtype=dtype)
    return float(torch.nextafter(value, value.new_zeros(())))
