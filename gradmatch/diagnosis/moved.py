"""Rows and matrices that sit where others were: found in the base by the cosines of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity, normalize

from gradmatch.diagnosis.source import as_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.diagnosis.source import Source

# At a cosine of 1/sqrt(2) as much is new as is kept: below, a tensor or row is nearer to an unrelated one than to the base's.
KEPT = math.sqrt(0.5)
ROWS, COLUMNS = 512, 1024  # evenly spaced, of a large matrix: cosines to within 1/32
AT_ONCE = 2**20  # values of the base that rows are looked up among


@dataclass(frozen=True)
class MovedRows:
    """Rows of a matrix that look like other rows of the base's.

    Attributes:
        suspects: how many rows kept less of themselves than they changed.
        rows: rows of the matrix.
        elsewhere: other rows that the suspects looked up match closely, each counted once, as a share of those suspects.
        offset: the most frequent (match - row) among those, modulo the number of rows.
        offset_share: share of those that have it.
    """

    suspects: int
    rows: int
    elsewhere: float
    offset: int
    offset_share: float


def find_moved_rows(base: Source, task: Source, own: Tensor) -> MovedRows | None:
    """Where rows went; None where fewer than two rows changed more than they kept. own: (R,) cosines of a row with its old self.

    Matrices of fewer than eight rows (heads of a few classes) are left out: a match among so few says little.
    """
    rows, width = as_matrix(base.spec.shape)
    suspects = (own < KEPT).nonzero().flatten()
    if rows < 8 or len(suspects) < 2:
        return None
    looked = _spread(suspects, ROWS)
    step = -(-width // COLUMNS)
    new = normalize(torch.cat([task.rows(i, i + 1)[:, ::step] for i in looked.tolist()]))
    close, match = torch.full((len(looked),), -math.inf), torch.zeros_like(looked)
    for first, last in _spans(rows, width):
        near, place = (new @ normalize(base.rows(first, last)[:, ::step]).T).max(1)
        match = torch.where(near > close, place + first, match)
        close = torch.maximum(near, close)
    # The best of R random directions in P dimensions has a cosine of about sqrt(2 ln R / P): a match must be closer.
    by_chance = math.sqrt(2 * math.log(rows) / new.shape[1])
    elsewhere = (match != looked) & (close >= min(0.99, max(KEPT, by_chance)))
    offset, share = 0, 0.0
    if elsewhere.any():
        values, counts = torch.unique((match - looked)[elsewhere] % rows, return_counts=True)
        offset, share = int(values[counts.argmax()]), float(counts.max() / counts.sum())
    # Another order sends no two rows to one place; rows that a long update bent into its own direction all resemble the same few.
    places = len(torch.unique(match[elsewhere]))
    return MovedRows(len(suspects), rows, places / len(looked), offset, share)


def turned(base: Source, task: Source, cosine: float) -> bool:
    """Whether a square matrix kept less of itself than it changed, and is nearer to the base's transposed one: by some of its rows."""
    shape = base.spec.shape
    if cosine >= KEPT or shape[0] != shape[1]:
        return False
    rows, width = as_matrix(shape)
    chosen = _spread(torch.arange(rows), ROWS)
    after = torch.cat([task.rows(i, i + 1) for i in chosen.tolist()]).view(len(chosen), rows, -1)
    columns = [base.rows(*span).view(span[1] - span[0], rows, -1)[:, chosen] for span in _spans(rows, width)]
    before = torch.cat(columns).transpose(0, 1)
    return float(cosine_similarity(before.flatten(), after.flatten(), dim=0)) >= KEPT


def _spans(rows: int, width: int) -> list[tuple[int, int]]:
    step = max(1, AT_ONCE // max(1, width))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _spread(indices: Tensor, most: int) -> Tensor:
    """At most so many of them, evenly spaced."""
    if len(indices) <= most:
        return indices
    return indices[torch.linspace(0, len(indices) - 1, most).long()]
