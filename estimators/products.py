"""The two operations in which per-example squares spend their time: small matrix products, and adding their squares.

A product is formed in pieces that stay in cache until they are squared. On processors with AVX-512 the products go to
oneDNN, which comes with torch and is there about twice as fast as the BLAS behind torch.mm; the choice depends on the
machine alone, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Of one piece of one example's gradient. Smaller ones leave products that are too small: with 0.75 MiB they took up to 1.6 times
# as long on a processor with AVX2 and 512 KiB of second-level cache a core; with AVX-512 2 to 4 MiB were equally good.
TILE_BYTES = 3 * 2**20
# Examples whose products torch.bmm forms at once, each on a thread of its own. One after the other, each on all threads, they took
# 1.05 (64 positions) to 1.3 times as long (8 positions); four at once leave the cache.
AT_ONCE = 2


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


def add_squares_of_products(
    left: Tensor, right: Tensor, squares: Tensor, spread: Tensor | None, space: Workspace
) -> None:
    """squares += sum_n (left_n' right_n)^2 and spread += sum_n (left_n' right_n)^4. (B, T, O), (B, T, I), (O, I)."""
    together = 1 if _for_onednn(left) is not None else AT_ONCE
    for first in range(0, left.shape[0], together):
        some = slice(first, first + together)
        add_square_of_product(left[some].transpose(1, 2), right[some].transpose(1, 2), squares, spread, space)


def add_square_of_product(
    left: Tensor, right: Tensor, squares: Tensor, spread: Tensor | None, space: Workspace
) -> None:
    """The same for few examples, with their positions last, in pieces of a few rows. (B, O, T), (B, I, T), (O, I)."""
    outputs, inputs = left.shape[1], right.shape[1]
    step = max(1, TILE_BYTES // (inputs * left.element_size()))
    for first in range(0, outputs, step):
        for piece in _products(left[:, first : first + step], right, space):
            squares[first : first + step].addcmul_(piece, piece)
            if spread is not None:
                piece.mul_(piece)
                spread[first : first + step].addcmul_(piece, piece)


def _products(left: Tensor, right: Tensor, space: Workspace) -> Iterable[Tensor]:
    """left_n right_n', (B, O, T) and (B, I, T) -> B of (O, I), each valid until the next call or round."""
    if left.shape[0] == 1:
        return [product(left[0], right[0], space)]
    examples, outputs, inputs = *left.shape[:2], right.shape[1]
    room = space.take(examples * outputs, inputs, left).view(examples, outputs, inputs)
    return torch.bmm(left, right.transpose(1, 2), out=room).unbind()
