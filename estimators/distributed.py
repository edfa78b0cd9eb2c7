"""The same estimate under torchrun: batches are shared out, sums added up, and every rank returns the whole.

Every rank is given the same batches and takes every K-th one; or it is given a DataLoader with a DistributedSampler,
whose padding (examples repeated to make ranks even) is left out. Labels are drawn by an example's place in the whole
run, so the numbers are those of one process, up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from gradmatch.estimators.batches import Batch, BatchReader


def place() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shared_out(batches: Iterable[Any], reader: BatchReader) -> Iterator[tuple[int, int, Batch, bool]]:
    """Index, examples of the whole run up to and with it, the batch, and whether it is this rank's to add."""
    rank, world = place()
    sampler = getattr(batches, "sampler", None)
    if world > 1 and isinstance(sampler, torch.utils.data.DistributedSampler):
        length, local = len(sampler.dataset), 0  # type: ignore[arg-type]
        for index, raw in enumerate(batches):
            batch = reader(raw, index, rank + world * local)
            batch.stride = world
            # rows before the padding starts
            real = min(batch.size, max(0, -(-(length - batch.first) // world)))
            local += batch.size
            kept = batch.rows(0, real) if 0 < real < batch.size else batch
            yield index, min(length, world * local), kept, real > 0
        return
    seen = 0
    for index, raw in enumerate(batches):
        batch = reader(raw, index, seen)
        seen += batch.size
        yield index, seen, batch, index % world == rank


def add_up(sums: dict[str, Tensor], device: torch.device) -> None:
    """Replace every accumulator by its sum over ranks; a rank that never made one contributes zeros."""
    _, world = place()
    if world == 1:
        return
    mine = {key: (tuple(value.shape), value.dtype) for key, value in sums.items()}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    for key, (shape, kind) in sorted(
        {key: value for each in everyone for key, value in each.items()}.items()
    ):
        value = sums.get(key, torch.zeros(shape, dtype=kind, device=device)).contiguous()
        dist.all_reduce(value)
        sums[key] = value


def gather(value: Any) -> list[Any]:
    """One object from every rank."""
    _, world = place()
    if world == 1:
        return [value]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, value)
    return everyone
