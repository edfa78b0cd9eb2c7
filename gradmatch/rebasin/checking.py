"""Proof of a specification on the given model: random members of its group must keep the function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rebasin.probing import (
    Call,
    answer,
    calls_of,
    double,
    example,
    find_symmetry,
    module_with,
    opened,
)
from gradmatch.rebasin.symmetry import Member, Symmetry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Proof:
    """What a check found.

    Attributes:
        symmetry: that was checked.
        difference: the largest change of an output under any member, relative to the largest output.
        members: random ones that were tried.
        notes: what stays unmoved, and why.
    """

    symmetry: Symmetry
    difference: float
    members: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What stays unmoved, and why."""
        return self.symmetry.notes

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        groups = {
            name: {"units": group.size, "inside": list(group.inside), "tensors": self.symmetry.holders(name)}
            for name, group in self.symmetry.groups.items()
        }
        return {
            "difference": self.difference,
            "members": self.members,
            "groups": groups,
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """A table for people."""
        lines = [
            f"{name}: {group.size} units" + (f" in each of {' x '.join(group.inside)}" if group.inside else "")
            + f", {len(self.symmetry.holders(name))} tensors"
            for name, group in self.symmetry.groups.items()
        ]  # fmt: skip
        lines.append(
            f"function kept: outputs change by {self.difference:.1e} of their largest under {self.members} random members"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def check(
    model: Model | Checkpoint,
    data: Iterable[Any] | None = None,
    *,
    spec: Symmetry | Mapping[str, Sequence[Any]] | Iterable[tuple[str, Sequence[Any]]] | None = None,
    members: int = 2,
    seed: int = 0,
) -> Proof:
    """Prove that permutations of a model's units keep its function; name the tensor that breaks it.

    The specification is found by running the model once (or is given), then tried with random members of its group, in
    float64: outputs may change by 1e-5 of the largest one.

    Args:
        model: module, folder, hub id or checkpoint with a config.
        data: batches to run it on; None: random inputs that its config or first layer describes.
        spec: instead of the one that is found: tensor -> group name or None for every dim, as a mapping or as pairs.
        members: random ones to try.
        seed: of the draw.

    Returns:
        `.difference`, `.symmetry` (groups, and where they are), `.notes`.

    Raises:
        ValueError: a member that changes the function, with the tensor; a specification that leaves out tensors or names
            one twice; a model that cannot be run.

    >>> layers = torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4)
    >>> check(torch.nn.Sequential(*layers)).difference < 1e-12
    True
    """
    checkpoint = opened(model)
    module = module_with(model, checkpoint)
    call = example(module) if data is None else calls_of(data)[0]
    if spec is None:
        symmetry = find_symmetry(module, call)
    elif isinstance(spec, Symmetry):
        symmetry = spec
    else:
        symmetry = Symmetry.from_table(
            spec, {name: tuple(value.shape) for name, value in module.state_dict().items()}
        )
    wide = double(module)
    call = call.to(dtype=torch.float64)
    reference, state = answer(wide, call, checkpoint.where), _state(wide)
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for _ in range(members):
        member = symmetry.random(generator)
        gap = _gap(wide, call, state, _indices(symmetry, member, state), reference)
        worst = max(worst, gap)
        if not gap <= TOLERANCE:
            raise _culprit(symmetry, wide, call, state, reference, generator, gap)
    return Proof(symmetry, worst, members)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors, every one under one name."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            kept[name] = tensor.detach().clone()
        seen.add(id(tensor))
    return kept


Indices = Mapping[str, Sequence["Tensor | None"]]


def _indices(
    symmetry: Symmetry, member: Member, state: Mapping[str, Tensor]
) -> dict[str, list[Tensor | None]]:
    return {name: symmetry.index(member, name) for name in state}


def _gap(
    module: nn.Module, call: Call, state: Mapping[str, Tensor], moves: Indices, reference: Sequence[Tensor]
) -> float:
    """The largest change of an output with some tensors moved, relative to the largest output; they are put back."""
    held = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, ways in moves.items():
            value = state[name]
            for dim, index in enumerate(ways):
                value = value if index is None else value.index_select(dim, index)
            held[name].copy_(value)
    try:
        found = answer(module, call, type(module).__name__)
    finally:
        with torch.no_grad():
            for name in moves:
                held[name].copy_(state[name])
    return difference(found, reference)


def difference(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest change of an output relative to the largest output.

    >>> difference([torch.tensor([1.0, 2.5])], [torch.tensor([1.0, 2.0])])
    0.25
    """
    worst = 0.0
    for one, other in zip(found, reference, strict=True):
        if other.is_floating_point() and other.numel():
            scale = float(other.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
            gap = float((one.double() - other.double()).abs().max()) / scale
            worst = gap if gap != gap else max(worst, gap)
    return worst


def _culprit(
    symmetry: Symmetry,
    module: nn.Module,
    call: Call,
    state: Mapping[str, Tensor],
    reference: Sequence[Tensor],
    generator: torch.Generator,
    gap: float,
) -> GradmatchError:
    """The group that changes the function, and the tensor without which (or with which as well) it would not."""
    for group, known in symmetry.groups.items():
        member = symmetry.random(generator, [group])
        moves = {
            name: way
            for name, way in _indices(symmetry, member, state).items()
            if any(w is not None for w in way)
        }
        if _gap(module, call, state, moves, reference) <= TOLERANCE:
            continue
        holders = [name for name in symmetry.holders(group) if name in state]
        for name in holders:
            if (
                _gap(module, call, state, {n: way for n, way in moves.items() if n != name}, reference)
                <= TOLERANCE
            ):
                return _broken(group, name, "is moved with them and must not be", gap)
        for name, value in state.items():
            for dim, size in enumerate(value.shape):
                if name in holders or size != known.size or known.inside:
                    continue
                way = [member[group] if place == dim else None for place in range(value.dim())]
                if _gap(module, call, state, {**moves, name: way}, reference) <= TOLERANCE:
                    return _broken(group, name, "is not moved with them and must be", gap)
        return _broken(group, holders[0], f"is among the {len(holders)} tensors that they move", gap)
    return _broken("several groups together", next(iter(symmetry.dims)), "is the first of the tensors", gap)


def _broken(group: str, name: str, what: str, gap: float) -> GradmatchError:
    return GradmatchError(
        f"permuting the units of {group!r} changes the outputs by {gap:.1e} of their largest (at most {TOLERANCE:.0e} is allowed): {name!r} "
        f"{what}; correct its entry in the specification",
        "bad_spec",
        name,
    )
