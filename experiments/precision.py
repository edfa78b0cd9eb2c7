"""In which precision a network runs forward: weights and optimisers stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def uses_bfloat16(precision: str) -> bool:
    """Whether the forward runs under bfloat16 autocast; `auto`: where it is faster.

    It is on GPUs since Ampere and on processors with bfloat16 arithmetic; elsewhere it is emulated, and slow.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def used_precision(precision: str) -> str:
    """What a record says of it."""
    return "bfloat16" if uses_bfloat16(precision) else "float32"


def autocast(precision: str) -> AbstractContextManager[Any]:
    """The forward in bfloat16 where `precision` says so."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=uses_bfloat16(precision))
