"""ZipIt! (Stoica et al. 2024): two models of different tasks merged unit by unit up to a layer, behind which each keeps its own.

Units are joined by what they say on data, between the models or within one, most alike first, until as many remain as one
model has. What was joined is averaged where it is made, and given to both where it is used; layers that are not zipped stay
apart, so that a result has a tail, and a head, for each model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.views import like
from gradmatch.rebasin.activations import features, place_of
from gradmatch.rebasin.pair import Two
from gradmatch.rebasin.probing import batches_of, calls_of, module_with, symmetry_of_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.task import Model
    from gradmatch.rebasin.symmetry import Dim, Symmetry


@dataclass(frozen=True)
class Joined:
    """Which units were joined.

    Attributes:
        merge: (n, 2 n), each remaining unit's mean of those that it was joined from; rows sum to 1 unless a unit is dead.
        unmerge: (2 n, n), 1 where a unit is given the remaining one that it went into.
        score: mean correlation of what was joined, dead units left out.
        within: joints inside one model.
        dead: units that say nothing, which were joined with one another.
    """

    merge: Tensor
    unmerge: Tensor
    score: float
    within: int
    dead: int


def join(correlation: Tensor, a: float = 0.3, b: float = 0.125) -> Joined:
    """Join the most alike of 2 n units of two models, again and again, until n remain.

    Args:
        correlation: (2 n, 2 n) of the units of one model, then of the other; 0 on the diagonal of dead units. It is not changed.
        a: joined units are as like others as the least like of theirs, times this; 0: nothing is joined twice.
        b: of the joints, the share that may lie within each model.

    >>> x = torch.tensor([[1.0, 0.1, 0.9, 0.0], [0.1, 1.0, 0.0, 0.9], [0.9, 0.0, 1.0, 0.1], [0.0, 0.9, 0.1, 1.0]])
    >>> found = join(x)
    >>> round(found.score, 3), found.within, found.merge.tolist()
    (0.9, 0, [[0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]])
    """
    total = len(correlation)
    n = total // 2
    like_each = correlation.double().clone()
    dead = correlation.diagonal() <= 0
    like_each.fill_diagonal_(-torch.inf)
    both_dead = dead[:, None] & dead[None, :]
    like_each[dead[:, None] ^ dead[None, :]] = -2.0  # a living unit is joined with a dead one last of all
    like_each[both_dead & ~torch.eye(total, dtype=torch.bool)] = 2.0  # and dead ones with one another first
    sets = [{i} for i in range(total)]
    alive = torch.ones(total, dtype=torch.bool)
    limit, used = int((total - n) // 2 * b), [0, 0]
    scores: list[float] = []
    within = 0
    barred: dict[tuple[int, int], bool] = {}
    while int(alive.sum()) > n:
        flat = int(like_each.argmax())
        i, j = sorted((flat // total, flat % total))
        owners = {unit < n for unit in sets[i] | sets[j]}
        if len(owners) == 1 and not bool(both_dead[i, j]):
            side = 0 if True in owners else 1
            if used[side] >= limit and (i, j) not in barred:
                barred[i, j] = True
                like_each[i, j] = like_each[j, i] = -3.0  # only where nothing else is left
                continue
            used[side] += 1
            within += 1
        if not bool(dead[list(sets[i] | sets[j])].any()):
            scores.append(float(correlation[sorted(sets[i])][:, sorted(sets[j])].mean()))
        sets[i] |= sets[j]
        alive[j] = False
        less = torch.minimum(like_each[i], like_each[j])
        less = torch.where(less > 0, less * a, less) if a > 0 else torch.full_like(less, -3.0)
        less[~alive] = -torch.inf
        less[i] = -torch.inf
        like_each[i], like_each[:, i] = less, less
        like_each[j], like_each[:, j] = -torch.inf, -torch.inf
    kept = [sets[i] for i in range(total) if alive[i]]
    merge, unmerge = torch.zeros(n, total), torch.zeros(total, n)
    for row, units in enumerate(kept):
        merge[row, sorted(units)] = 1 / len(units)
        unmerge[sorted(units), row] = 1
    return Joined(merge, unmerge, sum(scores) / max(1, len(scores)), within, int(dead.sum()))


@dataclass(frozen=True)
class Zipped:
    """Two models with a common trunk.

    Attributes:
        first, second: tensors of either, by the names of the module; `shared` ones are the same in both.
        shared: names of the tensors of the trunk.
        joined: group -> what was joined.
    """

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    shared: tuple[str, ...]
    joined: Mapping[str, Joined] = field(default_factory=dict)

    def summary(self) -> str:
        """For people."""
        lines = [
            f"zipped {len(self.joined)} groups of units; {len(self.shared)} of {len(self.first)} tensors are shared"
        ]
        for name, one in self.joined.items():
            lines.append(
                f"{name}: mean correlation {one.score:.2f}, {one.within} joints within a model, {one.dead} dead units"
            )
        return "\n".join(lines)


def zipit(
    a_model: Model | Checkpoint,
    b_model: Model | Checkpoint,
    data: Iterable[Any],
    until: int | None = None,
    *,
    a: float = 0.3,
    b: float = 0.125,
    spec: Symmetry | None = None,
) -> Zipped:
    """Merge two models of one architecture and of different tasks up to a layer, with a tail and a head for each.

    Args:
        a_model: the first.
        b_model: the second; other numbers of classes are allowed.
        data: batches of both tasks.
        until: so many groups of units, from the inputs on, are joined; None: all.
        a: see `join`.
        b: see `join`.
        spec: the symmetry, where it is known.

    Returns:
        `.first`, `.second`: weights of either with the common trunk. BatchNorm statistics are averaged: measure them again.

    Raises:
        ValueError: models of other architectures or widths; groups inside others (heads of attention), which cannot be joined.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> found = zipit(net, net, [torch.randn(50, 2)])
    >>> found.shared, torch.allclose(found.first["2.weight"] @ found.first["0.weight"], net[2].weight @ net[0].weight)
    (('0.weight', '0.bias'), True)
    """
    calls = calls_of(list(batches_of(data)))
    first = open_checkpoint(a_model)
    second = like(open_checkpoint(b_model, base=first), first)
    symmetry = spec or symmetry_of_checkpoint(first, calls[0])
    pair = Two(second, first, symmetry)
    if wide := pair.other_width():
        raise GradmatchError(
            f"{wide!r} has other widths in the two models; zipping joins models of one width",
            "shape_mismatch",
            wide,
        )
    order = [name for name, group in symmetry.groups.items() if not group.inside]
    heads = {outer for group in symmetry.groups.values() for outer in group.inside}
    chosen = order[: len(order) if until is None else until]
    if until is not None and not 0 < until <= len(order):
        raise GradmatchError(
            f"until is {until}; the models have {len(order)} groups of units to be joined",
            "out_of_range",
            "until",
        )
    if stuck := next((name for name in chosen if name in heads), None):
        raise GradmatchError(
            f"{stuck!r} are heads, with units inside; zipping joins units one by one, which heads are not: stop before them (until=...)",
            "bad_spec",
            stuck,
        )
    spoken = [
        features(module_with(model, one), symmetry, calls, one.where)
        for model, one in ((a_model, first), (b_model, second))
    ]
    joined = {}
    for name in chosen:
        layers = [
            layer for layer in spoken[0].values
            if (place := place_of(symmetry.features[layer])) is not None and symmetry.features[layer][place] == ((name,),)
        ]  # fmt: skip
        if not layers:
            raise GradmatchError(
                f"no layer tells what the units of {name!r} say; stop before them (until=...)",
                "bad_spec",
                name,
            )
        x = (
            torch.cat([torch.cat([one.values[layer] for one in spoken]) for layer in layers], 1)
            / len(layers) ** 0.5
        )
        joined[name] = join(x @ x.T, a, b)
    tables = [pair.tables[1], pair.tables[0]]
    results: list[dict[str, Tensor]] = [{}, {}]
    shared = []
    for name, dims in symmetry.dims.items():
        if name not in tables[0] or name not in tables[1]:
            continue
        values = [_zipped(tables[k][name], name, dims, joined, symmetry, k) for k in (0, 1)]
        makes = any(
            factor in joined and (name, dim) not in symmetry.consumed
            for dim, segments in enumerate(dims) for segment in segments for factor in segment
        )  # fmt: skip
        if makes:
            shared.append(name)
            values = [values[0] + values[1]] * 2
        for result, value in zip(results, values, strict=True):
            result[name] = value
    return Zipped(results[0], results[1], tuple(shared), joined)


def _zipped(
    value: Tensor,
    name: str,
    dims: tuple[Dim, ...],
    joined: Mapping[str, Joined],
    symmetry: Symmetry,
    which: int,
) -> Tensor:
    """One model's share of a tensor: its units averaged where they are made, given out where they are used."""
    for dim, segments in enumerate(dims):
        parts = []
        if not any(factor in joined for segment in segments for factor in segment):
            continue
        for segment in segments:
            made = torch.ones(1, 1)
            for factor in segment:
                size = symmetry.size(factor)
                own = torch.eye(size)
                if isinstance(factor, str) and factor in joined:
                    one, part = joined[factor], slice(which * size, (which + 1) * size)
                    own = one.unmerge[part].T if (name, dim) in symmetry.consumed else one.merge[:, part]
                made = torch.kron(made, own)
            parts.append(made)
        way = torch.block_diag(*parts).to(value)  # type: ignore[no-untyped-call]
        value = torch.tensordot(way, value, dims=([1], [dim])).movedim(0, dim)
    return value
