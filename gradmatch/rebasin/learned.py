"""Matching by the loss at the midpoint, with a straight-through estimate of its gradient (Ainsworth et al. 2023).

Weights that stand in for the moved model are learned; the permutation is whichever brings the model nearest to them. Losses
are taken at the midpoint with that permutation, and their gradient is passed on as if the stand-ins were there themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.measure.objective import Objective
from gradmatch.models.batchnorm import BATCH_NORMS, batchnorm_statistics
from gradmatch.rebasin.matching import Match, Pairs, match, moved
from gradmatch.rebasin.probing import call_of
from gradmatch.rebasin.symmetry import Member

if TYPE_CHECKING:
    from torch import Tensor, nn

STEPS, RATE = 100, 1e-2
PATIENCE = 5  # steps between two looks at all of the data


def with_statistics(
    module: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Weights with BatchNorm statistics measured on data: those of an average are of neither model (Jordan et al. 2023, REPAIR).

    Args:
        module: whose structure they are of; a module without BatchNorm layers gets its weights back.
        weights: by the module's names.
        batches: what it is run on.

    >>> layer = torch.nn.BatchNorm1d(1)
    >>> with_statistics(layer, layer.state_dict(), [torch.tensor([[1.0], [3.0]])])["running_mean"]
    tensor([2.])
    """
    if not any(isinstance(layer, BATCH_NORMS) for layer in module.modules()):
        return dict(weights)
    calls = map(call_of, batches)
    measured = batchnorm_statistics(module, weights, [(call.args, call.kwargs or {}) for call in calls])
    return {**weights, **measured}


def learn(
    pairs: Pairs, module: nn.Module, ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], batches: list[Any],
    starts: Sequence[Match], *, steps: int = STEPS, rate: float = RATE,
) -> tuple[Match, float, float]:  # fmt: skip
    """The permutation with the lowest loss at the midpoint, among those that are come by.

    Args:
        pairs: of the weights, as for `match`.
        module: whose structure they are of.
        ends: the target's tensors and the moved model's, by the module's names.
        batches: with labels.
        starts: matchings to begin with: the one with the lowest loss, which is kept where nothing better is found.
        steps: of Adam, one batch each.
        rate: of Adam.

    Returns:
        The matching; the midpoint's loss with the best start and with it, nats per example.

    Raises:
        ValueError: batches without labels, or that the module cannot be run on.
    """
    target, own = ends
    symmetry = pairs.symmetry
    whole = Objective(module, batches)
    single = [Objective(module, [batch]) for batch in batches]

    def midpoint(member: Member) -> dict[str, Tensor]:
        found = {}
        for name, value in target.items():
            other = moved(own[name], symmetry.index(member, name)) if name in own else value
            same = value.is_floating_point() and other.shape == value.shape
            found[name] = (value.float() + other.float()) / 2 if same else value
        return found

    def judged(member: Member) -> float:
        return whole.loss(with_statistics(module, midpoint(member), batches)) / whole.num_examples

    losses = [judged(start.member) for start in starts]
    first = lowest = min(losses)
    best = start = starts[losses.index(first)]
    member = dict(start.member)
    latent = {name: moved(own[name].float(), symmetry.index(member, name)).clone() for name in pairs.names}
    optimizer = torch.optim.Adam(list(latent.values()), lr=rate)
    for step in range(steps):
        batch = single[step % len(single)]
        weights = with_statistics(module, midpoint(member), [batches[step % len(single)]])
        gradient = batch.gradient(weights)
        for name, value in latent.items():
            value.grad = gradient[name] / (2 * batch.num_examples) if name in gradient else None
        optimizer.step()
        found = match(
            Pairs(symmetry, pairs.names, lambda name: (latent[name], own[name].float())), start=member
        )
        changed = any(not torch.equal(found.member[name], order) for name, order in member.items())
        member = found.member
        if changed and (step % PATIENCE == PATIENCE - 1 or step == steps - 1):
            loss = judged(member)
            if loss < lowest:
                lowest = loss
                inner, size = pairs.overlap(member)
                best = Match(dict(member), inner / size, start.before, step + 1, True)
    return best, first, lowest
