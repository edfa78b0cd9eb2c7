"""The two operations in which per-example squares spend their time: small matrix products, and adding their squares.

A product is formed in pieces that stay in cache until they are squared. On processors with AVX-512 the products go to
oneDNN, which comes with torch and is there about twice as fast as the BLAS behind torch.mm; the choice depends on the
machine alone, so results repeat bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Of one piece of one example's gradient. Measured: with AVX-512 2 to 4 MiB are equally good; on a processor with AVX2 alone
# and 512 KiB of second-level cache a core, 0.75 MiB takes 0.7 of the time of 3.
TILE_BYTES = 3 * 2**20 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 3 * 2**18


class Workspace:
    """One reused buffer: fresh pages for every example would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """A (rows, columns) view of uninitialised memory, valid until the next call."""
        key = (like.dtype, like.device)
        if key not in self._buffers or self._buffers[key].numel() < rows * columns:
            self._buffers[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return self._buffers[key][: rows * columns].view(rows, columns)


@lru_cache(maxsize=1)
def _onednn() -> Any:
    """oneDNN's linear layer x w', or None where it is missing, no faster, or not what it was when this was written."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    return _private_operator() if _multiplies(_private_operator()) else None


def _private_operator() -> Any:
    """An operator that torch keeps to itself, and may take away or change."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _multiplies(operator: Any) -> bool:
    """Whether an operator gives x w' for strided x and w, called as `product` calls it."""
    left, right = torch.arange(12.0).view(3, 4).t(), torch.arange(15.0).view(3, 5).t()
    try:
        found = operator(left, right, None, "none", [], "")
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return False
    return isinstance(found, Tensor) and found.shape == (4, 5) and torch.allclose(found, left @ right.t())


def add_product(left: Tensor, right: Tensor, sums: Tensor, space: Workspace) -> None:
    """sums += left right'. (O, T), (I, T), (O, I)."""
    if _for_onednn(left) is None:
        sums.addmm_(left, right.t())
    else:
        sums.add_(product(left, right, space))


def _for_onednn(left: Tensor) -> Any:
    """The operator for products of this tensor, or None."""
    return _onednn() if left.dtype == torch.float32 and left.device.type == "cpu" else None


def product(left: Tensor, right: Tensor, space: Workspace) -> Tensor:
    """left right', (O, T) and (I, T) of any strides -> (O, I), valid until the next call."""
    linear = _for_onednn(left)
    if linear is not None:
        found: Tensor = linear(left, right, None, "none", [], "")
        return found
    return torch.mm(left, right.t(), out=space.take(left.shape[0], right.shape[0], left))


def add_square_of_product(
    left: Tensor, right: Tensor, squares: Tensor, spread: Tensor | None, space: Workspace
) -> None:
    """squares += (left right')^2 and spread += (left right')^4, in pieces of a few rows. (O, T), (I, T), (O, I)."""
    outputs, inputs = left.shape[0], right.shape[0]
    step = max(1, TILE_BYTES // (inputs * left.element_size()))
    for first in range(0, outputs, step):
        piece = product(left[first : first + step], right, space)
        squares[first : first + step].addcmul_(piece, piece)
        if spread is not None:
            piece.mul_(piece)
            spread[first : first + step].addcmul_(piece, piece)
