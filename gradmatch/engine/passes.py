"""What the engine hands to rules and transforms for one piece of a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRID = 131_072  # elements per random draw: masks are the same however a tensor is cut into pieces


@dataclass
class Edit:
    """One piece of the stacked task vectors, for a transform.

    Attributes:
        tau: (T, *s).
        alpha: (T, 1, ..., 1).
        noise: gives (T, *s) uniform draws, the same for the same seed, task, tensor and place.
        threshold: (T, 1, ..., 1), from a pass over the whole model, or None where the piece is the whole tensor.
        majority: sign of the sum of all elected signs, for entries that cancel exactly.
    """

    tau: Tensor
    alpha: Tensor
    noise: Callable[[], Tensor]
    threshold: Tensor | None = None
    majority: float = 1.0


@dataclass
class Block:
    """One piece of everything, for an elementwise rule.

    Attributes:
        theta0: (n,).
        tau: (T, n), after the transforms.
        alpha: (T, 1).
        h0: (n,) or a number: base_weight N_0 F_0 + delta0.
        h: (T, n): N_t F_t, summed losses.
        g: (T, n): measured gradients of the summed losses, or None.
        counts: (T, 1): N_t.
        delta0: the floor.
        options: of the rule.
        norms: (T, 1): each model's Fisher norm, 1 unless the rule asks for it.
    """

    theta0: Tensor
    tau: Tensor
    alpha: Tensor
    h0: Any
    h: Any
    g: Any
    counts: Tensor
    delta0: float
    options: Mapping[str, Any]
    norms: Tensor

    def mean_curvature(self) -> Tensor:
        """Per-example means F_t, (T, n), over each model's norm where the rule normalises."""
        mean: Tensor = self.h / self.counts / self.norms
        return mean


def uniform(seed: int, task: str, tensor: str, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Uniform draws in [0, 1) for elements first to first + count of a tensor; independent of sharding and order."""
    out = torch.empty(count, dtype=dtype)
    done = 0
    while done < count:
        cell, offset = divmod(first + done, GRID)
        take = min(GRID - offset, count - done)
        digest = hashlib.sha256(f"{seed}\0{task}\0{tensor}\0{cell}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
        draws = torch.rand(offset + take, generator=generator, dtype=torch.float32)
        out[done : done + take] = draws[offset:]
        done += take
    return out
