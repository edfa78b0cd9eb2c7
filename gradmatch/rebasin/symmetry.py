"""The permutations that a network does not notice: which axes of which tensors share one, and random members of the group.

A dim of a tensor is a tuple of segments, laid end to end; a segment is a tuple of factors, major first; a factor is the name
of a group of units, or a number of positions that keep their order. Units inside a head may be permuted in every head by
itself: their group lies `inside` that of the heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rebasin.axes import Axis, factors_of, find, pin
from gradmatch.rebasin.tracing import free

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rebasin.tracing import Trace

Factor = str | int
Segment = tuple[Factor, ...]
Dim = tuple[Segment, ...]
Member = dict[
    str, "Tensor"
]  # group -> (size,), or (size of the group it lies inside, size): the old position of every new one


@dataclass(frozen=True)
class Group:
    """Units that may be permuted among themselves: how many, and inside which group (of heads), in each by itself."""

    size: int
    inside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Symmetry:
    """What may be permuted in a network.

    Attributes:
        groups: by name, those that others lie inside first.
        dims: by the module's name of a tensor, of each of its dims.
        consumed: (tensor, dim) over which products are summed: a unit's outgoing weights.
        notes: what is left out, and why.
        features: by the name of a layer, the dims of its output.

    >>> spec = Symmetry.from_table({"up.weight": ["hidden", None], "up.bias": ["hidden"], "down.weight": [None, "hidden"]},
    ...                            {"up.weight": (3, 2), "up.bias": (3,), "down.weight": (4, 3)})
    >>> spec.groups
    {'hidden': Group(size=3, inside=())}
    """

    groups: Mapping[str, Group]
    dims: Mapping[str, tuple[Dim, ...]]
    consumed: frozenset[tuple[str, int]] = frozenset()
    notes: tuple[str, ...] = field(default=())
    features: Mapping[str, tuple[Dim, ...]] = field(default_factory=dict)

    @classmethod
    def from_table(
        cls,
        table: Mapping[str, Sequence[Any]] | Iterable[tuple[str, Sequence[Any]]],
        shapes: Mapping[str, Sequence[int]],
    ) -> Symmetry:
        """A specification by hand: of every tensor and dim the group's name, or None for positions that stay.

        Args:
            table: name -> one entry a dim; a mapping, or pairs.
            shapes: of all parameters and buffers of the model.

        Raises:
            ValueError: a tensor named twice, one that the model lacks, one that the table lacks, or groups of two sizes.
        """
        pairs = list(table.items()) if isinstance(table, Mapping) else list(table)
        dims: dict[str, tuple[Dim, ...]] = {}
        groups: dict[str, Group] = {}
        for name, entries in pairs:
            if name in dims:
                raise GradmatchError(
                    f"the specification names {name!r} twice; name every tensor once", "bad_spec", name
                )
            if name not in shapes:
                raise GradmatchError(
                    f"the specification names {name!r}, which the model lacks", "bad_spec", name
                )
            if len(entries) != len(shapes[name]):
                raise GradmatchError(
                    f"the specification has {len(entries)} dims for {name!r} of shape {list(shapes[name])}; write one entry a dim, None "
                    "for one that stays",
                    "bad_spec",
                    name,
                )
            for entry, size in zip(entries, shapes[name], strict=True):
                if entry is not None and groups.setdefault(str(entry), Group(size)).size != size:
                    raise GradmatchError(
                        f"the group {entry!r} has {groups[str(entry)].size} units, and {name!r} has {size} there",
                        "bad_spec",
                        name,
                    )
            dims[name] = tuple(
                ((size if entry is None else str(entry),),)
                for entry, size in zip(entries, shapes[name], strict=True)
            )
        missing = [name for name in shapes if name not in dims]
        if missing:
            raise GradmatchError(
                f"the specification does not name {missing[0]!r} ({len(missing)} of {len(shapes)} tensors are missing); name every "
                "parameter and buffer, with None for dims that stay",
                "bad_spec",
                missing[0],
            )
        return cls(groups, dims)

    def identity(self) -> Member:
        """The member that moves nothing."""
        return {name: self._each(group, None) for name, group in self.groups.items()}

    def random(self, generator: torch.Generator, only: Iterable[str] | None = None) -> Member:
        """A random member; of some groups alone where these are named."""
        chosen = set(self.groups if only is None else only)
        return {
            name: self._each(group, generator if name in chosen else None)
            for name, group in self.groups.items()
        }

    def _each(self, group: Group, generator: torch.Generator | None) -> Tensor:
        """An order of a group's units (in each of the groups that it lies inside): random, or as they are."""
        outer = [self.groups[name].size for name in group.inside]
        orders = [
            torch.arange(group.size) if generator is None else torch.randperm(group.size, generator=generator)
            for _ in range(prod(outer))
        ]
        return torch.stack(orders).reshape(*outer, group.size)

    def size(self, factor: Factor) -> int:
        """Positions of a factor."""
        return factor if isinstance(factor, int) else self.groups[factor].size

    def index(self, member: Member, name: str) -> list[Tensor | None]:
        """Of every dim of a tensor the old position of each new one; None where all stay."""
        return [self._dim(member, dim) for dim in self.dims[name]] if name in self.dims else []

    def _dim(self, member: Member, dim: Dim) -> Tensor | None:
        if not has_units(dim):
            return None
        start, found = 0, []
        for segment in dim:
            old = self.old(member, segment)
            found.append(start + old)
            start += len(old)
        return torch.cat(found)

    def old(self, member: Member, segment: Segment) -> Tensor:
        """The old flat position of each new one in a segment."""
        sizes = [self.size(factor) for factor in segment]
        new = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
        places = dict(zip(segment, new, strict=True))
        flat = torch.zeros(sizes, dtype=torch.long)
        for factor, coordinate, size in zip(segment, new, sizes, strict=True):
            if isinstance(factor, str):
                outer = tuple(places[one] for one in self.groups[factor].inside)
                coordinate = member[factor][(*outer, coordinate)]
            flat = flat * size + coordinate
        return flat.reshape(-1)

    def inverse(self, member: Member) -> Member:
        """The member that undoes another."""
        undone: Member = {}
        for name, group in self.groups.items():
            new = self._coordinates(group)
            moved = self._outer(member, group, new)
            undone[name] = torch.empty_like(member[name])
            undone[name][(*moved, member[name])] = new[-1]
        return undone

    def compose(self, first: Member, second: Member) -> Member:
        """The member that does first one, then the other."""
        made: Member = {}
        for name, group in self.groups.items():
            new = self._coordinates(group)
            made[name] = first[name][(*self._outer(second, group, new), second[name])]
        return made

    def _coordinates(self, group: Group) -> tuple[Tensor, ...]:
        sizes = [*(self.groups[one].size for one in group.inside), group.size]
        return torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")

    def _outer(self, member: Member, group: Group, new: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Where a member puts the positions of the groups that one lies inside."""
        places = dict(zip(group.inside, new, strict=False))
        return tuple(
            member[one][(*(places[outer] for outer in self.groups[one].inside), places[one])]
            for one in group.inside
        )

    def holders(self, group: str) -> list[str]:
        """Names of the tensors that a group moves."""
        return [
            name
            for name, dims in self.dims.items()
            if any(group in segment for dim in dims for segment in dim)
        ]


def has_units(dim: Dim) -> bool:
    """Whether places along a dim belong to a group."""
    return any(isinstance(factor, str) for segment in dim for factor in segment)


def symmetry_of(found: Trace, unused: Sequence[str] = ()) -> Symmetry:
    """The specification that a trace amounts to.

    Args:
        found: of one run.
        unused: names of tensors that the run did not touch; they stay.
    """
    for name in unused:
        for axis in found.held[name]:
            pin(axis)
    _settle(found)
    names: dict[int, str] = {}
    axes: dict[str, Axis] = {}
    for name, held in found.held.items():
        for axis in held:
            own = list(free([axis]))
            for number, leaf in enumerate(own):
                if id(leaf) not in names:
                    label = name.removesuffix(".weight")
                    label = f"{label}[{number}]" if len(own) > 1 else label
                    count = sum(one.partition(" ")[0] == label for one in axes)
                    names[id(leaf)] = label if not count else f"{label} {count + 1}"
                    axes[names[id(leaf)]] = leaf
    dims = {name: tuple(_dim(axis, names) for axis in held) for name, held in found.held.items()}
    inside = _inside(found, names, dims)
    order = sorted(axes, key=lambda name: len(inside[name]))
    groups = {name: Group(find(axes[name]).size, inside[name]) for name in order}
    notes = []
    if unused:
        notes.append(
            f"{len(unused)} tensors play no part in the run and stay as they are, first {unused[0]!r}"
        )
    if found.unknown:
        notes.append(
            f"axes that meet in {', '.join(sorted(found.unknown))} keep their order, as these operators are not known"
        )
    features = {}
    for layer, held in found.outputs.items():
        features[layer] = tuple(_dim(axis, names) for axis in held)
    return Symmetry(groups, dims, frozenset(found.consumed), tuple(notes), features)


def _settle(found: Trace) -> None:
    """Pin concatenations within products, unless nothing in them can move: their positions do not lie together."""

    def visit(axis: Axis, within: bool) -> None:
        axis = find(axis)
        if axis.kind == "concat" and within:
            pin(axis)
        for part in axis.parts:
            visit(part, within or axis.kind == "product")

    for held in (*found.held.values(), *found.outputs.values()):
        for axis in held:
            visit(axis, False)


def _dim(axis: Axis, names: Mapping[int, str]) -> Dim:
    """The segments of an axis."""
    axis = find(axis)
    if axis.kind == "concat":
        return tuple(segment for part in axis.parts for segment in _dim(part, names))
    factors: list[Factor] = []
    for leaf in factors_of(axis):
        if id(leaf) in names and not leaf.pinned:
            factors.append(names[id(leaf)])
        elif factors and isinstance(factors[-1], int):
            factors[-1] *= leaf.size
        else:
            factors.append(leaf.size)
    return (tuple(factors) or (1,),)


def _inside(
    found: Trace, names: Mapping[int, str], dims: Mapping[str, tuple[Dim, ...]]
) -> dict[str, tuple[str, ...]]:
    """Of every group those that it may depend on: they are there wherever it is, and are never brought together beside it."""
    always: dict[str, set[str]] = {}

    def known(held: Iterable[Axis]) -> set[str]:
        return {names[id(leaf)] for leaf in free(held) if id(leaf) in names}

    for met in found.meetings:
        here = known(met)
        for one in here:
            always[one] = always.get(one, here) & here - {one}
    for summed, others in found.mixed:
        gone = known(summed)
        for one in known(others) - gone:
            always[one] -= gone
    rank: dict[str, int] = {}
    for held in dims.values():
        for dim in held:
            for segment in dim:
                for place, factor in enumerate(segment):
                    if isinstance(factor, str):
                        rank.setdefault(factor, place)
                        always[factor] &= {other for other in segment if isinstance(other, str)}
    for one, outer in always.items():
        always[one] = {other for other in outer if one not in always[other] or rank[other] < rank[one]}
    # one level: units in heads; what lies deeper is permuted alike in all that lies between
    top = {one for one, outer in always.items() if not outer}
    found_in = {one: sorted(outer & top, key=lambda other: rank[other])[:1] for one, outer in always.items()}
    return {one: tuple(outer) for one, outer in found_in.items() if one in rank}
