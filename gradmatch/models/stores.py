"""Where tensors come from: files, memory, and views that rename or reorder others. Nothing here computes a merge.

A store knows names, shapes and dtypes without reading a value, and gives any range of a tensor's elements, flat. dtypes are
spelled as in safetensors ("F32", "BF16"), so that headers can be checked without importing torch.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.header import ITEM_SIZE, TORCH_NAME
from gradmatch.estimators.tensorfile import TensorFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
EQUAL = 2**24  # elements that are compared at a time
SAFETENSORS_NAME = {torch_name: name for name, torch_name in TORCH_NAME.items()}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * ITEM_SIZE[self.dtype]

    @property
    def floating(self) -> bool:
        """Whether it can be averaged."""
        return self.dtype in FLOATING

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Store(Protocol):
    """Tensors by name, read by range of elements."""

    def __iter__(self) -> Iterator[str]:
        """Names, in a fixed order."""

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""

    def spec(self, name: str) -> Spec:
        """Shape and dtype; KeyError for an unknown name."""

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements first to last, flat, in the stored dtype; possibly a read-only view."""

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """The byte ranges of files that `block` reads for this tensor, for read-ahead."""


class Table:
    """The names of a store, which are the keys of a table."""

    _table: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table


class FileStore(Table):
    """Tensors of one or more safetensors files; a name must occur in one file only.

    Args:
        files: opened ones.
        prefix: only tensors whose key begins with it, without it.

    Raises:
        ValueError: two files hold the same name.
    """

    def __init__(self, files: Sequence[TensorFile], prefix: str = "") -> None:
        self._table: dict[str, tuple[TensorFile, str]] = {}
        for file in files:
            for key in file:
                if not key.startswith(prefix):
                    continue
                name = key.removeprefix(prefix)
                if name in self._table:
                    raise GradmatchError(
                        f"tensor {name!r} is in {self._table[name][0].path} and in {file.path}; keep one of the two",
                        "bad_model",
                        name,
                    )
                self._table[name] = (file, key)

    def renamed(self, names: Mapping[str, str]) -> FileStore:
        """The same files under other names: new name -> name here."""
        store = FileStore(())
        store._table = {new: self._table[old] for new, old in names.items()}
        return store

    def source(self, name: str) -> tuple[TensorFile, str]:
        """The file that holds a tensor, and its key there."""
        return self._table[name]

    def spec(self, name: str) -> Spec:
        """Shape and dtype from the header."""
        file, key = self._table[name]
        return Spec(file[key].dtype, file[key].shape)

    def block(self, name: str, first: int, last: int) -> Tensor:
        """A view of the file's pages."""
        file, key = self._table[name]
        return file.block(key, first, last)

    def read(self, name: str, first: int, last: int, buffer: Tensor) -> Tensor:
        """Elements first to last, flat, in the stored dtype, read into the front of `buffer` (bytes, uint8).

        Raises:
            ValueError: the file ended early.
        """
        file, key = self._table[name]
        held = buffer[: (last - first) * ITEM_SIZE[file[key].dtype]]
        file.read_into(key, held.numpy().data, first)
        return held.view(torch_dtype(file[key].dtype))

    def place(self, name: str, first: int) -> tuple[int, int]:
        """The file descriptor, and the byte in that file at which element `first` lies."""
        file, key = self._table[name]
        return file.fileno(), file[key].start + first * ITEM_SIZE[file[key].dtype]

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """The tensor's own byte range."""
        file, key = self._table[name]
        return [(file, file[key].start, file[key].stop)]


class Renamed(Table):
    """Tensors of other stores under new names: new name -> store and name there."""

    def __init__(self, where: Mapping[str, tuple[Store, str]]) -> None:
        self._table: dict[str, tuple[Store, str]] = dict(where)

    def spec(self, name: str) -> Spec:
        """Shape and dtype at the source."""
        store, source = self._table[name]
        return store.spec(source)

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements at the source."""
        store, source = self._table[name]
        return store.block(source, first, last)

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """Byte ranges at the source."""
        store, source = self._table[name]
        return store.files(source)


def renamed(store: Store, names: Mapping[str, str]) -> Store:
    """Some tensors of a store under new names: new name -> name in the store."""
    if isinstance(store, FileStore):
        return store.renamed(names)  # still files, which the engine reads without a detour
    return Renamed({new: (store, old) for new, old in names.items()})


class MemoryStore(Table):
    """Tensors of a mapping, on whatever device; names that share one memory are listed in `aliases`.

    Raises:
        TypeError: a value that is no tensor.
        ValueError: a tensor without values (on the meta device), or of a dtype that cannot be stored.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str = "the state dict") -> None:
        import torch

        self._table: dict[str, tuple[Spec, Tensor]] = {}
        self.aliases: dict[str, str] = {}
        seen: dict[tuple[object, ...], str] = {}
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"{where}: {name!r} is a {type(value).__name__}, not a tensor; pass the state dict alone"
                )
            if value.device.type == "meta":
                raise GradmatchError(
                    f"{where}: {name!r} is on the meta device and has no values; load the weights first",
                    "bad_model",
                    where,
                )
            dtype = SAFETENSORS_NAME.get(str(value.dtype).removeprefix("torch."))
            if dtype is None or value.layout != torch.strided:
                raise GradmatchError(
                    f"{where}: {name!r} is a {value.layout} tensor of {value.dtype}, which cannot be merged",
                    "bad_model",
                    where,
                )
            flat = value.detach().reshape(-1)
            memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if value.numel() and memory in seen:
                self.aliases[name] = seen[memory]
                flat = self._table[seen[memory]][1]
            seen.setdefault(memory, name)
            self._table[name] = Spec(dtype, tuple(value.shape)), flat

    def spec(self, name: str) -> Spec:
        """Shape and dtype of the tensor."""
        return self._table[name][0]

    def block(self, name: str, first: int, last: int) -> Tensor:
        """A view of the tensor's memory, or a copy where it lies on another device."""
        return self._table[name][1][first:last].to("cpu")

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """Nothing on disk."""
        return ()


def unpickled(path: Path, allowed: bool) -> MemoryStore:
    """The state dict in a pickle, read with weights_only.

    Raises:
        ValueError: it was not asked for.
    """
    if not allowed:
        raise GradmatchError(
            f"{path} is a pickle, which can run code when it is opened; save it as safetensors, or pass allow_pickle "
            "(it is then read with weights_only)",
            "pickle",
            path,
        )
    import torch

    lazily = zipfile.is_zipfile(path)  # files of torch before 1.6 are none
    return MemoryStore(torch.load(path, map_location="cpu", weights_only=True, mmap=lazily), str(path))


def spans(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of elements, of at most so many each.

    >>> list(spans(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    return ((first, min(first + size, numel)) for first in range(0, numel, size))


def take(store: Store, name: str, first: int, last: int) -> Tensor:
    """Elements first to last, flat, in the stored dtype; of files in memory of its own, so that no page of theirs stays mapped."""
    if not isinstance(store, FileStore):
        return store.block(name, first, last)
    import torch

    size = ITEM_SIZE[store.spec(name).dtype]
    return store.read(name, first, last, torch.empty((last - first) * size, dtype=torch.uint8))


def read(store: Store, name: str) -> Tensor:
    """One whole tensor in its shape and stored dtype, in memory of its own."""
    spec = store.spec(name)
    return store.block(name, 0, spec.numel).clone().reshape(spec.shape)


def equal(one: Store, name: str, other: Store, other_name: str) -> bool:
    """Whether two tensors are the same in shape, dtype and every value (bit by bit, so that NaN equals itself)."""
    import torch

    spec = one.spec(name)
    if other.spec(other_name) != spec:
        return False
    for first, last in spans(spec.numel, EQUAL):
        held = (
            store.block(key, first, last).contiguous() for store, key in ((one, name), (other, other_name))
        )
        if not torch.equal(*(values.view(torch.uint8) for values in held)):
            return False
    return True


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors spelling: "F32" gives torch.float32."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAME[name])
    return dtype
