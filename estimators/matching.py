"""Names for the numbered states of an optimizer's state_dict: by the names that it kept, or by order, checked by shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import permutations
from typing import Any

from torch import Tensor, nn

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.wrapped import bare_names

# The parameters that transformers' Trainer keeps out of weight decay, in a second group, beside those of nn.LayerNorm.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
FEW_GROUPS = 4  # so many are tried in every order (24), more of them forwards and backwards

Entry = tuple[str, Mapping[str, Any], Mapping[str, Any]]  # name, state of the parameter, its group
Shapes = list[tuple[int, ...] | None]


def name_states(
    state: Mapping[str, Any], model: nn.Module, trainable: Mapping[str, nn.Parameter]
) -> Iterator[Entry]:
    """The states of the trainable parameters; those of frozen ones, which the optimizer may hold too, are left out."""
    groups = state["param_groups"]
    pairs = [(state["state"].get(number, {}), group) for group in groups for number in group["params"]]
    everything = dict(model.named_parameters())
    order = _kept_names(groups, len(pairs), everything, trainable)
    if order is None:
        order = _order(groups, [entry for entry, _ in pairs], model, everything, trainable)
    for name, (entry, group) in zip(order, pairs, strict=True):
        if name in trainable:
            yield name, entry, group


def _kept_names(
    groups: list[Mapping[str, Any]],
    count: int,
    everything: Mapping[str, Tensor],
    trainable: Mapping[str, Tensor],
) -> list[str] | None:
    """The names that the optimizer was given, where they are this model's."""
    given = [name for group in groups for name in group.get("param_names", group["params"])]
    whole = [name for name in given if isinstance(name, str)]  # FSDP's whole states go by name
    bare = bare_names(whole)
    named = [bare[name] for name in whole]
    known = set(named) <= set(everything) or set(trainable) <= set(named)
    return named if len(named) == count and known else None


def _order(
    groups: list[Mapping[str, Any]],
    entries: list[Mapping[str, Any]],
    model: nn.Module,
    everything: Mapping[str, nn.Parameter],
    trainable: Mapping[str, nn.Parameter],
) -> list[str]:
    """The one order of the model's parameters, all or the trainable ones, that has the shapes of the states."""
    shapes: Shapes = [
        tuple(entry["exp_avg_sq"].shape) if "exp_avg_sq" in entry else None for entry in entries
    ]
    fitting_count = [each for each in (trainable, everything) if len(each) == len(shapes)]
    if not fitting_count:
        all_of_them = f" ({len(everything)} in all)" if len(everything) != len(trainable) else ""
        raise GradmatchError(
            f"the optimizer has {len(shapes)} parameters, the model {len(trainable)} trainable ones{all_of_them}; set "
            "requires_grad to False on those that it did not train",
            "optimizer_state",
        )
    parameters = fitting_count[0]
    orders = _orders(groups, shapes, model, parameters)
    fitting = [order for order in orders if _misfit(order, shapes, parameters) is None]
    if not fitting:
        names = list(parameters)
        wrong = _misfit(names, shapes, parameters) or 0
        raise GradmatchError(
            f"the optimizer's states do not fit the model: its parameter {wrong} has shape {list(shapes[wrong] or ())}, the "
            f"model's {names[wrong]!r} has {list(parameters[names[wrong]].shape)}. If it is the model that it trained, its "
            "groups are in an order that cannot be told: give the live optimizer, or train with named parameters",
            "shape_mismatch",
        )
    for other in fitting[1:]:
        one, two = next(pair for pair in zip(fitting[0], other, strict=True) if pair[0] != pair[1])
        raise GradmatchError(
            f"the optimizer's states fit the model in two ways: the same state could be that of {one!r} or of {two!r}. Give "
            "the live optimizer, or train with optimizer = AdamW(model.named_parameters()), which keeps the names",
            "optimizer_state",
        )
    return fitting[0]


def _misfit(order: list[str], shapes: Shapes, parameters: Mapping[str, Tensor]) -> int | None:
    """The first place at which a state has another shape than the parameter; None where all fit."""
    wanted = [tuple(parameters[name].shape) for name in order]
    places = enumerate(zip(shapes, wanted, strict=True))
    return next((place for place, (has, wants) in places if has not in (None, wants)), None)


def _orders(
    groups: list[Mapping[str, Any]], shapes: Shapes, model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> list[list[str]]:
    """The distinct orders in which training code gives parameters to these groups.

    With two groups those that are decayed first or last, by name, by kind of layer or by dimension, provided that the
    groups have these sizes; and the model's order cut into as many pieces as there are groups, in any order (the head
    first, or layers backwards). Two groups that differ in their weight decay are a split of the first sort, if any
    has these sizes and shapes.
    """
    sizes = [len(group["params"]) for group in groups]
    splits = [
        order for order in _splits(sizes, model, parameters) if _misfit(order, shapes, parameters) is None
    ]
    decays = {float(group.get("weight_decay", 0)) for group in groups}
    orders = splits if splits and len(decays) == 2 else [*splits, *_pieces(sizes, list(parameters))]
    return [order for place, order in enumerate(orders) if order not in orders[:place]]


def _splits(
    sizes: list[int], model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[list[str]]:
    """Decayed parameters before or after the others, by each of the usual rules."""
    if len(sizes) != 2:
        return
    norms = {
        f"{module}.{name}".lstrip(".")
        for module, layer in model.named_modules()
        if isinstance(layer, nn.LayerNorm)
        for name, _ in layer.named_parameters()
    }
    rules: tuple[Callable[[str], bool], ...] = (
        lambda name: bool(NO_DECAY.search(name)),
        lambda name: bool(NO_DECAY.search(name)) or name in norms,
        lambda name: parameters[name].dim() < 2,
    )
    for rule in rules:
        kept = [name for name in parameters if rule(name)]
        decayed = [name for name in parameters if not rule(name)]
        yield from (one + two for one, two in ((decayed, kept), (kept, decayed)) if len(one) == sizes[0])


def _pieces(sizes: list[int], names: list[str]) -> Iterator[list[str]]:
    """The model's order cut into one piece a group; the first is the model's order itself."""
    ways = (
        permutations(range(len(sizes)))
        if len(sizes) <= FEW_GROUPS
        else (range(len(sizes)), range(len(sizes))[::-1])
    )
    for way in ways:
        pieces: dict[int, list[str]] = {}
        start = 0
        for group in way:
            pieces[group] = names[start : start + sizes[group]]
            start += sizes[group]
        yield [name for group in sorted(pieces) for name in pieces[group]]
