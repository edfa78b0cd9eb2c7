"""A view whose vocabulary tensors are gathered row by row: every output row from the row of its token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.models.stores import Spec, Store

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.estimators.tensorfile import TensorFile

ABSENT = -1


@dataclass(frozen=True)
class Rows:
    """For every output row the source row, or ABSENT."""

    index: Sequence[int]

    def shape(self, spec: Spec) -> Spec:
        """A tensor's spec with the output's number of rows."""
        return Spec(spec.dtype, (len(self.index), *spec.shape[1:]))

    def gather(self, store: Store, name: str, first: int, last: int) -> tuple[Tensor, Tensor, int]:
        """Flat elements first to last of the output (absent rows hold rubbish), the absent rows, and the first row.

        Whole rows are gathered, so the values start at row `first // width`.
        """
        import torch

        spec = store.spec(name)
        width = max(1, spec.numel // max(1, spec.shape[0]))
        low, high = first // width, -(-last // width)
        index = torch.tensor(self.index[low:high])
        rows = store.block(name, 0, spec.numel).reshape(spec.shape[0], width)
        return rows[index.clamp(min=0)], index == ABSENT, low


class AlignedStore:
    """A store whose vocabulary tensors are gathered row by row.

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
        self._store, self.rows, self.names = store, rows, frozenset(names)
        self.donors, self.base = donors, base

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __contains__(self, name: object) -> bool:
        return name in self._store

    def spec(self, name: str) -> Spec:
        """The output's shape."""
        spec = self._store.spec(name)
        return self.rows.shape(spec) if name in self.names else spec

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements of the aligned tensor."""
        if name not in self.names:
            return self._store.block(name, first, last)
        values, absent, low = self.rows.gather(self._store, name, first, last)
        if bool(absent.any()):
            filled = self._filled(name, low, low + len(values), values.shape[1])
            values[absent] = filled[absent].to(values.dtype)
        width = values.shape[1]
        return values.reshape(-1)[first - low * width : last - low * width]

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """The model's own byte range."""
        return self._store.files(name)

    def _filled(self, name: str, low: int, high: int, width: int) -> Tensor:
        """What stands for absent rows, (rows, width)."""
        import torch

        if self.base is not None:
            return self.base.block(name, low * width, high * width).reshape(-1, width)
        total, count = torch.zeros(high - low, width), torch.zeros(high - low, 1)
        for other in self.donors:
            values, absent, _ = other.rows.gather(other._store, name, low * width, high * width)
            present = (~absent).unsqueeze(1)
            total += torch.where(present, values.float(), 0.0)
            count += present
        return total / count.clamp(min=1)
