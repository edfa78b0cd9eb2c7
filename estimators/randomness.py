"""Random labels that depend on the seed and the example alone, and a draw that stays cheap at 50,000 classes.

Every example has its own counter-based stream, so the same labels are drawn whatever the batch size, the order of the
batches' arrival on ranks, or the number of processes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mix(state: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words that looks random. Any shape."""
    with np.errstate(over="ignore"):
        state = state + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MULTIPLIERS[0]
        state = (state ^ (state >> np.uint64(27))) * _MULTIPLIERS[1]
        return np.asarray(state ^ (state >> np.uint64(31)))


def uniforms(seed: int, draw: int, first: int, examples: int, count: int, stride: int = 1) -> Tensor:
    """Uniform numbers in [0, 1) for the examples first, first + stride, ... of a run; (examples, count), float64.

    Each number is a function of (seed, draw, index of the example, position) and of nothing else.
    """
    key = mix(mix(np.array([seed % 2**64], np.uint64)) + np.uint64(draw))
    rows = mix(key + np.arange(first, first + stride * examples, stride, dtype=np.uint64))
    words = mix(rows[:, None] + mix(np.arange(count, dtype=np.uint64))[None, :])
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def signs(seed: int, draw: int, step: int, size: int, device: torch.device) -> Tensor:
    """Independent signs of +-1 with probability 1/2 (Rademacher); (size,), float32."""
    generator = torch.Generator().manual_seed(
        int(mix(np.array([(seed * 1_000_003 + draw) % 2**64], np.uint64))[0] >> 1) ^ step
    )
    return torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).to(device, torch.float32)


BLOCK = 2**20  # weights drawn from at a time: what a draw adds to memory stays small


def draw_index(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution, in two levels: the block first, then the entry inside it.

    A draw reads each weight once (block sums) and then one block a row, so it costs a few per cent of a softmax where
    torch.multinomial costs as much as the backward pass. A rounded sum can never push the draw outside the classes, and
    a class of weight zero is never drawn.

    Args:
        weights: (M, C), non-negative, not necessarily normalised.
        uniform: (M,), in [0, 1).

    Returns:
        Class indices, (M,), int64.
    """
    rows = max(1, BLOCK // weights.shape[1])
    uniform = uniform.to(weights.device, torch.float64)
    starts = range(0, max(1, len(weights)), rows)
    return torch.cat([_draw_index(weights[n : n + rows], uniform[n : n + rows]) for n in starts])


def _draw_index(weights: Tensor, uniform: Tensor) -> Tensor:
    """The same for so few rows that copies of them do not matter."""
    classes = weights.shape[1]
    width = max(1, math.isqrt(classes))
    blocks = classes // width
    whole = blocks * width
    sums = weights[:, :whole].view(-1, blocks, width).sum(2, dtype=torch.float64)  # (M, blocks)
    if whole < classes:
        sums = torch.cat([sums, weights[:, whole:].sum(1, keepdim=True, dtype=torch.float64)], 1)
    block, rest = _first_above(sums, uniform * sums.sum(1))
    columns = block[:, None] * width + torch.arange(width, device=weights.device)
    inside = weights.gather(1, columns.clamp_(max=classes - 1)).double()  # (M, width)
    if whole < classes:
        inside.masked_fill_(columns.new_tensor(range(width)) + block[:, None] * width >= classes, 0)
    index, _ = _first_above(inside, torch.minimum(rest, inside.sum(1)))
    return (block * width + index).clamp_(max=classes - 1)


def _first_above(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index whose cumulative weight exceeds the target, and what remains of the target inside it."""
    cumulative = weights.cumsum(1)  # (M, K)
    total = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = (cumulative <= target[:, None]).sum(1).clamp_(max=weights.shape[1] - 1)
    before = (cumulative - weights).gather(1, index[:, None])[:, 0]
    return index, (target - before).clamp_(min=0)
