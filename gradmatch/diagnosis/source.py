"""One tensor of one model as a scan reads it: by ranges, with notes of what its values are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from gradmatch.measure import health

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.checkpoint import Checkpoint

PIECE = 2**17  # values of each model at a time: half a megabyte in float32, which stays in a core's cache
HALVES = (torch.bfloat16, torch.float16)


class Source:
    """One tensor of one model, read a range at a time in float32; what its values are is noted on the way.

    Attributes:
        spec: its shape and dtype.
        nonfinite: number of NaN and infinite values read.
        zero: whether all values read were 0.
        grids: half precisions in which every value read is exact.
    """

    def __init__(self, model: Checkpoint, name: str) -> None:
        self.model, self.name, self.spec = model, name, model.spec(name)
        self.nonfinite, self.zero, self.grids = 0, True, list(HALVES)

    def read(self, first: int, last: int) -> Tensor:
        """Values first to last, (last - first,)."""
        stored = self.model.block(self.name, first, last)
        values = stored.float()
        if not math.isfinite(float(values.sum())):  # a sum may also overflow
            self.nonfinite += health.count_nonfinite(stored)
        self.zero = self.zero and not bool(values.any())
        self.grids = [half for half in self.grids if stored.dtype == half or health.on_grid(values, half)]
        return values

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first to last of the matrix that it is, (last - first, P)."""
        width = as_matrix(self.spec.shape)[1]
        return self.model.block(self.name, first * width, last * width).float().view(-1, width)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, values of each) of a tensor, as its first dimension tells; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(1, rows)


def pieces(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of elements, of whole rows where a row is no longer than PIECE, else of parts of one row."""
    step = max(1, PIECE // max(1, width)) * width if width <= PIECE else PIECE
    for start in range(0, rows * width, rows * width if width <= PIECE else width):
        end = start + (rows * width if width <= PIECE else width)
        yield from ((first, min(first + step, end)) for first in range(start, end, step))
