"""Deltas as models: a folder that a merge with form="delta" wrote, merged - base in float32, added to its base range by range.

A bfloat16 copy of a merge loses what is smaller than its steps; a difference has steps of its own size. The base stays where
it is, and base + delta is a model like any other: open it, merge it, or write it out as whole weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from estimators.fingerprint import fingerprint
from estimators.tensorfile import TensorFile
from gradmatch.checkpoint import Checkpoint, indexed_files, open_checkpoint, read_json
from gradmatch.inputs.stores import FileStore, Spec, Store, torch_dtype
from gradmatch.output.card import CARD

if TYPE_CHECKING:
    from torch import Tensor

DELTA = "delta.safetensors"
DELTA_INDEX = "delta.safetensors.index.json"


class DeltaStore:
    """theta = theta0 + delta, in the delta's dtype; tensors without a delta are the base's."""

    def __init__(self, base: Store, delta: FileStore) -> None:
        self._base, self._delta = base, delta

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def spec(self, name: str) -> Spec:
        """Shape of the base's tensor; dtype of the delta where there is one."""
        return (self._delta if name in self._delta else self._base).spec(name)

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements of the sum."""
        values = self._base.block(name, first, last)
        if name not in self._delta:
            return values
        return values.to(torch_dtype(self.spec(name).dtype)) + self._delta.block(name, first, last)

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """Byte ranges of the base and of the delta."""
        return [*self._base.files(name), *(self._delta.files(name) if name in self._delta else ())]


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta."""
    return (folder / DELTA).is_file() or (folder / DELTA_INDEX).is_file()


def delta_files(folder: Path) -> FileStore:
    """The stored differences alone."""
    indexed = (folder / DELTA_INDEX).is_file()
    return FileStore(indexed_files(folder, DELTA_INDEX) if indexed else [TensorFile(folder / DELTA)])


def open_delta(folder: Path, base: Checkpoint | None) -> Checkpoint:
    """Open a delta on its base.

    Args:
        folder: as a merge with form="delta" wrote it.
        base: the model that it is a difference to; None: the one that its card names.

    Raises:
        ValueError: no card, no base named there, or a base with other weights than the delta was taken from.
        FileNotFoundError: the base that the card names is gone.
    """
    if not (folder / CARD).is_file():
        raise ValueError(
            f"{folder} holds a delta without its {CARD}, which says what base it belongs to; fetch both"
        )
    said = read_json(folder / CARD).get("delta") or {}
    if base is None:
        named = said.get("base")
        if not named:
            raise ValueError(
                f"{folder} is a delta on a base that was in memory; open it with base=..., the model it was merged on"
            )
        if not Path(named).exists():
            raise FileNotFoundError(
                f"{folder} is a delta on {named}, which is not there; open it with base=..., wherever that model is now"
            )
        base = open_checkpoint(named)
    delta = delta_files(folder)
    missing = next((name for name in delta if name not in base), None)
    if missing is None and fingerprint(delta, base.sample) == said.get("fingerprint"):
        return Checkpoint(
            DeltaStore(base.store, delta), path=folder, config=base.config, aliases=base.aliases
        )
    why = "the weights differ" if missing is None else f"it has no {missing!r}"
    raise ValueError(
        f"{folder} is a delta on another base than {base.where}: {why}; it was taken from {said.get('base') or 'a model in memory'}"
    )
