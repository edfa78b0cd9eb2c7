"""Soft correspondences: how much of each unit is carried to each other one (Singh & Jaggi 2020, OT fusion).

Between models of one width the plan is made hard, as a soft one changes the function; between models of different widths
units are split and averaged by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rebasin.matching import Match, Problem, assign
from gradmatch.rebasin.symmetry import Dim, Member, Symmetry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

REGULARISATION = 0.1  # entropy, in standard deviations of the scores
ROUNDS, PRECISION = 200, 1e-5  # of Sinkhorn's scaling
EXACT = 2048  # units after which an exact plan between two widths costs too much
SWEEPS = 4  # over groups of other widths

Map = tuple[
    "Tensor", "Tensor"
]  # incoming (n_to, n_own), rows sum to 1; outgoing (n_to, n_own), columns sum to 1


@dataclass(frozen=True)
class Plan:
    """Mass carried from the units of one model (columns) to those of another (rows), each with uniform weight.

    Attributes:
        plan: (n_to, n_own), sums to 1.
        row_error: the largest relative error of a row's sum.
        column_error: of a column's sum.
        rounds: of scaling.
    """

    plan: Tensor
    row_error: float
    column_error: float
    rounds: int


def sinkhorn(score: Tensor, regularisation: float = REGULARISATION) -> Plan:
    """The plan of the largest sum of scores plus entropy, by scaling rows and columns in logarithms (Cuturi 2013).

    Args:
        score: (n_to, n_own), larger is nearer; its scale plays no role.
        regularisation: of the entropy, in standard deviations of the scores: the smaller, the harder the plan.

    >>> found = sinkhorn(torch.tensor([[2.0, 0.0], [0.0, 2.0]]) * 1e4)
    >>> found.plan.round(decimals=3)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    x = score.double()
    spread = float(x.std()) if x.numel() > 1 else 0.0
    log_k = (x - x.max()) / (regularisation * spread) if spread > 0 else torch.zeros_like(x)
    rows, columns = (-math.log(count) for count in x.shape)
    u, v = torch.zeros(x.shape[0], 1).double(), torch.zeros(1, x.shape[1]).double()
    row_error, done = math.inf, 0
    while row_error > PRECISION and done < ROUNDS:
        done += 1
        u = rows - (log_k + v).logsumexp(1, keepdim=True)
        v = columns - (log_k + u).logsumexp(0, keepdim=True)
        row_error = float(((log_k + u + v).logsumexp(1) - rows).exp().sub(1).abs().max())
    plan = (log_k + u + v).exp()
    column_error = float((plan.sum(0) * x.shape[1] - 1).abs().max())
    return Plan(plan, row_error, column_error, done)


class Hardened:
    """Assignments by transport: the plan's scores made hard; remembers the largest error of a plan.

    >>> hard = Hardened()
    >>> hard(torch.tensor([[0.0, 1.0], [1.0, 5.0]]))
    tensor([0, 1])
    """

    def __init__(self) -> None:
        self.row_error = self.column_error = 0.0

    def __call__(self, score: Tensor) -> Tensor:
        """The column of every row."""
        found = sinkhorn(score)
        self.row_error = max(self.row_error, found.row_error)
        self.column_error = max(self.column_error, found.column_error)
        return assign(found.plan)


def exact_plan(score: Tensor) -> Tensor:
    """The plan of the largest sum of scores between uniform weights: an assignment of copies of the units; Sinkhorn's beyond EXACT.

    >>> exact_plan(torch.tensor([[1.0], [0.0]]))
    tensor([[0.5000],
            [0.5000]])
    """
    to, own = score.shape
    copies = math.lcm(to, own)
    if copies > EXACT:
        return sinkhorn(score).plan.float()
    spread = score.repeat_interleave(copies // to, 0).repeat_interleave(copies // own, 1)
    columns = assign(spread) // (copies // own)
    plan = torch.zeros(to, own)
    plan.index_put_(
        (torch.arange(copies) // (copies // to), columns), torch.tensor(1.0 / copies), accumulate=True
    )
    return plan


def maps_of(plan: Tensor) -> Map:
    """What a plan does with incoming weights (averaged over the units that come here) and outgoing ones (split)."""
    return plan * plan.shape[0], plan * plan.shape[1]


@dataclass
class Widths:
    """Two models of one architecture whose widths differ: their symmetries have the same groups, of other sizes.

    Args:
        to: of the target.
        own: of the model that is carried over.
        names: of the tensors that are compared.
        read: name -> that tensor of both.
    """

    to: Symmetry
    own: Symmetry
    names: Sequence[str]
    read: Callable[[str], tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        """Which groups differ.

        Raises:
            ValueError: heads of other numbers or sizes, or networks that are not built alike.
        """
        for name, known in self.to.groups.items():
            other = self.own.groups.get(name)
            if other is None or other.inside != known.inside or self.to.dims.keys() != self.own.dims.keys():
                raise GradmatchError(
                    f"the units of {name!r} have no counterpart in the other model: the two are not built alike, and widths alone may differ",
                    "shape_mismatch",
                    name,
                )
        self.soft = {
            name for name, known in self.to.groups.items() if known.size != self.own.groups[name].size
        }
        headed = {name for name, known in self.to.groups.items() if known.inside} | {
            outer for known in self.to.groups.values() for outer in known.inside
        }
        if both := sorted(self.soft & headed):
            raise GradmatchError(
                f"heads ({both[0]!r}) of {self.own.groups[both[0]].size} and {self.to.groups[both[0]].size} units: attention is carried "
                "over between models with heads of one number and size alone, which may differ in their hidden and inner widths",
                "shape_mismatch",
                both[0],
            )
        self.maps: dict[str, Map] = {}
        self.member: Member = self.own.identity()

    def ways(self, name: str) -> list[Tensor | None]:
        """How each dim of a tensor is carried over: an index, a matrix (n_to, n_own), or nothing."""
        index = self.own.index(self.member, name)
        found: list[Tensor | None] = []
        for dim, segments in enumerate(self.own.dims[name]):
            if not any(factor in self.soft for segment in segments for factor in segment):
                found.append(index[dim])
                continue
            outgoing = (name, dim) in self.own.consumed
            parts = [self._matrix(segment, outgoing) for segment in segments]
            found.append(torch.block_diag(*parts))  # type: ignore[no-untyped-call]
        return found

    def _matrix(self, segment: Sequence[str | int], outgoing: bool) -> Tensor:
        made = torch.ones(1, 1)
        for factor in segment:
            if isinstance(factor, str) and factor in self.soft:
                part = self.maps[factor][outgoing]
            elif isinstance(factor, str):
                part = torch.eye(self.own.size(factor))[self.member[factor]]
            else:
                part = torch.eye(factor)
            made = torch.kron(made, part)
        return made

    def _open(self, dims: Sequence[Dim], but: str = "") -> bool:
        """Whether a tensor has a group of other widths that is not mapped yet."""
        factors = {factor for dim in dims for segment in dim for factor in segment}
        return any(factor in self.soft and factor not in self.maps and factor != but for factor in factors)

    def carry(self) -> Match:
        """Find maps and orders, group by group from the inputs on, until they stay."""
        tops = [name for name, group in self.to.groups.items() if not group.inside]
        sweeps, settled = 0, False
        while not settled and sweeps < SWEEPS:
            sweeps, settled = sweeps + 1, True
            for top in tops:
                before = self.maps.get(top), {k: v.clone() for k, v in self.member.items()}
                self._visit(top)
                old = before[0]
                if top in self.soft:
                    settled &= old is not None and torch.allclose(old[0], self.maps[top][0])
                else:
                    settled &= all(torch.equal(self.member[k], v) for k, v in before[1].items())
        inner = ours = theirs = 0.0
        for name in self.names:
            to, own = self.read(name)
            carried = _along(own, self.ways(name))
            inner += float((to * carried).sum(dtype=torch.float64))
            ours, theirs = (
                ours + float(carried.double().square().sum()),
                theirs + float(to.double().square().sum()),
            )
        return Match(self.member, inner / max((ours * theirs) ** 0.5, 1e-30), math.nan, sweeps, settled)

    def _visit(self, top: str) -> None:
        """One group, with all others held."""
        inner = [name for name, group in self.to.groups.items() if top in group.inside]
        mine = {top, *inner}
        score, pieces, twice = None, [], False
        for name in self.names:
            dims = self.to.dims[name]
            places = [place for place, dim in enumerate(dims) if any(mine & set(segment) for segment in dim)]
            if not places or self._open(dims, top):
                continue
            to, own = self.read(name)
            for place in places:
                ways = [None if dim == place else way for dim, way in enumerate(self._others(name, place))]
                if top not in self.soft:
                    known = replace(self.own, dims={name: dims}, groups=self.to.groups)
                    found = Problem.cut(known, name, place, top, inner, to, _along(own, ways))
                    pieces += found
                    continue
                if any(len(segment) > 1 for segment in dims[place]) or len(dims[place]) > 1:
                    continue  # a map of this group follows from its other tensors
                a, b = (x.movedim(place, 0).reshape(x.shape[place], -1) for x in (to, _along(own, ways)))
                gap = -(torch.cdist(a[None], b[None])[0].square())
                score = gap if score is None else score + gap
        if top in self.soft:
            sizes = self.to.groups[top].size, self.own.groups[top].size
            self.maps[top] = maps_of(exact_plan(score if score is not None else torch.zeros(*sizes)))
        elif pieces:
            self.member |= Problem(top, inner, pieces, twice).solve(self.member, assign, first=False)[0]

    def _others(self, name: str, place: int) -> list[Tensor | None]:
        """`ways` of all dims but one, whose groups may not be mapped yet."""
        known = dict(self.maps.items())
        missing = {
            factor
            for segment in self.own.dims[name][place]
            for factor in segment
            if factor in self.soft and factor not in known
        }
        for factor in missing:
            sizes = self.to.groups[str(factor)].size, self.own.groups[str(factor)].size
            self.maps[str(factor)] = maps_of(torch.full(sizes, 1.0 / (sizes[0] * sizes[1])))
        found = self.ways(name)
        for factor in missing:
            del self.maps[str(factor)]
        return found


def _along(values: Tensor, ways: Sequence[Tensor | None]) -> Tensor:
    """A tensor with each dim carried over."""
    for dim, way in enumerate(ways):
        if way is None:
            continue
        if way.dim() == 1:
            values = values.index_select(dim, way)
        else:
            values = torch.tensordot(way.to(values), values, dims=([1], [dim])).movedim(0, dim)
    return values
