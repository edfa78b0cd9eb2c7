"""Random draws that depend on the seed and the names alone: the same however a tensor is cut into pieces."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

GRID = 131_072  # elements per random draw: masks are the same however a tensor is cut into pieces


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
