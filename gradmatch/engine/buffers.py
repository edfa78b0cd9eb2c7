"""Memory that a worker uses again and again: fresh pages would cost more than the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


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


def stored(values: Tensor, buffer: Tensor) -> Tensor:
    """Values in the buffer's dtype: as they are stored where that is it, else converted into the buffer."""
    return values if values.dtype == buffer.dtype else buffer.copy_(values)
