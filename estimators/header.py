"""The header of a safetensors file: a length, and a JSON table of byte ranges, checked before anything trusts it."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmatch.estimators.errors import GradmatchError, within
from gradmatch.estimators.files import parse_json

HEADER_LIMIT = 100_000_000  # bytes; the limit of the format's reference reader
BEGINNINGS = {  # of what is taken for a safetensors file
    b"{": "JSON text",
    b"[": "JSON text",
    b"version ": "the pointer of git-lfs, which stands for it; run `git lfs pull`",
    b"GGUF": "a GGUF file, whose weights are quantised; take the model that it was made of",
    b"PK": "a zip archive, as torch.save writes; save it as safetensors",
    b"\x80": "a pickle; save it as safetensors",
    b"<": "a web page; fetch the file again",
}
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
TORCH_NAME = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its dtype in the format's spelling ("F32"), shape, and absolute byte range in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Parse and check the header: (metadata, tensors by name in order of their bytes).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a whole, well-formed safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with within(path, "unreadable_file"):
        return _parsed(path, path.stat().st_size)


def _parsed(path: Path, size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise GradmatchError(_no_header(prefix, length, size), "not_safetensors")
        raw = file.read(length)
    header = parse_json(raw, f"{path}: the header", _without_duplicates)
    if not isinstance(header, dict):
        raise GradmatchError(f"the header is {type(header).__name__}, not a table of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise GradmatchError("__metadata__ must map strings to strings")
    tensors = [_tensor_info(name, entry, 8 + length, size) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.stop))
    end = 8 + length
    for info in tensors:
        if info.start < end:
            raise GradmatchError(
                f"tensor {info.name!r} starts at byte {info.start}, inside the one before it"
            )
        end = max(end, info.stop)
    return metadata, {info.name: info for info in tensors}


def _no_header(prefix: bytes, length: int, size: int) -> str:
    """What a file is that is no safetensors file, as far as its first bytes tell."""
    found = next((what for start, what in BEGINNINGS.items() if prefix.startswith(start)), "")
    if found:
        return f"not a safetensors file but {found}"
    return f"not a safetensors file, or cut short: its first 8 bytes give a header of {length} bytes in a file of {size}"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are unique; a second tensor of one name would silently hide the first."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise GradmatchError(f"the header holds {twice} more than once")
    return table


def _tensor_info(name: str, entry: Any, data_start: int, file_size: int) -> TensorInfo:
    """Check one header entry against the format and the file's size."""
    fields = [entry.get(key) for key in ("dtype", "shape", "data_offsets")] if isinstance(entry, dict) else []
    if (
        len(fields) != 3
        or not isinstance(fields[1], list)
        or not isinstance(fields[2], list)
        or len(fields[2]) != 2
    ):
        raise GradmatchError(f"tensor {name!r} lacks a dtype, shape or data_offsets: {entry!r:.200}")
    dtype, shape, (start, stop) = fields[0], tuple(fields[1]), fields[2]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise GradmatchError(
            f"tensor {name!r} has dtype {dtype!r:.80}; known are {sorted(ITEM_SIZE)}", "unknown_name"
        )
    if not all(type(extent) is int and extent >= 0 for extent in (*shape, start, stop)):
        raise GradmatchError(f"tensor {name!r} has a shape or offset that is no whole number: {entry!r:.200}")
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if stop - start != expected:
        raise GradmatchError(
            f"tensor {name!r} of shape {list(shape)} and dtype {dtype} needs {expected} bytes, "
            f"its offsets hold {stop - start}",
            "shape_mismatch",
        )
    if data_start + stop > file_size:
        raise GradmatchError(
            f"cut short: tensor {name!r} ends at byte {data_start + stop}, the file has {file_size}; fetch it again"
        )
    return TensorInfo(name, dtype, shape, data_start + start, data_start + stop)
