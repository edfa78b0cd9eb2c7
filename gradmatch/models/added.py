"""The tensors of a base plus low-rank products, expanded range by range and never stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.stores import Spec, Store, Table, equal, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 256  # products are made of so many rows at a time, so that their bits do not depend on the range that is asked for


@dataclass(frozen=True)
class LowRank:
    """One adapted weight: theta0 + scale * product of two stored factors."""

    a: str
    b: str
    scale: float
    transposed: bool


class Added(Table):
    """The base's tensors with an adapter's updates.

    Args:
        base: the base's own.
        factors: the adapter's tensors.
        low_rank: adapted weights.
        replaced: tensors that the adapter holds whole, by the name in its file.
        added: biases, by the name in its file, with the factor on them.
        freed: names that were tied to another tensor of the base and are no longer -> that tensor.
    """

    def __init__(
        self,
        base: Store,
        factors: Store,
        low_rank: Mapping[str, LowRank],
        replaced: Mapping[str, str],
        added: Mapping[str, tuple[str, float]],
        freed: Mapping[str, str],
    ) -> None:
        self.factors, self.low_rank = factors, low_rank
        self._base, self._replaced, self._added, self._freed = base, replaced, added, freed
        self._table = dict.fromkeys((*base, *replaced, *freed))

    def whole(self) -> list[str]:
        """Keys of what the adapter changes beside its factors: biases, and whole tensors that are not the base's."""
        changed = [
            key
            for name, key in self._replaced.items()
            if name not in self._base or not equal(self._base, name, self.factors, key)
        ]
        return [*changed, *(key for key, _ in self._added.values())]

    def spec(self, name: str) -> Spec:
        """Shape of the base's tensor; what is expanded is at least float32."""
        store, key = self._source(name)
        spec = store.spec(key)
        expanded = name in self.low_rank or name in self._added
        return Spec("F32", spec.shape) if expanded and spec.dtype != "F64" else spec

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements of the expanded tensor."""
        store, key = self._source(name)
        values = store.block(key, first, last)
        if name in self._added:
            bias, scale = self._added[name]
            dtype = torch_dtype(self.spec(name).dtype)
            values = values.to(dtype) + scale * self.factors.block(bias, first, last).to(dtype)
        if name in self.low_rank:
            values = self._expanded(self.low_rank[name], name, values, first, last)
        return values

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """Byte ranges of the base or its replacement, and of the factors."""
        store, key = self._source(name)
        low_rank = self.low_rank.get(name)
        keys = [low_rank.a, low_rank.b] if low_rank else []
        keys += [self._added[name][0]] if name in self._added else []
        return [*store.files(key), *(found for one in keys for found in self.factors.files(one))]

    def _source(self, name: str) -> tuple[Store, str]:
        """Where a tensor lies before anything is added to it."""
        if name in self._replaced:
            return self.factors, self._replaced[name]
        return self._base, self._freed.get(name, name)

    def _expanded(self, low_rank: LowRank, name: str, values: Tensor, first: int, last: int) -> Tensor:
        """theta0 + scale * B A, for the rows that a flat range touches."""
        import torch

        spec = self.spec(name)
        dtype = torch_dtype(spec.dtype)
        a, b = (self._whole(key).to(dtype) for key in (low_rank.a, low_rank.b))
        left, right = b.flatten(1), a.flatten(1)  # (out, r), (r, in)
        if low_rank.transposed:
            left, right = right.T, left.T
        width = math.prod(spec.shape[1:])
        start = first // (width * ROWS) * ROWS
        rows = [left[row : row + ROWS] @ right for row in range(start, -(-last // width), ROWS)]
        delta = torch.cat(rows).reshape(-1)[first - start * width : last - start * width]
        return values.to(dtype) + low_rank.scale * delta

    def _whole(self, key: str) -> Tensor:
        spec = self.factors.spec(key)
        return self.factors.block(key, 0, spec.numel).reshape(spec.shape)
