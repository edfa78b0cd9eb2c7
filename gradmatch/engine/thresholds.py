"""The r-th largest |tau| of a tensor or a whole model, exactly, without holding its task vector.

The bits of non-negative floats order like the values. A pass counts the upper 16 bits of all |tau|, which tells those of the
value at each rank; a second pass counts the lower 16 bits of the values that share them (float64 takes four passes). Both
stream over pieces, through the compiled extension or through torch, and count the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradmatch.engine import fused
from gradmatch.engine.buffers import Buffers
from gradmatch.engine.context import Context, Found, pieces
from gradmatch.engine.stacked import edit_of, task_vectors
from gradmatch.engine.workers import over_units
from gradmatch.rules.edits import TRANSFORMS, of_task

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradmatch.plan.step import Step

DIGIT = 16  # bits counted in one pass
BINS = 1 << DIGIT

Target = tuple[int, int]  # task, rank from the largest
# (task, bits above those counted, or -1 where all count) -> (BINS,), int64
Counts = dict[tuple[int, int], Tensor]


def look_over_model(context: Context) -> None:
    """Find what transforms ask of the whole model, one transform of a chain after the other."""
    asking: dict[int, list[Step]] = {}
    for step in context.plan.steps:
        for position, scope in enumerate(step.scopes):
            if scope == "model":
                asking.setdefault(position, []).append(step)
    for position, steps in sorted(asking.items()):
        tasks = range(len(context.inputs.tasks))
        sizes = [sum(step.spec.numel for step in steps if t in step.tasks) for t in tasks]
        asked = {step.name: _asked(step, position, sizes) for step in steps}
        wide = any(step.compute == "F64" for step in steps)
        targets = {target for cuts in asked.values() for cut in cuts for target in cut}
        found = _search(targets, sizes, wide, partial(_tally_model, context, steps, position, wide))
        _note_kept(context, steps[0], position, "", sizes, found)
        for step in steps:
            cuts = [[(found[target].value, -1) for target in cut] for cut in asked[step.name]]
            context.found[position, step.name] = Found(cuts)


def look(context: Context, step: Step, buffers: Buffers, before: int | None = None) -> None:
    """Find what the transforms of a step, or those before a position, ask of its tensor, one after the other."""
    for position, scope in enumerate(step.scopes[:before]):
        if scope == "tensor" and (position, step.name) not in context.found:
            cuts = _cuts(context, step, position, buffers)
            context.found[position, step.name] = Found(cuts)  # what is added up may be what is within them
            context.found[position, step.name] = Found(cuts, _sums(context, step, position, buffers))


def _cuts(context: Context, step: Step, position: int, buffers: Buffers) -> list[list[tuple[float, int]]]:
    """The cuts that a transform asks for of one tensor, with the places that tell equal entries apart."""
    (name, options), tasks = step.edits[position], len(context.inputs.tasks)
    transform = TRANSFORMS[name]
    if transform.ranks is None:
        return []
    numel, wide = step.spec.numel, step.compute == "F64"
    among = _nonzero(context, step, position, buffers) if transform.nonzero(options) else numel
    asked = _asked(step, position, [among] * tasks)
    # without places the value at the last rank matters by itself
    sizes = [numel + (transform.sizes is not None and not transform.places)] * tasks
    targets = {target for cut in asked for target in cut}
    tally = partial(_tally, context, step, position, wide, 0, numel, buffers)
    found = _search(targets, sizes, wide, tally)
    _note_kept(context, step, position, step.name, sizes, found)
    places = dict.fromkeys(found, -1)
    if transform.places:
        places = _places(context, step, position, found, buffers)
    return [[(found[target].value, places[target]) for target in cut] for cut in asked]


def _sizes(context: Context, step: Step, position: int, first: int, last: int, buffers: Buffers) -> Tensor:
    """What an edit ranks of a piece, (T, n), or (1, n) where it is the same for all tasks, by magnitude."""
    name, options = step.edits[position]
    theta0, tau = task_vectors(context, step, first, last, buffers, {}, edits=position)
    sizes = TRANSFORMS[name].sizes
    if sizes is None:
        return tau
    return sizes(edit_of(context, step, position, first, theta0, tau), options).reshape(-1, last - first)


def _nonzero(context: Context, step: Step, position: int, buffers: Buffers) -> int:
    """How many of a tensor's sizes, the same for all tasks, are not 0."""
    cut = pieces(step, 0, step.spec.numel)
    return sum(int(_sizes(context, step, position, *at, buffers)[0].count_nonzero()) for at in cut)


def _note_kept(
    context: Context, step: Step, position: int, scope: str, sizes: Sequence[int], found: dict[Target, Ranked]
) -> None:
    """Remember how many entries of each task were to be kept and how many are, where equal ones all stay; `scope`: a tensor or "" ."""
    if TRANSFORMS[step.edits[position][0]].equal:
        for (t, rank), ranked in found.items():
            more = -ranked.within if ranked.value == 0 else ranked.equal - ranked.within  # zeros stay zero
            context.kept[scope, t] = rank, rank + more, sizes[t]


def shares(context: Context) -> dict[str, tuple[float, float]]:
    """Task -> the share of its entries that was to be kept, and the share that is: more where several are as large as the last one.

    bfloat16 weights have many differences of one size. Which of them come first would be a matter of chance, so all stay.
    """
    totals: dict[int, list[int]] = {}
    for (_, t), counts in context.kept.items():
        totals[t] = [a + b for a, b in zip(totals.get(t, [0, 0, 0]), counts, strict=True)]
    tasks = context.inputs.tasks
    return {tasks[t].name: (asked / size, kept / size) for t, (asked, kept, size) in sorted(totals.items())}


def _sums(context: Context, step: Step, position: int, buffers: Buffers) -> Tensor | None:
    """What a transform asks to be added up over one tensor, (k, T)."""
    name, options = step.edits[position]
    if (sums := TRANSFORMS[name].sums) is None:
        return None
    parts = []
    for first, last in pieces(step, 0, step.spec.numel):
        theta0, tau = task_vectors(context, step, first, last, buffers, {}, edits=position)
        parts.append(sums(edit_of(context, step, position, first, theta0, tau), options))
    return torch.stack(parts).sum(0) if parts else None


class Ranked(NamedTuple):
    """A value at a rank: how many of those equal to it are within the rank, and how many there are."""

    value: float
    within: int = 0
    equal: int = 0


def _asked(step: Step, position: int, sizes: Sequence[int]) -> list[list[Target]]:
    """Every cut that a transform asks for, as one (task, rank) for each task of the step; `sizes` of what the ranks count."""
    name, options = step.edits[position]
    ranks = TRANSFORMS[name].ranks
    assert ranks is not None
    each = [
        [(t, rank) for rank in ranks(of_task(options, row), sizes[t])] for row, t in enumerate(step.tasks)
    ]
    return [list(cut) for cut in zip(*each, strict=True)]


def _search(
    targets: Iterable[Target], sizes: Sequence[int], wide: bool, count: Callable[[Counts, int], None]
) -> dict[Target, Ranked]:
    """The values at some ranks, digit by digit from the top.

    Args:
        targets: (task, rank).
        sizes: how many values each task has; rank 0 is above and the last rank below all of them.
        wide: whether the values are float64.
        count: adds to histograms of the digit that begins at some bit.
    """
    found = {
        (t, rank): Ranked(-1.0 if rank else float("inf")) for t, rank in targets if rank in (0, sizes[t])
    }
    floats, integers, width = (torch.float64, torch.int64, 64) if wide else (torch.float32, torch.int32, 32)
    # bits so far, rank among their equals
    left = {(t, rank): (-1, rank) for t, rank in targets if (t, rank) not in found}
    for low in range(width - DIGIT, -1, -DIGIT) if left else ():
        counts: Counts = {
            (t, bits): torch.zeros(BINS, dtype=torch.int64) for (t, _), (bits, _) in left.items()
        }
        count(counts, low)
        for target, (bits, rank) in left.items():
            histogram = counts[target[0], bits]
            from_top = histogram.flip(0).cumsum(0)
            place = int(torch.searchsorted(from_top, rank))
            digit, equal = BINS - 1 - place, int(histogram[BINS - 1 - place])
            bits, rank = max(bits, 0) << DIGIT | digit, rank - int(from_top[place]) + equal
            left[target] = bits, rank
            if low == 0:
                value = float(torch.tensor(bits, dtype=integers).view(floats))
                found[target] = Ranked(value, rank, equal)
    return found


def _tally_model(
    context: Context, steps: Sequence[Step], position: int, wide: bool, counts: Counts, low: int
) -> None:
    """`_tally` of some steps, on a few threads."""

    def unit(step: Step, first: int, last: int, buffers: Buffers) -> Counts:
        look(context, step, buffers, position)
        own = {key: torch.zeros(BINS, dtype=torch.int64) for key in counts if key[0] in step.tasks}
        _tally(context, step, position, wide, first, last, buffers, own, low)
        return own

    for _, own in over_units(context, steps, unit):
        for key, histogram in own.items():
            counts[key] += histogram


def _tally(
    context: Context,
    step: Step,
    position: int,
    wide: bool,
    first: int,
    last: int,
    buffers: Buffers,
    counts: Counts,
    low: int,
) -> None:
    """Add the digits from bit `low` on of |tau|, after the edits before `position`, of elements first to last to histograms."""
    wanted = [(t, bits, histogram) for (t, bits), histogram in counts.items()]
    blocks = fused.PIECE if context.device == "cpu" else context.blocks  # a piece pays for all BINS
    for start, stop in pieces(step, first, last, blocks):
        plain = position == 0 and not wide and TRANSFORMS[step.edits[0][0]].sizes is None
        if plain and fused.count_bits(context, step, start, stop, wanted, buffers):
            continue
        sizes = _sizes(context, step, position, start, stop, buffers)
        counted: dict[tuple[int, int], Tensor] = {}
        for t, bits, histogram in wanted:
            row = step.tasks.index(t) if len(sizes) > 1 else 0
            if (row, bits) not in counted:
                size = sizes[row].abs()
                digits = size.double().view(torch.int64) if wide else size.view(torch.int32)
                digits >>= low
                if bits >= 0:
                    digits = chosen(digits, digits >> DIGIT == bits) & (BINS - 1)
                counted[row, bits] = torch.bincount(digits, minlength=BINS).cpu()
            histogram += counted[row, bits]


def chosen(values: Tensor, held: Tensor) -> Tensor:
    """The values that are held, mostly few: on the CPU numpy picks them several times faster than torch."""
    if values.device.type != "cpu":
        return values[held]
    return torch.from_numpy(values.numpy()[held.numpy()])


def _places(
    context: Context, step: Step, position: int, found: Mapping[Target, Ranked], buffers: Buffers
) -> dict[Target, int]:
    """The place of the last entry within each rank among those equal to it; the tensor's end where all of them are."""
    places = dict.fromkeys(found, step.spec.numel)
    left = {target: ranked.within for target, ranked in found.items() if ranked.within < ranked.equal}
    for first, last in pieces(step, 0, step.spec.numel) if left else ():
        sizes = _sizes(context, step, position, first, last, buffers)
        for (t, rank), within in list(left.items()):
            size = sizes[step.tasks.index(t) if len(sizes) > 1 else 0].abs()
            equal = (size == found[t, rank].value).nonzero().flatten()
            left[t, rank] = within - len(equal)
            if within <= len(equal):
                places[t, rank] = first + int(equal[within - 1])
                del left[t, rank]
        if not left:
            break
    return places
