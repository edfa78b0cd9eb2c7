"""Which weights a curvature was taken at: a cheap fingerprint, the same for a module, a state dict and a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from gradmatch.estimators.tensorfile import TensorFile

if TYPE_CHECKING:
    from torch import Tensor, nn

EDGE = 64  # elements sampled at each end and in the middle of a tensor for the fingerprint

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}  # numpy's spelling

Sample = tuple[tuple[int, ...], bytes]


def fingerprint(names: Iterable[str], sample: Callable[[str], Sample]) -> str:
    """Identify a model's weights cheaply: sha256 over sorted names, shapes and a few values of each tensor.

    The values are rounded to bfloat16, so that float32 weights and their bfloat16 copy agree. 192 elements a tensor tell
    any two fine-tunes apart and cost three small reads; this is a check against mistakes, not against forgery.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        shape, values = sample(name)
        digest.update(json.dumps([name, list(shape)]).encode())
        digest.update(values)
    return digest.hexdigest()


def edges(numel: int) -> list[tuple[int, int]]:
    """The element ranges that a fingerprint samples: both ends and the middle, or everything where that is little."""
    if numel <= 3 * EDGE:
        return [(0, numel)]
    middle = (numel - EDGE) // 2
    return [(0, EDGE), (middle, middle + EDGE), (numel - EDGE, numel)]


def sample_tensor(tensor: Tensor) -> Sample:
    """Shape and sampled values, as bfloat16 bytes, of a tensor in memory."""
    flat = tensor.detach().reshape(-1)
    return sample_blocks(tuple(tensor.shape), lambda first, last: flat[first:last])


def sample_blocks(shape: tuple[int, ...], block: Callable[[int, int], Tensor]) -> Sample:
    """The same of a tensor that is read by ranges of elements, first to last."""
    import torch

    pieces = [block(first, last) for first, last in edges(math.prod(shape))]
    rounded = torch.cat(pieces).to("cpu", torch.bfloat16)
    return shape, rounded.view(torch.int16).numpy().tobytes()


def sample_file(file: TensorFile, name: str) -> Sample:
    """Shape and sampled values, as bfloat16 bytes, of a tensor in a file; three small reads and no torch."""
    import numpy as np

    info = file[name]
    raw = b"".join(bytes(file.read_bytes(name, first, last - first)) for first, last in edges(info.numel))
    if info.dtype == "BF16":
        return info.shape, raw
    if info.dtype not in FLOATS:
        return info.shape, raw  # integers: compared as they are stored
    bits = np.frombuffer(raw, FLOATS[info.dtype]).astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    return info.shape, rounded.astype("<u2").tobytes()


def sum_of(file: TensorFile, name: str, first: int, last: int) -> float:
    """Sum of elements first .. last-1 of a floating-point tensor in a file, in float64 and without torch."""
    import numpy as np

    raw, kind = bytes(file.read_bytes(name, first, last - first)), file[name].dtype
    if kind == "BF16":
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, FLOATS[kind])
    return float(values.sum(dtype=np.float64))


def model_sampler(model: nn.Module | Mapping[str, Tensor]) -> Callable[[str], Sample]:
    """A `sample` function for a module (all names of a tied parameter are known) or a state dict."""
    tensors = model if isinstance(model, Mapping) else dict(model.named_parameters(remove_duplicate=False))
    return lambda name: sample_tensor(tensors[name])
