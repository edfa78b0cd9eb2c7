"""Axes of tensors as they meet in a network: which of them must be moved together, and which cannot be moved at all.

An axis is a leaf, a product of axes (heads x units, laid out major first) or a concatenation (the queries, keys and values
of one fused layer). Two axes that meet, as in a sum, are made one; what they are made of is refined until both agree. Where
that is impossible both are pinned: they keep their order, which is always right.

>>> fused, heads, units = Axis(12), Axis(2), Axis(3)
>>> query, key = cut(fused, 0, 6), cut(fused, 6, 12)
>>> unify(query, product([heads, units]))
>>> [leaf.size for leaf in leaves(fused)]
[2, 3, 6]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

BORDERS = 16  # after so many rounds of refinement two axes are pinned


class Axis:
    """A set of positions of a tensor. `find` gives the one that stands for all that it was unified with.

    Attributes:
        size: number of positions.
        pinned: whether its order must stay.
        kind: "" of a leaf, "product" or "concat".
        parts: what it is made of, major first.
    """

    __slots__ = ("kind", "link", "parts", "pinned", "size")

    def __init__(self, size: int, pinned: bool = False, kind: str = "", parts: Sequence[Axis] = ()) -> None:
        self.size, self.pinned, self.kind, self.parts = size, pinned, kind, tuple(parts)
        self.link: Axis | None = None


def find(axis: Axis) -> Axis:
    """The axis that stands for it."""
    while axis.link is not None:
        axis = axis.link
    return axis


def leaves(axis: Axis) -> Iterator[Axis]:
    """The leaves that an axis is made of, in order; those of one position are left out."""
    axis = find(axis)
    if axis.kind:
        for part in axis.parts:
            yield from leaves(part)
    elif axis.size > 1:
        yield axis


def pin(axis: Axis) -> None:
    """Keep the order of an axis, and of all that it is made of."""
    axis = find(axis)
    axis.pinned = True
    for part in axis.parts:
        pin(part)


def product(parts: Sequence[Axis]) -> Axis:
    """The axis whose positions are those of several, major first."""
    known = [part for part in parts if find(part).size > 1]
    if len(known) == 1:
        return known[0]
    size = 1
    for part in known:
        size *= find(part).size
    return Axis(size, kind="product", parts=known) if known else Axis(1, pinned=True)


def concat(parts: Sequence[Axis]) -> Axis:
    """The axis that is several, end to end."""
    if len(parts) == 1:
        return parts[0]
    return Axis(sum(find(part).size for part in parts), kind="concat", parts=parts)


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The axes of these sizes whose product an axis is; pinned ones where it is made otherwise."""
    have, made = factors_of(axis), []
    for size in sizes:
        group: list[Axis] = []
        need = size
        while need > 1:
            head = find(have.pop(0)) if have else None
            if head is None:
                return _pinned(axis, sizes)
            if need % head.size == 0:
                group.append(head)
                need //= head.size
            elif head.size % need == 0 and not head.kind:
                head.kind = "product"
                head.parts = (Axis(need, head.pinned), Axis(head.size // need, head.pinned))
                have[:0] = head.parts
            else:
                return _pinned(axis, sizes)
        made.append(product(group))
    return made if not have else _pinned(axis, sizes)


def cut(axis: Axis, first: int, last: int) -> Axis:
    """The part of an axis from one position to another; a pinned one where it cannot be taken apart there."""
    if last - first == find(axis).size:
        return axis
    for edge in (first, last):
        if not _divide(axis, edge):
            pin(axis)
            return Axis(last - first, pinned=True)
    start, held = 0, []
    for part in _segments(axis):
        if first <= start < last:
            held.append(part)
        start += find(part).size
    return concat(held)


def unify(one: Axis, other: Axis) -> None:
    """Make two axes one."""
    one, other = find(one), find(other)
    if one is other:
        return
    if one.size != other.size:
        raise ValueError(f"axes of {one.size} and {other.size} positions cannot be one")
    if one.pinned or other.pinned:
        pin(one)
        pin(other)
    if one.kind and not other.kind:
        one, other = other, one
    if one.kind and one.kind != other.kind:
        pin(one)
        pin(other)
        return
    if one.kind == "product" and not _agree(one, other):
        pin(one)
        pin(other)
        return
    if one.kind == "concat":
        if not _cut_alike(one, other):
            pin(one)
            pin(other)
            return
        for a, b in zip(_segments(one), _segments(other), strict=True):
            unify(a, b)
    if find(one) is not find(other):
        one.link = other


def _agree(one: Axis, other: Axis) -> bool:
    """Refine two products into the same factors, and make these one."""
    ours, theirs = factors_of(one), factors_of(other)
    while ours and theirs:
        a, b = find(ours.pop(0)), find(theirs.pop(0))
        if a.size == b.size:
            unify(a, b)
            continue
        small, large, rest = (a, b, theirs) if a.size < b.size else (b, a, ours)
        if large.size % small.size or large.kind:
            return False
        large.kind = "product"
        large.parts = (Axis(small.size, large.pinned), Axis(large.size // small.size, large.pinned))
        unify(small, large.parts[0])
        rest.insert(0, large.parts[1])
    return not ours and not theirs


def _cut_alike(one: Axis, other: Axis) -> bool:
    """Give two concatenations the same borders; again and again, as a part of both that is cut for one is cut for the other too."""
    for _ in range(BORDERS):
        ours, theirs = ([find(part).size for part in _segments(axis)] for axis in (one, other))
        if ours == theirs:
            return True
        for axis, sizes in ((other, ours), (one, theirs)):
            if not all(_divide(axis, edge) for edge in accumulate(sizes)):
                return False
    return False


def _pinned(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    pin(axis)
    return [Axis(size, pinned=True) for size in sizes]


def factors_of(axis: Axis) -> list[Axis]:
    """The axes whose product an axis is; those of one position are left out."""
    axis = find(axis)
    if axis.kind != "product":
        return [axis] if axis.size > 1 else []
    return [factor for part in axis.parts for factor in factors_of(part)]


def _segments(axis: Axis) -> list[Axis]:
    axis = find(axis)
    if axis.kind != "concat":
        return [axis]
    return [segment for part in axis.parts for segment in _segments(part)]


def _divide(axis: Axis, edge: int) -> bool:
    """Make an axis a concatenation with a border at this position, if it is none yet."""
    start = 0
    for part in map(find, _segments(axis)):
        inside = edge - start
        if 0 < inside < part.size:
            if part.kind:
                return False
            part.kind = "concat"
            part.parts = (Axis(inside, part.pinned), Axis(part.size - inside, part.pinned))
            return True
        start += part.size
    return True
