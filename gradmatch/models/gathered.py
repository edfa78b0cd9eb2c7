"""Views whose tensors are put together of pieces of others: rows of a vocabulary, experts stacked or taken apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.models.stores import Spec, Store, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.estimators.tensorfile import TensorFile

ABSENT = -1
FAR = 1024  # pieces that lie further apart are read one by one
RUNS = 256  # but no more reads than these for one block


@dataclass(frozen=True)
class Part:
    """One gathered tensor: its piece i is piece `order[i]` of the tensors `names`, laid end to end.

    Attributes:
        names: of the store that it is read from.
        spec: shape and dtype of the result.
        pieces: gives the number of elements of a piece, mostly a row, and the order, (pieces,) int64, with ABSENT for a piece
            that is nowhere; asked for when values are.
    """

    names: tuple[str, ...]
    spec: Spec
    pieces: Callable[[], tuple[int, Tensor]]

    def gather(self, store: Store, first: int, last: int) -> tuple[Tensor, Tensor, int]:
        """The pieces that hold elements first to last, (pieces, width); which of them are absent (rubbish); the first's number.

        No more of a source is read than what lies between the pieces that are asked for.
        """
        import torch

        width, order = self.pieces()
        low, high = first // width, -(-last // width)
        index = order[low:high]
        values = torch.empty(len(index), width, dtype=torch_dtype(self.spec.dtype))
        counts = [store.spec(name).numel // width for name in self.names]
        ends = torch.tensor(counts).cumsum(0)
        owner = torch.bucketize(index, ends, right=True).masked_fill(index < 0, ABSENT)
        for position in (number for number in torch.unique(owner).tolist() if number != ABSENT):
            here = (owner == position).nonzero()[:, 0]
            wanted = index[here] - (int(ends[position]) - counts[position])
            for places, run in _runs(here, wanted):
                start, stop = int(run.min()), int(run.max()) + 1
                block = store.block(self.names[position], start * width, stop * width)
                values[places] = block.reshape(-1, width)[run - start].to(values.dtype)
        return values, index == ABSENT, low


def _runs(places: Tensor, pieces: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a list of pieces where much between two neighbours is not wanted, so that it is not read; not into many, though."""
    import torch

    cuts = (((pieces[1:] - pieces[:-1]).abs() > FAR).nonzero()[:, 0] + 1).tolist()
    cuts = cuts if len(cuts) <= RUNS else []
    yield from zip(torch.tensor_split(places, cuts), torch.tensor_split(pieces, cuts), strict=True)


class Gathered:
    """Tensors gathered from those of a store, whose other tensors are given as they are.

    Args:
        store: the source.
        parts: by the name of the result.
    """

    def __init__(self, store: Store, parts: Mapping[str, Part]) -> None:
        self.store, self.parts = store, parts

    def __iter__(self) -> Iterator[str]:
        yield from self.store
        yield from (name for name in self.parts if name not in self.store)

    def __contains__(self, name: object) -> bool:
        return name in self.parts or name in self.store

    def spec(self, name: str) -> Spec:
        """Shape and dtype of the result."""
        return self.parts[name].spec if name in self.parts else self.store.spec(name)

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements of the result."""
        if name not in self.parts:
            return self.store.block(name, first, last)
        values, absent, low = self.parts[name].gather(self.store, first, last)
        count, width = values.shape
        if bool(absent.any()):
            values[absent] = self.filled(name, low, low + count, width)[absent].to(values.dtype)
        start = first - low * width
        return values.reshape(-1)[start : start + last - first]

    def filled(self, name: str, low: int, high: int, width: int) -> Tensor:
        """What stands for absent pieces, for all from `low` to `high`: (pieces, width)."""
        import torch

        return torch.zeros(high - low, width)

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """Byte ranges of all that it is gathered from."""
        sources = self.parts[name].names if name in self.parts else (name,)
        return [found for source in sources for found in self.store.files(source)]


@dataclass(frozen=True)
class Rows:
    """For every output row the source row, or ABSENT."""

    index: Sequence[int]

    def part(self, store: Store, name: str) -> Part:
        """The tensor of a store with these rows."""
        import torch

        spec = store.spec(name)
        pieces = (math.prod(spec.shape[1:]), torch.tensor(self.index))
        return Part((name,), Spec(spec.dtype, (len(self.index), *spec.shape[1:])), lambda: pieces)


class AlignedStore(Gathered):
    """A store whose vocabulary tensors are gathered row by row, with something in the rows that it lacks.

    Args:
        store: the model's own.
        rows: where each output row comes from.
        names: the tensors with one row a token.
        donors: the base's: the tasks, whose mean fills the rows that it lacks.
        base: a task's: the base, which fills the rows that it lacks.
    """

    def __init__(
        self,
        store: Store,
        rows: Rows,
        names: Sequence[str],
        *,
        donors: Sequence[AlignedStore] = (),
        base: AlignedStore | None = None,
    ) -> None:
        super().__init__(store, {name: rows.part(store, name) for name in names if name in store})
        self.rows, self.donors, self.base = rows, donors, base

    def filled(self, name: str, low: int, high: int, width: int) -> Tensor:
        """The base's rows, or the mean of the tasks that have them."""
        import torch

        if self.base is not None:
            return self.base.block(name, low * width, high * width).reshape(-1, width)
        total, count = torch.zeros(high - low, width), torch.zeros(high - low, 1)
        for other in self.donors:
            values, absent, _ = other.parts[name].gather(other.store, low * width, high * width)
            present = (~absent).unsqueeze(1)
            total += torch.where(present, values.float(), 0.0)
            count += present
        return total / count.clamp(min=1)
