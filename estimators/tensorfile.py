"""One safetensors file, read header first, by name and by range of elements.

Checkpoints and curvature files share this reader. It imports neither torch nor numpy until values are asked for, so that
whatever a header can tell (names, shapes, dtypes, bytes, metadata) is known in milliseconds; and it checks the header
before anything trusts it: the format is a length, a JSON table of byte ranges, and the bytes.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.header import ITEM_SIZE, TORCH_NAME, TensorInfo, read_header

if TYPE_CHECKING:
    import torch

OPENING = threading.RLock()  # two threads must not open or map one file twice


class TensorFile(Mapping[str, TensorInfo]):
    """A safetensors file as a mapping name -> TensorInfo; values are read on request.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or its header is corrupt (what, where, and both values are named).
    """

    _fd: int | None = None
    _map: mmap.mmap | None = None
    _bytes: torch.Tensor | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._version = _version(os.stat(self.path)) if self.path.is_file() else None
        self.metadata, self._tensors = read_header(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Without descriptor and map, which are this object's alone: a copy opens its own."""
        return {key: value for key, value in vars(self).items() if key not in ("_fd", "_map", "_bytes")}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def fileno(self) -> int:
        """The file descriptor that reads go through; opened on first use and kept until `close`.

        Raises:
            ValueError: another file lies there than when the header was read, so the byte ranges are not its own.
        """
        with OPENING:
            if self._fd is None:
                fd = os.open(self.path, os.O_RDONLY)
                if _version(os.fstat(fd)) != self._version:
                    os.close(fd)
                    raise GradmatchError(
                        f"{self.path}: the file changed since its header was read; open it again",
                        "unreadable_file",
                        self.path,
                    )
                self._fd = fd
            return self._fd

    def close(self) -> None:
        """Close the descriptor. A later read opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._fd is not None:  # bound above: at the end of a script the module's own names may be gone
            close(self._fd)

    def read_bytes(self, name: str, first: int = 0, count: int | None = None) -> bytearray:
        """Read `count` elements of a tensor from element `first` on (row-major), as raw little-endian bytes.

        Raises:
            ValueError: the file ended early (it was cut or replaced since its header was read).
        """
        info = self[name]
        size = ITEM_SIZE[info.dtype]
        count = info.numel - first if count is None else count
        buffer = bytearray(count * size)
        self.read_into(name, memoryview(buffer), first)
        return buffer

    def read_into(self, name: str, buffer: memoryview, first: int = 0) -> None:
        """Fill `buffer` (bytes) with the tensor's elements from element `first` on.

        Raises:
            ValueError: the file ended early (it was cut or replaced since its header was read).
        """
        info = self[name]
        offset = info.start + first * ITEM_SIZE[info.dtype]
        done = 0
        while done < len(buffer):
            got = _read_at(self.fileno(), buffer[done:], offset + done)
            if got == 0:
                raise GradmatchError(
                    f"{self.path}: tensor {name!r} ends after {done} of {len(buffer)} bytes; the file changed since it was opened: fetch or write it again",
                    "unreadable_file",
                    self.path,
                )
            done += got

    def block(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Elements `first` to `last` of a tensor, flat, in the stored dtype: a read-only view of the file's pages.

        The view costs no memory of the process's own; writing to it is not possible. `read` gives a copy.
        """
        import torch

        info = self[name]
        size = ITEM_SIZE[info.dtype]
        last = info.numel if last is None else last
        dtype: torch.dtype = getattr(torch, TORCH_NAME[info.dtype])
        start, stop = info.start + first * size, info.start + last * size
        if start == stop:
            return torch.empty(0, dtype=dtype)
        pages = self._pages()[start:stop]
        if start % size:  # older writers did not align; a copy is
            pages = pages.clone()
        return pages.view(dtype)

    def expect(self, start: int, stop: int) -> None:
        """Tell the kernel that these bytes of the file will be wanted soon (it starts reading them)."""
        self._advise(mmap.MADV_WILLNEED, start, stop)

    def release(self, start: int, stop: int) -> None:
        """Tell the kernel that views into these bytes are done with: their pages leave the process."""
        self._advise(mmap.MADV_DONTNEED, start, stop)

    def _advise(self, advice: int, start: int, stop: int) -> None:
        if self._map is None:
            self._pages()
        assert self._map is not None
        if not hasattr(self._map, "madvise"):
            return
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE if advice == mmap.MADV_DONTNEED else start
        start -= start % mmap.PAGESIZE
        stop = stop - stop % mmap.PAGESIZE if advice == mmap.MADV_DONTNEED else min(stop, len(self._map))
        if stop > start:
            self._map.madvise(advice, start, stop - start)

    def _pages(self) -> torch.Tensor:
        """The whole file as a read-only map, (bytes,) uint8."""
        with OPENING:
            if self._bytes is None:
                import torch

                size = os.fstat(self.fileno()).st_size
                end = max((info.stop for info in self._tensors.values()), default=0)
                if size < end:
                    raise GradmatchError(
                        f"{self.path}: the file has shrunk to {size} bytes since it was opened, its tensors end at {end}; "
                        "fetch or write it again",
                        "unreadable_file",
                        self.path,
                    )
                self._map = mmap.mmap(self.fileno(), 0, prot=mmap.PROT_READ)
                with (
                    warnings.catch_warnings()
                ):  # torch warns that the map is not writable, which is what we want
                    warnings.simplefilter("ignore", UserWarning)
                    self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
            return self._bytes

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, in its stored dtype and shape, in memory of its own."""
        import torch

        info = self[name]
        dtype: torch.dtype = getattr(torch, TORCH_NAME[info.dtype])
        tensor = torch.empty(info.shape, dtype=dtype)
        if info.nbytes:
            flat = tensor.view(-1).view(torch.uint8)
            self.read_into(name, flat.numpy().data)
        return tensor


def _read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into a buffer from a place in a file, whatever other threads read; returns how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def _version(status: os.stat_result) -> tuple[int, ...]:
    """What tells one writing of a file from the next."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
