"""Several models in one order of units: all are aligned to their own mean, so that the orders agree round every circle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.views import like
from gradmatch.rebasin.matching import Pairs, match, moved
from gradmatch.rebasin.pair import Two
from gradmatch.rebasin.probing import symmetry_of_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.task import Model
    from gradmatch.rebasin.symmetry import Member, Symmetry

ROUNDS = 20  # over the models


def align_all(models: Sequence[Model | Checkpoint], *, spec: Symmetry | None = None) -> list[Checkpoint]:
    """Models of different beginnings in the order of the first, matched to what they have in common.

    Each model in turn is matched to the mean of the others as they stand (Ainsworth et al. 2023, MergeMany),
    until none moves. Every model has one order in the common universe, so that going from one model to another and on to a
    third is the same as going there directly, which matching pair by pair does not give (Crisostomi et al. 2024).

    Args:
        models: at least two of one architecture; the first keeps its order.
        spec: the symmetry, where it is known.

    Returns:
        A view of each, as `align` gives; the first is as it was.

    Raises:
        ValueError: fewer than two models, or models of other architectures or widths.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> [view["0.weight"].shape for view in align_all([net, net, net])]
    [torch.Size([3, 2]), torch.Size([3, 2]), torch.Size([3, 2])]
    """
    if len(models) < 2:
        raise GradmatchError(
            f"align_all brings several models together, got {len(models)}; give at least two", "bad_tasks"
        )
    first = open_checkpoint(models[0])
    opened = [first, *(like(open_checkpoint(model, base=first), first) for model in models[1:])]
    symmetry = spec or symmetry_of_checkpoint(first)
    pairs = [Two(one, first, symmetry) for one in opened]
    for pair in pairs[1:]:
        if wide := pair.other_width():
            raise GradmatchError(
                f"{wide!r} has other widths in {pair.own.where} than in {first.where}; align_all takes models of one width",
                "shape_mismatch",
                wide,
            )
    names = [name for name in pairs[0].weights.names if all(name in pair.weights.names for pair in pairs)]
    members = [symmetry.identity() for _ in pairs]
    own = [pair.tables[0] for pair in pairs]
    moving = True
    for sweep in range(ROUNDS):
        moving = False
        for index in range(len(pairs)):
            # before the first round is over, only models that have been matched already tell
            others = [k for k in range(len(pairs)) if k != index and (sweep or k < index)]
            if not others:
                continue
            found = match(
                Pairs(symmetry, names, _against_mean(symmetry, own, members, others, index)),
                start=members[index] if sweep else None,
            )
            moving |= any(not (found.member[g] == order).all() for g, order in members[index].items())
            members[index] = found.member
        if not moving:
            break
    back = symmetry.inverse(members[0])
    return [pair.view(symmetry.compose(member, back)) for pair, member in zip(pairs, members, strict=True)]


def _against_mean(
    symmetry: Symmetry,
    own: Sequence[Checkpoint],
    members: Sequence[Member],
    others: Sequence[int],
    index: int,
) -> Callable[[str], tuple[Tensor, Tensor]]:
    """A reader of the mean of some models as they stand, and of one model as it came."""

    def read(name: str) -> tuple[Tensor, Tensor]:
        stand = [moved(own[k][name].float(), symmetry.index(members[k], name)) for k in others]
        total = stand[0].clone()
        for one in stand[1:]:
            total += one
        return total / len(stand), own[index][name].float()

    return read
