"""Two models of one architecture side by side, by the names of their module."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.moved import Movement
from gradmatch.models.structure import structure
from gradmatch.models.views import by_module
from gradmatch.rebasin.matching import Pairs, moved
from gradmatch.rebasin.symmetry import Member, Symmetry, has_units

if TYPE_CHECKING:
    from torch import Tensor

NUMBERED = re.compile(r"(?:^|\.)\d+\.")  # a tensor of a layer
KEPT = 128  # tensors whose index is remembered


@dataclass(frozen=True)
class Two:
    """Two models of one architecture, by the names of their module.

    Attributes:
        own: the one that is moved, under the target's names.
        target: whose order it gets.
        symmetry: of the moved one.
    """

    own: Checkpoint
    target: Checkpoint
    symmetry: Symmetry

    def __post_init__(self) -> None:
        known = structure(self.own) or structure(self.target)
        tables = [by_module(one, known) for one in (self.own, self.target)]
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "known", known)

    tables: list[Checkpoint] = field(init=False)
    known: Any = field(init=False)

    def other_width(self) -> str:
        """The first tensor whose units are of another number in the two; "" where all fit.

        Raises:
            ValueError: models that are not of one architecture; the first tensor that one lacks.
        """
        own, target = self.tables
        for one, other, whose in ((target, own, self.own.where), (own, target, self.target.where)):
            lacking = [name for name in one if name not in other and NUMBERED.search(name)]  # not heads
            if lacking:
                raise GradmatchError(
                    f"{whose} lacks {lacking[0]!r}, which the other model has ({len(lacking)} such tensors): models of different depths "
                    "have no units that correspond, by no method; give models of one architecture",
                    "shape_mismatch",
                    lacking[0],
                )
        for name, dims in self.symmetry.dims.items():
            if name not in own or name not in target:
                continue
            ours, theirs = own.spec(name).shape, target.spec(name).shape
            if len(ours) != len(theirs):
                raise GradmatchError(
                    f"{name!r} has shape {list(ours)} in {self.own.where} and {list(theirs)} in {self.target.where}; give models of one "
                    "architecture",
                    "shape_mismatch",
                    name,
                )
            units = [has_units(dim) for dim in dims]
            if any(u and a != b for u, a, b in zip(units, ours, theirs, strict=True)):
                return name
        return ""

    @property
    def shared(self) -> list[str]:
        """The parameters of both models that have units: not buffers."""
        own, target = self.tables
        buffers = self.known.buffers if self.known is not None else set()
        return [
            name
            for name, dims in self.symmetry.dims.items()
            if any(map(has_units, dims)) and name in own.store and name in target and name not in buffers
        ]

    @property
    def weights(self) -> Pairs:
        """The parameters that have units, for matching: not buffers, and not heads that differ in shape."""
        own, target = self.tables
        names = [name for name in self.shared if own.spec(name).shape == target.spec(name).shape]
        return Pairs(self.symmetry, names, lambda name: (target[name].float(), own[name].float()))

    def distance(self, member: Member | None) -> float:
        """||target - own, moved|| / ||target||."""
        gap = size = 0.0
        pairs = self.weights
        for name in pairs.names:
            to, own = pairs.read(name)
            own = own if member is None else moved(own, self.symmetry.index(member, name))
            gap += float((to - own).double().square().sum())
            size += float(to.double().square().sum())
        return float((gap / max(size, 1e-300)) ** 0.5)

    def view(self, member: Member) -> Checkpoint:
        """The moved model, under the target's names.

        Raises:
            ValueError: see `moved_by`.
        """
        return self.moved_by(lambda name: self.symmetry.index(member, name), exact=True)

    def moved_by(self, ways: Callable[[str], list[Tensor | None]], exact: bool) -> Checkpoint:
        """The model with each tensor's dims moved in these ways.

        Raises:
            ValueError: a tensor that is stored within others, stacked or fused by the file's layout.
        """
        names = self.known.names(self.own).plain if self.known is not None else {n: n for n in self.own}
        table = {name: name for name in self.symmetry.dims}
        for name in self.symmetry.dims:
            if name in names:
                table[self.own.aliases.get(names[name], names[name])] = name
            elif name in self.tables[0].store and any(way is not None for way in ways(name)):
                raise GradmatchError(
                    f"{self.own.where}: {name!r} is stored within other tensors (stacked or split), where its units cannot be moved one by "
                    "one; give the model as a module",
                    "bad_model",
                    name,
                )
        movement = Movement(lru_cache(KEPT)(ways), self.own, table, self.symmetry.consumed, exact)
        return self.own.seen(movement.view(self.own.store), movement=movement)
