"""Memory that a worker uses again and again: fresh pages would cost more than the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Named scratch buffers of one worker, allocated once, on the device of the arithmetic or beside the files."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._held: dict[tuple[str, torch.dtype, bool], Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer of `count` elements on the device; its contents are whatever was left there."""
        return self._get(name, count, dtype, on_host=False)

    def host(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """The same in the CPU's memory, pinned where CUDA copies from it."""
        return self._get(name, count, dtype, on_host=True)

    def _get(self, name: str, count: int, dtype: torch.dtype, *, on_host: bool) -> Tensor:
        key = name, dtype, on_host and self.device.type != "cpu"
        held = self._held.get(key)
        if held is None or held.numel() < count:
            pinned = key[2] and self.device.type == "cuda"
            where = torch.device("cpu") if on_host else self.device
            held = self._held[key] = torch.empty(count, dtype=dtype, device=where, pin_memory=pinned)
        return held if held.numel() == count else held[:count]


def stored(values: Tensor, buffer: Tensor) -> Tensor:
    """Values in the buffer's dtype and on its device: as they are stored where that is so, else copied into the buffer.

    The copy is over when this returns, so that what was read into can be read into again.
    """
    same = values.dtype == buffer.dtype and values.device == buffer.device
    return values if same else buffer.copy_(values)
