"""`align`: one model in the order of another's units, as a view that merges, with its curvature, like any fine-tune."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.structure import Structure, structure
from gradmatch.models.views import by_module, like
from gradmatch.rebasin.checking import TOLERANCE, check, difference
from gradmatch.rebasin.matching import Match
from gradmatch.rebasin.pair import Two
from gradmatch.rebasin.probing import (
    Call,
    answer,
    batches_of,
    calls_of,
    double,
    example,
    module_with,
    symmetry_of_checkpoint,
)
from gradmatch.rebasin.searching import NEED_DATA, search
from gradmatch.rebasin.symmetry import Member, Symmetry
from gradmatch.rebasin.transport import Widths

if TYPE_CHECKING:
    from gradmatch.models.task import Model

METHODS = ("weights", "activations", "transport", "learned")


@dataclass(frozen=True)
class Alignment:
    """What an alignment did; `.report` of the view.

    Attributes:
        method: by which units were matched.
        distance: ||to - aligned|| / ||to|| over the tensors that have units to be moved; NaN between models of other widths.
        unaligned: the same without the alignment.
        moved: the share of units that stand elsewhere now.
        difference: of the outputs before and after, relative to the largest; None where it was not measured.
        match: of what was matched: cosines, sweeps, whether the search converged.
        restarts: the cosine that each start came to.
        dead: layer -> units that say nothing and so tell nothing.
        member: group -> old position of every new unit.
        notes: what stays, and what to know.
    """

    method: str
    distance: float
    unaligned: float
    moved: float
    difference: float | None
    match: Match
    restarts: tuple[float, ...]
    member: Member
    dead: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without the permutations."""
        told: dict[str, Any] = {
            "method": self.method,
            "distance": self.distance,
            "unaligned_distance": self.unaligned,
            "moved": self.moved,
            "difference": self.difference,
            "cosine": self.match.cosine,
            "unaligned_cosine": self.match.before,
            "sweeps": self.match.sweeps,
            "converged": self.match.converged,
            "restarts": list(self.restarts),
            "dead": dict(self.dead),
            "groups": {name: list(order.shape) for name, order in self.member.items()},
            "notes": list(self.notes),
        }
        return {key: None if value != value else value for key, value in told.items()}  # JSON has no NaN

    def summary(self) -> str:
        """For people: the unaligned models beside the aligned ones."""
        lines = [
            f"aligned by {self.method}: {100 * self.moved:.0f} % of {sum(o.numel() for o in self.member.values())} units in "
            f"{len(self.member)} groups moved; {self.match.sweeps} sweeps"
            + ("" if self.match.converged else ", which had not converged"),
        ]
        if self.distance == self.distance:
            lines.append(
                f"distance of the weights, relative to the target's: {self.distance:.4f} (unaligned {self.unaligned:.4f})"
            )
        if self.difference is not None:
            kept = "function kept" if self.difference <= TOLERANCE else "function NOT kept"
            lines.append(f"{kept}: outputs change by {self.difference:.1e} of their largest")
        if len(self.restarts) > 1:
            lines.append(
                f"cosines that {len(self.restarts)} starts came to: {', '.join(f'{c:.4f}' for c in self.restarts)}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def align(
    model: Model | Checkpoint,
    to: Model | Checkpoint,
    method: str = "weights",
    data: Iterable[Any] | None = None,
    *,
    spec: Symmetry | None = None,
    restarts: int = 1,
    seed: int = 0,
    verify: bool = True,
) -> Checkpoint:
    """A model with its units in the order of another's: the same function, with weights that can be averaged.

    Networks of different beginnings keep the same thing in different units. Which units may change places is found by running
    the network once; which is which is matched; and the result is a view, read lazily, that `Task` takes. Curvature of the
    model that is given with the view moves along.

    Args:
        model: module, folder, hub id or checkpoint with a config.
        to: the model whose order it is to have; of the same architecture.
        method: how units are matched. "weights" (Ainsworth et al. 2023): by the weights alone. "activations": by what units say
            on `data`. "transport" (Singh & Jaggi 2020): by a soft plan, made hard where the widths are the same; of models of
            other widths units are split and averaged, which keeps the function only nearly. "learned": from the better of the first
            two on, by the loss at the midpoint on `data`, which have labels (straight-through, Ainsworth et al. 2023).
        data: batches, as models take them; for "weights" and "transport" not needed.
        spec: the symmetry, where it is known (`Symmetry.from_table`); None: it is found.
        restarts: searches from other orders of the groups; the best is taken.
        seed: of these orders.
        verify: run the model before and after, and refuse a view whose outputs differ by more than 1e-5 of the largest.

    Returns:
        The view; `.report` is an `Alignment`: distances before and after, and what to know.

    Raises:
        ValueError: models of different depths or widths, a method that needs data without any, data that a model cannot be
            run on, a specification that changes the function (the tensor is named).
        TypeError: data that are no batches.

    >>> layers = lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> one = layers()
    >>> other = {name: value[[2, 0, 1]] if name[0] == "0" else value[:, [2, 0, 1]] if value.dim() > 1 else value
    ...          for name, value in one.state_dict().items()}
    >>> scrambled = layers()
    >>> _ = scrambled.load_state_dict(other)
    >>> view = align(scrambled, one)
    >>> all(torch.equal(view[name], value) for name, value in one.state_dict().items())
    True
    """
    choose("method", method, METHODS)
    if method in NEED_DATA and data is None:
        raise GradmatchError(
            f"method={method!r} looks at what the models do on data; pass data=[batches], or take method='weights', which needs none",
            "bad_data",
            "data",
        )
    if restarts < 1:
        raise GradmatchError(f"restarts is {restarts}; it must be at least 1", "out_of_range", "restarts")
    batches = None if data is None else list(batches_of(data))
    call = None if batches is None else calls_of(batches)[0]
    target = open_checkpoint(to)
    own = like(open_checkpoint(model, base=target), target)
    # by the moved one's module or config; by the target's where it has none
    known = target if structure(own) is None and structure(target) is not None else own
    pair = Two(own, target, spec or symmetry_of_checkpoint(known, call))
    if wide := pair.other_width():
        if method != "transport":
            shapes = (list(table.spec(wide).shape) for table in pair.tables)
            raise GradmatchError(
                f"{wide!r} has shape {next(shapes)} in {own.where} and {next(shapes)} in {target.where}: units of different numbers cannot "
                "change places; take method='transport', which splits and averages them",
                "shape_mismatch",
                wide,
            )
        return _carried(pair, model, to, call, verify)
    if spec is None:
        check_same(own, target, pair.symmetry, call)
    found = search(pair, method, batches, (model, to), restarts, seed)
    best = found.match
    view = pair.view(best.member)
    gap = verified(pair, view, model, call) if verify else None
    inner, size = pair.weights.overlap(best.member)
    before, _ = pair.weights.overlap(None)
    notes = [*pair.symmetry.notes, *found.notes]
    if inner < before:
        notes.append(
            f"the aligned weights are further from the target's than the unaligned ones (cosine {inner / size:.4f}, {before / size:.4f}): "
            "compare both averages before you take this one"
        )
        warn(notes[-1])
    if not best.converged:
        notes.append("the search had not converged when it was ended")
    if len({round(cosine, 6) for cosine in found.restarts}) > 1:
        notes.append("starts came to different ends: these are local optima, and a better one may exist")
    moved = _moved_share(pair.symmetry, best.member)
    ends = pair.distance(best.member), pair.distance(None)
    report = Alignment(method, *ends, moved, gap, best, found.restarts, best.member, found.dead, tuple(notes))
    return view.seen(view.store, report=report)


def check_same(own: Checkpoint, target: Checkpoint, ours: Symmetry, call: Call | None) -> None:
    """Refuse models whose tensors have the same shapes and another number of heads.

    Raises:
        ValueError: the group, with both numbers.
    """
    if structure(own) is None or structure(target) is None:
        return
    theirs = symmetry_of_checkpoint(target, call)
    for name, group in ours.groups.items():
        other = theirs.groups.get(name, group)
        if other != group:
            raise GradmatchError(
                f"{name!r} has {group.size} units in one model and {other.size} in the other, of the same shapes: heads of one number and "
                "size alone can change places; check num_attention_heads in both configs",
                "shape_mismatch",
                name,
            )


def _carried(pair: Two, model: Any, to: Any, call: Call | None, verify: bool) -> Checkpoint:
    """A model in the widths of another: its units split and averaged, which keeps the function only nearly."""
    there = symmetry_of_checkpoint(pair.target, call)
    own, target = pair.tables
    widths = Widths(there, pair.symmetry, pair.shared, lambda name: (target[name].float(), own[name].float()))
    found = widths.carry()
    view = pair.moved_by(widths.ways, exact=False)
    view = view.seen(
        view.store, config=pair.target.config, module=pair.target.module, folder=pair.target.folder
    )
    gap = None
    if verify:
        reference = module_with(model, pair.own)
        given = (call or example(reference)).to(dtype=torch.float64)
        before = answer(double(reference), given, pair.own.where)
        gap = difference(answer(_filled(pair.target, to, view), given, pair.own.where), before)
    notes = (
        *pair.symmetry.notes,
        "units of other widths were split and averaged, which keeps the function only nearly",
    )
    none = float("nan")
    report = Alignment("transport", none, none, 1.0, gap, found, (found.cosine,), found.member, {}, notes)
    return view.seen(view.store, report=report)


def _filled(checkpoint: Checkpoint, model: Any, view: Checkpoint) -> torch.nn.Module:
    """A model's module in float64 with the tensors of a view."""
    module = double(module_with(model, checkpoint))
    shown = by_module(view, Structure(module))
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name in shown:
                tensor.copy_(shown[name])
    return module


def verified(pair: Two, view: Checkpoint, model: Any, call: Call | None) -> float:
    """How far the outputs of the view are from the model's.

    Raises:
        ValueError: too far; the tensor is named where one is to blame.
    """
    module = module_with(model, pair.own)
    given = (call or example(module)).to(dtype=torch.float64)
    reference = answer(double(module), given, pair.own.where)
    gap = difference(answer(_filled(pair.own, model, view), given, pair.own.where), reference)
    if not gap <= TOLERANCE:
        batch = given.args[0] if given.args else dict(given.kwargs or {})
        check(model, [batch], spec=pair.symmetry)  # names the tensor
        raise GradmatchError(
            f"the aligned {pair.own.where} answers otherwise than before (outputs change by {gap:.1e} of their largest, at most "
            f"{TOLERANCE:.0e} is allowed); its specification does not hold: run rebasin.check on it",
            "bad_spec",
            pair.own.where,
        )
    return gap


def _moved_share(symmetry: Symmetry, member: Member) -> float:
    same = symmetry.identity()
    units = sum(order.numel() for order in member.values())
    return sum(int((order != same[name]).sum()) for name, order in member.items()) / max(1, units)
