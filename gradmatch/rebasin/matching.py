"""Which unit of one model is which of another: coordinate descent over the groups of a specification, one assignment each.

Ainsworth et al. 2023 (weight matching): maximise sum over tensors <to, moved model>. With all other groups held, one group's
permutation is a linear assignment. Of heads every pair is compared with the best order of the units inside, which is an
assignment too; at first by their products Q K' and O V, which no order (and no basis) inside the head changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment

from gradmatch.rebasin.symmetry import Factor, Member, Symmetry

if TYPE_CHECKING:
    from torch import Tensor

SWEEPS = 100
GAIN = 1e-9  # of the whole, below which a sweep has changed nothing
ROUNDS = 5  # over groups that meet inside one head


@dataclass(frozen=True)
class Match:
    """A matching, and how it was come by.

    Attributes:
        member: the old position of every new unit, by group.
        cosine: of the two models over all tensors that were compared, after it.
        before: the same without it.
        sweeps: of the coordinate descent.
        converged: whether a sweep changed nothing.
    """

    member: Member
    cosine: float
    before: float
    sweeps: int
    converged: bool


@dataclass(frozen=True)
class Pairs:
    """What is compared: tensors of both models by name, with the places of their groups.

    Attributes:
        symmetry: whose dims name the tensors.
        names: of those that are compared.
        read: name -> that tensor of the target and of the model that is moved, float32, of one shape.
        products: whether heads are at first compared by their products, which weights have and activations have not.
    """

    symmetry: Symmetry
    names: Sequence[str]
    read: Callable[[str], tuple[Tensor, Tensor]]
    products: bool = True

    def overlap(self, member: Member | None) -> tuple[float, float]:
        """(inner product, product of norms) of the target and the model moved by a member."""
        inner = ours = theirs = 0.0
        for name in self.names:
            to, own = self.read(name)
            own = own if member is None else moved(own, self.symmetry.index(member, name))
            inner += float((to.double() * own.double()).sum())
            ours, theirs = (
                ours + float(own.double().square().sum()),
                theirs + float(to.double().square().sum()),
            )
        return inner, (ours * theirs) ** 0.5


def moved(values: Tensor, ways: Sequence[Tensor | None]) -> Tensor:
    """A tensor with its positions moved."""
    for dim, way in enumerate(ways):
        values = values if way is None else values.index_select(dim, way)
    return values


def assign(score: Tensor) -> Tensor:
    """For every row the column, each once, with the largest sum of scores.

    >>> assign(torch.tensor([[0.0, 1.0], [1.0, 5.0]]))
    tensor([0, 1])
    """
    _, columns = linear_sum_assignment(score.double().numpy(), maximize=True)
    return torch.from_numpy(columns)


def match(
    pairs: Pairs,
    *,
    seed: int | None = None,
    start: Member | None = None,
    solve: Callable[[Tensor], Tensor] = assign,
) -> Match:
    """Permute a model's units so that it comes near to another.

    Args:
        pairs: what is compared.
        seed: of the order in which groups are visited; None: their own.
        start: a member to begin with; None: the identity.
        solve: score (n, n) -> the column of every row.
    """
    symmetry = pairs.symmetry
    member = dict(start) if start else symmetry.identity()
    before, size = pairs.overlap(None)
    tops = [name for name, group in symmetry.groups.items() if not group.inside]
    holding = {top: _held(pairs, top) for top in tops}
    neighbours = {a: {b for b in tops if b != a and set(holding[a]) & set(holding[b])} for a in tops}
    generator = torch.Generator().manual_seed(seed or 0)
    waiting, visited, sweeps = set(tops), set(), 0
    while waiting and sweeps < SWEEPS:
        sweeps += 1
        order = tops if seed is None else [tops[i] for i in torch.randperm(len(tops), generator=generator)]
        for top in order:
            if top not in waiting:
                continue
            waiting.discard(top)
            problem = Problem.of(pairs, top, holding[top], member)
            found, gain = problem.solve(
                member, solve, first=pairs.products and top not in visited and start is None
            )
            visited.add(top)
            if gain > GAIN * max(size, 1e-30):
                member |= found
                waiting |= neighbours[top] | ({top} if problem.twice else set())
    inner, _ = pairs.overlap(member)
    if inner < before and start is None:
        member, inner = symmetry.identity(), before  # nothing found is nearer than what was there
    return Match(member, inner / max(size, 1e-30), before / max(size, 1e-30), sweeps, not waiting)


def _held(pairs: Pairs, top: str) -> list[str]:
    """The tensors that a group, or one inside it, moves."""
    own = {top, *(name for name, group in pairs.symmetry.groups.items() if top in group.inside)}
    dims = pairs.symmetry.dims
    return [name for name in pairs.names if any(own & set(segment) for dim in dims[name] for segment in dim)]


@dataclass
class Piece:
    """One tensor's share of a problem: to and own (units, *inner, rest); inner are the groups inside, side is whose products it makes."""

    to: Tensor
    own: Tensor
    inner: tuple[str, ...]
    side: str


@dataclass
class Problem:
    """One group, with those inside it, while all others are held."""

    top: str
    inner: list[str]
    pieces: list[Piece]
    twice: bool  # a tensor has the group in two dims: its best order depends on the present one

    @classmethod
    def of(cls, pairs: Pairs, top: str, names: Sequence[str], member: Member) -> Problem:
        """Cut the tensors that a group moves into its units, the model's moved by everything else."""
        symmetry = pairs.symmetry
        inner = [name for name, group in symmetry.groups.items() if top in group.inside]
        own = {top, *inner}
        still = {**member, **{name: symmetry.identity()[name] for name in own}} if own else member
        pieces, twice = [], False
        for name in names:
            to, value = pairs.read(name)
            places = [
                place for place, dim in enumerate(symmetry.dims[name]) if any(own & set(s) for s in dim)
            ]
            twice = twice or len(places) > 1
            current, held = symmetry.index(member, name), symmetry.index(still, name)
            for place in places:
                ways = [held[dim] if dim == place else way for dim, way in enumerate(current)]
                pieces += cls.cut(symmetry, name, place, top, inner, to, moved(value, ways))
        return cls(top, inner, pieces, twice)

    @staticmethod
    def cut(
        symmetry: Symmetry, name: str, place: int, top: str, inner: Sequence[str], to: Tensor, own: Tensor
    ) -> list[Piece]:
        """The segments of one dim that hold a group, with its units first and those of the groups inside next."""
        found, start = [], 0
        for segment in symmetry.dims[name][place]:
            sizes = [symmetry.size(factor) for factor in segment]
            length = prod(sizes)
            if top in segment:
                parts = tuple(factor for factor in segment if factor in inner)
                ours, theirs = (
                    _units(x.narrow(place, start, length), place, segment, sizes, top, parts)
                    for x in (to, own)
                )
                side = f"{name.rpartition('.')[0]}:{place * start}"
                found.append(Piece(ours, theirs, tuple(str(part) for part in parts), side))
            start += length
        return found

    def solve(self, member: Member, solve: Callable[[Tensor], Tensor], first: bool) -> tuple[Member, float]:
        """The best orders, and what they gain over the present ones."""
        direct = [piece for piece in self.pieces if not piece.inner]
        units = self.pieces[0].to.shape[0] if self.pieces else 0
        if not units:
            return {}, 0.0
        score = torch.zeros(units, units)
        for piece in direct:
            score += piece.to.reshape(units, -1) @ piece.own.reshape(units, -1).T
        if not self.inner:
            order = solve(score)
            rows = torch.arange(units)
            return {self.top: order}, float(score[rows, order].sum() - score[rows, member[self.top]].sum())
        inside = [piece for piece in self.pieces if piece.inner]
        best = [[self._inside(inside, i, j, solve) for j in range(units)] for i in range(units)]
        exact = score + torch.tensor([[value for value, _ in row] for row in best])
        order = solve(self._products(direct, inside) if first else exact)
        now = float(sum(score[i, j] for i, j in enumerate(member[self.top].tolist())))
        now += sum(self._at(inside, i, int(member[self.top][i]), member) for i in range(units))
        found = {self.top: order}
        for name in self.inner:
            found[name] = torch.stack([best[i][j][1][name] for i, j in enumerate(order.tolist())])
        return found, float(exact[torch.arange(units), order].sum()) - now

    def _inside(
        self, pieces: Sequence[Piece], i: int, j: int, solve: Callable[[Tensor], Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """The value of putting unit j in the place of i, and the best orders inside."""
        orders = {name: torch.arange(self._size(name)) for name in self.inner}
        alone = [name for name in self.inner if all(p.inner == (name,) for p in pieces if name in p.inner)]
        value = 0.0
        for name in alone:
            score = sum((p.to[i] @ p.own[j].T for p in pieces if name in p.inner), torch.zeros(()))
            orders[name] = solve(score)
            value += float(score[torch.arange(len(score)), orders[name]].sum())
        together = [name for name in self.inner if name not in alone]
        mixed = [piece for piece in pieces if any(name in together for name in piece.inner)]
        last = -float("inf")
        for _ in range(ROUNDS if together else 0):
            for name in together:
                score = torch.zeros(self._size(name), self._size(name))
                for p in (p for p in mixed if name in p.inner):
                    place = p.inner.index(name)
                    ways = [None if dim == place else orders[one] for dim, one in enumerate(p.inner)]
                    own = moved(p.own[j], [*ways, None]).movedim(place, 0).flatten(1)
                    score += p.to[i].movedim(place, 0).flatten(1) @ own.T
                orders[name] = solve(score)
                total = float(score[torch.arange(len(score)), orders[name]].sum())
            if total <= last:
                break
            last = total
        for p in mixed:
            value += float((p.to[i] * moved(p.own[j], [*(orders[name] for name in p.inner), None])).sum())
        return value, orders

    def _at(self, pieces: Sequence[Piece], i: int, j: int, member: Member) -> float:
        """The value of the present orders."""
        total = 0.0
        for p in pieces:
            total += float((p.to[i] * moved(p.own[j], [*(member[name][i] for name in p.inner), None])).sum())
        return total

    def _size(self, name: str) -> int:
        return next(p.to.shape[1 + p.inner.index(name)] for p in self.pieces if name in p.inner)

    def _products(self, direct: Sequence[Piece], inside: Sequence[Piece]) -> Tensor:
        """Cosines of heads by what no order inside them changes: <A_i B_i', A_j B_j'> for two sides, norms else."""
        units = self.pieces[0].to.shape[0]
        score = torch.zeros(units, units)
        for piece in direct:
            to, own = piece.to.reshape(units, -1), piece.own.reshape(units, -1)
            score += _cosines(to @ own.T, to.square().sum(1), own.square().sum(1))
        for name in self.inner:
            sides: dict[str, list[Tensor]] = {}
            for p in (p for p in inside if name in p.inner):
                place = 1 + p.inner.index(name)
                to, own = (x.movedim(place, 1).flatten(2) for x in (p.to, p.own))
                grams = sides.setdefault(p.side, [torch.zeros(())] * 3)
                for k, (a, b) in enumerate(((to, own), (to, to), (own, own))):
                    grams[k] = grams[k] + torch.einsum("ikr,jlr->ijkl", a, b)
            if len(sides) == 2:
                (ab, aa, bb), (cd, cc, dd) = sides.values()
                inner = (ab * cd).sum((2, 3))
                ours = (aa.diagonal(dim1=0, dim2=1) * cc.diagonal(dim1=0, dim2=1)).sum((0, 1))
                theirs = (bb.diagonal(dim1=0, dim2=1) * dd.diagonal(dim1=0, dim2=1)).sum((0, 1))
                score += _cosines(inner, ours, theirs)
            else:
                for _, aa, bb in sides.values():
                    ours, theirs = (torch.einsum("iikk->ik", g).sort(1).values for g in (aa, bb))
                    score += _cosines(ours @ theirs.T, ours.square().sum(1), theirs.square().sum(1))
        return score


def _cosines(inner: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    return inner / (ours[:, None] * theirs[None, :]).clamp(min=1e-30).sqrt()


def _units(
    values: Tensor,
    place: int,
    segment: Sequence[Factor],
    sizes: Sequence[int],
    top: str,
    inner: Sequence[Factor],
) -> Tensor:
    """(units, *inner, rest) of a slice."""
    shape = values.shape
    values = values.reshape(*shape[:place], *sizes, *shape[place + 1 :])
    front = [place + segment.index(factor) for factor in (top, *inner)]
    values = values.movedim(front, list(range(len(front))))
    return values.flatten(len(front)) if values.dim() > len(front) else values.unsqueeze(-1)


def by_names(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> Callable[[str], tuple[Tensor, Tensor]]:
    """A reader of two mappings, in float32."""
    return lambda name: (first[name].float(), second[name].float())
