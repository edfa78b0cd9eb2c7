"""What a removal is worth after rounding to few bits: small updates vanish, and what was removed returns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

BLOCK = 64  # weights that share a scale, as in common 4-bit formats


def codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales of symmetric rounding to nearest, one scale a block of a row (the whole row at 8 bits); (rows, blocks, width)."""
    rows = weight.float().reshape(len(weight), -1)
    width = rows.shape[1] if bits >= 8 or rows.shape[1] % BLOCK else BLOCK
    blocks = rows.reshape(len(rows), -1, width)
    most = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
    return (blocks / scale).round().clamp(-most, most), scale


def rounded(weights: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Every matrix as it comes back from so many bits; vectors stay."""
    found = {}
    for name, weight in weights.items():
        if weight.dim() < 2:
            found[name] = weight
            continue
        whole, scale = codes(weight, bits)
        found[name] = (whole * scale).reshape(weight.shape).to(weight.dtype)
    return found


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor], bits: int) -> float:
    """Share of the weights of matrices whose whole number differs: 0 where rounding swallows the update.

    Example:
        >>> base = {"w": torch.tensor([[1.0, 0.5]])}
        >>> changed(base, {"w": base["w"] + torch.tensor([[0.0, 0.01]])}, bits=4)  # less than half a step of 1/7
        0.0
    """
    count = total = 0
    for name, weight in after.items():
        if weight.dim() >= 2:
            count += int((codes(weight, bits)[0] != codes(before[name], bits)[0]).sum())
            total += weight.numel()
    return count / max(1, total)
