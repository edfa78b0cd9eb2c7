"""A model whose units stand in another order, or in another basis: a view of its tensors, and of its curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.curvature import FACTOR_A, FACTOR_B, GRADIENT, MEAN, STANDARD_ERROR, Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.gathered import Gathered, Part
from gradmatch.models.stores import MemoryStore, Spec, Store, read

if TYPE_CHECKING:
    from torch import Tensor

# Of every dim of a tensor: (n,) int64, the old position of each new one; (m, n) floats, W' = M W along it; None: as it is.
Ways = Sequence["Tensor | None"]


@dataclass(frozen=True)
class Movement:
    """Where the positions of a model's tensors go.

    Attributes:
        ways: name -> how each dim moves; nothing for tensors that stay.
        source: the model before it was moved, a Checkpoint.
        names: every name, of files and of the module, of the tensors that move -> the name that `ways` knows.
        inputs: (name, dim) over which products are summed, for the factors of a layer's inputs.
        exact: whether it keeps the function: permutations, and rotations where the network does not notice them.
    """

    ways: Callable[[str], Ways]
    source: Any
    names: Mapping[str, str]
    inputs: frozenset[tuple[str, int]] = frozenset()
    exact: bool = True

    def view(self, store: Store) -> Store:
        """The tensors of a model, or blocks of a curvature of the same shapes, moved."""
        return Moved(store, {name: self.ways(known) for name, known in self.names.items() if name in store})

    def of_curvature(self, curvature: Curvature, whose: str) -> Curvature:
        """The curvature of the moved model, given that of the model before or (by its fingerprint) of the moved one itself.

        Blocks are moved when they are read.

        Args:
            curvature: under the names of the model's files or module.
            whose: how to call the model.

        Raises:
            ValueError: one that is not diagonal after a change of basis, or with blocks that the movement does not know.
        """
        if isinstance(curvature, MovedCurvature):
            return curvature
        known = [name for name in curvature if name in self.names]
        soft = next((n for n in known if any(_is_matrix(way) for way in self.ways(self.names[n]))), None)
        if soft is not None:
            raise GradmatchError(
                f"the curvature of {whose} is given unit by unit, and {soft!r} was moved into another basis, where it is not diagonal; "
                "estimate it again on the aligned model (write it with `gradmatch align`), or align by permutations alone",
                "bad_curvature",
                whose,
            )
        return MovedCurvature(curvature, self)


class Moved(Gathered):
    """The tensors of a store with their positions moved; read as they are asked for.

    Args:
        store: the source.
        ways: by name, how each dim moves; other tensors are given as they are.
    """

    def __init__(self, store: Store, ways: Mapping[str, Ways]) -> None:
        self.ways = {name: list(way) for name, way in ways.items() if any(one is not None for one in way)}
        super().__init__(store, {name: self._part(store, name) for name in self.ways})

    def _part(self, store: Store, name: str) -> Part:
        import torch

        spec, ways = store.spec(name), self.ways[name]
        shape = tuple(size if way is None else len(way) for size, way in zip(spec.shape, ways, strict=True))
        first = ways[0]
        order = torch.arange(spec.shape[0]) if first is None or _is_matrix(first) else first
        width = math.prod(spec.shape[1:])
        return Part((name,), Spec(spec.dtype, shape), lambda: (width, order))

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements of the result; of a tensor in another basis all of it is read."""
        if name not in self.ways:
            return self.store.block(name, first, last)
        ways, shape = self.ways[name], self.parts[name].spec.shape
        source = self.store.spec(name).shape
        if _is_matrix(ways[0]):
            values = self.store.block(name, 0, math.prod(source)).reshape(source)
            return _moved(values, ways).reshape(-1)[first:last]
        width = max(1, math.prod(shape[1:]))
        low, high = first // width, -(-last // width)
        inner = math.prod(source[1:])
        rows, _, _ = self.parts[name].gather(self.store, low * inner, high * inner)
        values = _moved(rows.reshape(high - low, *source[1:]), [None, *ways[1:]])
        return values.reshape(-1)[first - low * width : last - low * width]


def _is_matrix(way: Tensor | None) -> bool:
    return way is not None and way.dim() == 2


def _moved(values: Tensor, ways: Ways) -> Tensor:
    """Values with every dim moved; sums in float32 or more, rounded once."""
    import torch

    dtype = values.dtype
    for dim, way in enumerate(ways):
        if way is None:
            continue
        if way.dim() == 1:
            values = values.index_select(dim, way)
        else:
            wide = torch.promote_types(values.dtype, way.dtype)
            values = torch.tensordot(way.to(wide), values.to(wide), dims=([1], [dim])).movedim(0, dim)
    return values.to(dtype)


class MovedCurvature(Curvature):
    """The curvature of a moved model: the blocks of the model's own, moved as its weights are.

    Diagonals and gradients move like the weights; of a layer's factors the inputs' as its inputs do, the outputs' as its outputs.
    """

    def __init__(self, source: Curvature, movement: Movement) -> None:
        self.source, self.movement = source, movement
        kept = {key: value for key, value in source.info.items() if key != "fingerprint"}
        super().__init__(_Blocks(self), source.num_examples, kept)

    def store(self, store: Store, prefix: str) -> Store:
        """The blocks of one kind that a store holds, moved."""
        known = {name: self.movement.names[name] for name in store if name in self.movement.names}
        if prefix in (MEAN, GRADIENT, STANDARD_ERROR):
            return Moved(store, {name: self.movement.ways(held) for name, held in known.items()})
        ways = {
            name: self._factor(store.spec(name).shape, name, held, prefix) for name, held in known.items()
        }
        return Moved(store, ways)

    def _factor(self, shape: Sequence[int], name: str, held: str, prefix: str) -> Ways:
        """How both dims of a factor move: those of the layer's inputs (with its kernel), or outputs."""
        import torch

        ways = list(self.movement.ways(held))
        into = next((dim for dim in range(len(ways)) if (held, dim) in self.movement.inputs), 1)
        way = ways[into] if prefix == FACTOR_A else ways[1 - into if into < 2 else 0]
        if way is None:
            return [None] * len(shape)
        if shape[-1] % len(way):
            raise GradmatchError(
                f"{prefix}{name} has {shape[-1]} positions and the layer {len(way)} units there: the factors of a layer in groups do not "
                "follow an alignment; take the diagonal (structure='diagonal')",
                "bad_curvature",
                name,
            )
        kernel = shape[-1] // len(way)
        index = (way[:, None] * kernel + torch.arange(kernel)).reshape(-1)
        return [*[None] * (len(shape) - 2), index, index]


class _Blocks(Mapping[str, "Tensor"]):
    """The blocks of a moved curvature, each moved when it is read."""

    def __init__(self, curvature: MovedCurvature) -> None:
        self.curvature = curvature

    def __getitem__(self, key: str) -> Tensor:
        source: Any = self.curvature.source
        prefix = next(p for p in (MEAN, GRADIENT, STANDARD_ERROR, FACTOR_A, FACTOR_B) if key.startswith(p))
        name = key.removeprefix(prefix)
        return read(self.curvature.store(MemoryStore({name: source._block(key)}), prefix), name)

    def __iter__(self) -> Iterator[str]:
        source: Any = self.curvature.source
        return iter(source._blocks)

    def __len__(self) -> int:
        source: Any = self.curvature.source
        return len(source._blocks)
