"""What the pieces of one merge share: the plan, what passes over the whole model found, and how tensors are cut and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from gradmatch.engine.draws import GRID
from gradmatch.models.gathered import Gathered
from gradmatch.models.stores import FileStore
from gradmatch.plan.inputs import Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.engine.buffers import Buffers
    from gradmatch.engine.compiled import Kernels
    from gradmatch.estimators.tensorfile import TensorFile
    from gradmatch.models.curvatures import CurvatureStore
    from gradmatch.models.stores import Store
    from gradmatch.plan.step import Plan, Step

BLOCK = (
    GRID  # elements of a piece, where the rule is elementwise: what is read, looked up and written at a time
)

ON_DEVICE = 32  # blocks of a piece that is computed elsewhere: 4 million values


class Found(NamedTuple):
    """What a transform asks of more than a piece: see `gradmatch.rules.block.Edit`."""

    cuts: Sequence[Sequence[tuple[float, int]]] = ()  # at each rank: (value, place) of every task
    sums: Tensor | None = None  # (k, T), float64


@dataclass
class Context:
    """The plan, and what passes over the whole model found before the pieces are merged."""

    plan: Plan
    found: dict[tuple[int, str], Found] = field(default_factory=dict)  # by position of the edit, and tensor
    kept: dict[tuple[str, int], tuple[int, int, int]] = field(default_factory=dict)  # see `thresholds.shares`
    majority: float = 1.0
    norms: Sequence[float] = ()
    kernels: Kernels | None = None  # compiled ones, where they are there
    mean_h0: float = 0.0  # of H0's diagonal over the model, for a damped rule

    @property
    def device(self) -> str:
        """Where the readable rules run."""
        return self.plan.request.device

    @property
    def delta0(self) -> float:
        """The floor of H0; none where lambda I stands in its place."""
        return 0.0 if self.plan.request.rule.damped else self.plan.request.delta0

    @property
    def blocks(self) -> int:
        """Of how many blocks a piece is for the readable rules: of one, which stays in a CPU's cache, or what occupies a device."""
        return 1 if self.device == "cpu" else ON_DEVICE

    @property
    def inputs(self) -> Inputs:
        """The opened inputs."""
        return self.plan.inputs


def pieces(step: Step, first: int, last: int, blocks: int = 1) -> Iterator[tuple[int, int]]:
    """Cut elements first to last of a tensor into pieces: of so many blocks, where a block is enough."""
    kind = step.span
    size = blocks * BLOCK
    if kind == "tensor":
        size = max(1, step.spec.numel)
    elif kind == "rows":
        row = step.spec.shape[-1] if step.spec.shape else 1
        size = max(1, BLOCK // max(1, row)) * max(1, row)
    for start in range(first, last, size):
        yield start, min(start + size, last)


def byte_ranges(context: Context, step: Step, first: int, last: int) -> Iterator[tuple[TensorFile, int, int]]:
    """The parts of files that elements first to last of a step will be read from."""
    stores = context.inputs.stores(step.tasks) if step.tasks else [("", context.inputs.store)]
    for store in (store for _, store in stores if step.name in store):
        for file, start, stop in store.files(step.name):
            size = (stop - start) / max(1, step.spec.numel)
            yield file, start + int(first * size), min(stop, start + int(last * size))


def plain_file(store: Store, name: str) -> FileStore | None:
    """The files whose bytes are this tensor's as they are, or None."""
    while isinstance(store, Gathered) and name not in store.parts:
        store = store.store
    return store if isinstance(store, FileStore) else None


def fetch(buffers: Buffers, slot: str, store: Store, name: str, first: int, last: int) -> Tensor:
    """Elements first to last as they are stored; valid until the same slot is filled again.

    Files are read into a buffer: mapping and unmapping their pages costs more than the copy, and two threads cannot do it
    at once. Other stores give their own view.
    """
    file = plain_file(store, name)
    if file is None:
        return store.block(name, first, last)
    return file.read(name, first, last, buffers.host(f"read {slot}", 8 * (last - first), torch.uint8))


def curvature(
    buffers: Buffers, slot: str, store: CurvatureStore | None, name: str, first: int, last: int
) -> Tensor | None:
    """The same of a curvature block; None where it is flat."""
    return None if store is None or name not in store else fetch(buffers, slot, store, name, first, last)


def add(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Add statistics."""
    for key, value in part.items():
        total[key] = total.get(key, 0.0) + value
