"""What the units of two models say on the same data: matched by correlation (Li et al. 2016, Ainsworth et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.rebasin.matching import Pairs
from gradmatch.rebasin.probing import Call, answer
from gradmatch.rebasin.symmetry import Dim, Symmetry, has_units

if TYPE_CHECKING:
    from torch import Tensor, nn

POSITIONS = 4096  # of each layer are kept, tokens or pixels
ALIKE = (torch.nn.Dropout, torch.nn.Identity)  # say again what the layer before them said
FLAT = 1e-12  # variance relative to the mean square, below which a unit is dead


@dataclass(frozen=True)
class Features:
    """Standardised outputs of one model's layers.

    Attributes:
        values: layer -> (units, positions), with mean 0 and norm 1 over positions; zero for dead units.
        dead: layer -> the number of units that say the same to everything.
    """

    values: Mapping[str, Tensor]
    dead: Mapping[str, int]


def place_of(dims: Sequence[Any]) -> int | None:
    """The one dim of an output whose units belong to groups; None where there is none, or more than one."""
    places = [place for place, dim in enumerate(dims) if has_units(dim)]
    return places[0] if len(places) == 1 else None


def features(
    module: nn.Module,
    symmetry: Symmetry,
    calls: Sequence[Call],
    where: str,
    layers: Sequence[str] | None = None,
) -> Features:
    """Run a model on data, and keep what the units of its layers said.

    Args:
        module: the model.
        symmetry: tells which dim of a layer's output are its units.
        calls: the data.
        where: how to call the model.
        layers: of these alone; None: of all whose units belong to groups.

    Raises:
        ValueError: data that the model cannot be run on, or outputs that are not finite.
    """
    wanted = {}
    for name, layer in module.named_modules():
        place = place_of(symmetry.features.get(name, ()))
        if place is not None and not isinstance(layer, ALIKE) and (layers is None or name in layers):
            wanted[name] = (layer, place)
    seen: dict[str, list[Tensor]] = {name: [] for name in wanted}
    share = max(1, POSITIONS // len(calls))

    def observed(name: str, place: int) -> Any:
        def hook(_: nn.Module, __: Any, result: Tensor) -> None:
            flat = result.detach().float().movedim(place, 0).flatten(1)
            if flat.shape[1] > share:  # the same positions in every model
                drawn = torch.randperm(
                    flat.shape[1], generator=torch.Generator().manual_seed(len(seen[name]))
                )
                flat = flat[:, drawn[:share].to(flat.device)]
            seen[name].append(flat.cpu())

        return hook

    hooks = [layer.register_forward_hook(observed(name, place)) for name, (layer, place) in wanted.items()]
    try:
        for call in calls:
            answer(module, call, where)
    finally:
        for hook in hooks:
            hook.remove()
    values, dead = {}, {}
    for name, parts in seen.items():
        x = torch.cat(parts, 1)
        if not bool(x.isfinite().all()):
            raise GradmatchError(
                f"{where}: the outputs of {name!r} are not finite on these data; check the weights and the data",
                "not_finite",
                name,
            )
        values[name], flat = standardised(x)
        dead[name] = int(flat.sum())
    return Features(values, {name: count for name, count in dead.items() if count})


def standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and norm 1, and which of them are constant; those are zero.

    >>> standardised(torch.tensor([[0.0, 2.0], [3.0, 3.0]]))
    (tensor([[-0.7071,  0.7071],
            [ 0.0000,  0.0000]]), tensor([False,  True]))
    """
    x = x.double()
    centred = x - x.mean(1, keepdim=True)
    square = centred.square().sum(1, keepdim=True)
    flat = square <= FLAT * x.square().sum(1, keepdim=True).clamp(min=1e-300)
    return torch.where(flat, 0.0, centred / square.clamp(min=1e-300).sqrt()).float(), flat[:, 0]


def by_activations(symmetry: Symmetry, target: Features, own: Features) -> Pairs:
    """What the two models' units say, as tensors to be matched: their inner products are correlations.

    Groups of which no layer tells keep their order. Warns where there are fewer positions than units.
    """
    names = [name for name in target.values if name in own.values]
    dims: dict[str, tuple[Dim, ...]] = {}
    seen: dict[str, int] = {}
    for name in names:
        held, positions = symmetry.features[name], target.values[name].shape[1]
        place = place_of(held)
        assert place is not None
        dims[name] = (held[place], ((positions,),))
        for factor in (one for segment in held[place] for one in segment if isinstance(one, str)):
            seen[factor] = max(seen.get(factor, 0), positions)
    short = [group for group, positions in seen.items() if positions < symmetry.groups[group].size]
    if short:
        warn(
            f"{seen[short[0]]} positions of data are fewer than the {symmetry.groups[short[0]].size} units of {short[0]!r} that they are to "
            "tell apart: many orders fit them equally well; give more data"
        )
    known = Symmetry(symmetry.groups, dims)
    return Pairs(known, names, lambda name: (target.values[name], own.values[name]), products=False)
