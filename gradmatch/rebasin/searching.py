"""One search by each method: which pairs are compared, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.rebasin.activations import by_activations, features
from gradmatch.rebasin.learned import learn
from gradmatch.rebasin.matching import Match, assign, match
from gradmatch.rebasin.probing import Call, calls_of, module_with
from gradmatch.rebasin.transport import Hardened

if TYPE_CHECKING:
    from gradmatch.rebasin.pair import Two

NEED_DATA = ("activations", "learned")


@dataclass(frozen=True)
class Found:
    """What the searches came to.

    Attributes:
        match: the best.
        restarts: the cosine of each.
        dead: layer -> units that say nothing.
        notes: of the method.
    """

    match: Match
    restarts: tuple[float, ...]
    dead: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def search(
    pair: Two, method: str, batches: Sequence[Any] | None, models: tuple[Any, Any], restarts: int, seed: int
) -> Found:
    """Search by a method.

    Args:
        pair: the two models.
        method: weights, activations, transport (by activations where there are data, else by weights) or learned.
        batches: data, for the methods that need them.
        models: as given: the moved one, the target.
        restarts: from other orders of the groups.
        seed: of these.
    """
    pairs, dead, notes = pair.weights, {}, []
    starts = [match(pairs)] if method == "learned" else []
    by_data = method in NEED_DATA or (method == "transport" and batches is not None)
    if by_data:
        calls: list[Call] = calls_of(batches or ())
        theirs = features(module_with(models[1], pair.target), pair.symmetry, calls, pair.target.where)
        ours = features(module_with(models[0], pair.own), pair.symmetry, calls, pair.own.where)
        dead = {**theirs.dead, **ours.dead}
        pairs = by_activations(pair.symmetry, theirs, ours)
    solver = Hardened() if method == "transport" else assign
    found = [match(pairs, seed=None if n == 0 else seed + n, solve=solver) for n in range(restarts)]
    best = max(found, key=lambda one: one.cosine)
    if isinstance(solver, Hardened):
        notes.append(
            f"the soft plans' rows sum to their share within {solver.row_error:.0e}, columns within {solver.column_error:.0e}; "
            "each was made a permutation, as a soft one changes the function"
        )
    if method == "learned":
        module = module_with(models[1], pair.target)
        ends = [dict(table) for table in pair.tables]
        best, first, last = learn(
            pair.weights, module, (ends[1], ends[0]), list(batches or ()), [*starts, best]
        )
        notes.append(
            f"loss at the midpoint, nats per example: {first:.4f} by weights or activations, {last:.4f} learned"
        )
    return Found(best, tuple(one.cosine for one in found), dead, tuple(notes))
