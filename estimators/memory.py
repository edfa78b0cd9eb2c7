"""How much memory a batch takes while its graph is alive, and how many of its rows fit a budget."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError

# parts of half this size took a tenth more time, without need: a training step takes more memory
LEAST_BYTES = 128 * 2**20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@contextmanager
def kept_storages(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by address of every storage that autograd keeps for a backward pass meanwhile, the model's own left out."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        note(kept, [value], own)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield kept


def note(kept: dict[int, int], values: Iterable[object], own: Iterable[int] = ()) -> None:
    """Add the storages of tensors."""
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()


def raise_if_full(error: BaseException) -> None:
    """Raise an error again that is about the machine's memory: no other way of computing is tried in its place."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        raise error


def parse_bytes(text: str) -> int:
    """Read "500MB", "2GB" or "1.5 GiB"; K, M, G and T are powers of 1024."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise GradmatchError(
            f'chunk is a number of rows (64), an amount of memory ("2GB") or "auto", got {text!r}',
            "out_of_range",
            text,
        )
    return size


def parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in as few equal parts of at most `rows` rows as possible."""
    step = -(-batch.size // -(-batch.size // rows))
    for first in range(0, batch.size, step):
        yield batch.rows(first, min(first + step, batch.size))
