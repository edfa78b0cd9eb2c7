"""Curvature from Adam's second moment, free of charge where the optimizer's state was kept.

For gradients that are means over batches of B examples, E[g_B^2] = gbar^2 + Var(g_n) / B, so near an optimum, where the
mean gradient gbar is small, the Fisher is F ~ B v_hat with v_hat = exp_avg_sq / (1 - beta2^step), and H = N B v_hat.
Far from an optimum gbar^2 is counted B-fold, and clipped gradients make everything smaller: it is an approximation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from estimators.curvature import Curvature, check_num_examples
from estimators.fingerprint import fingerprint, model_sampler
from estimators.problem import trainable_parameters

# The parameters that transformers' Trainer keeps out of weight decay, in a second group.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def second_moment(exp_avg_sq: Tensor, step: float, beta2: float) -> Tensor:
    """v_hat = exp_avg_sq / (1 - beta2^step), Kingma & Ba 2015; any shape."""
    correction: float = 1 - beta2**step
    return exp_avg_sq.to(torch.float32) / correction


def from_adam(
    state: torch.optim.Optimizer | Mapping[str, Any] | str | os.PathLike[str],
    model: nn.Module,
    *,
    num_examples: int,
    batch_size: int,
) -> Curvature:
    """Curvature of the summed loss from the state of Adam or AdamW.

    Args:
        state: a live optimizer, its state_dict, or the `optimizer.pt` that transformers' Trainer writes beside a
            checkpoint (or the folder it is in); files are read with weights_only=True.
        model: the model it trained; states are matched to its trainable parameters by identity or by order, and checked
            by shape.
        num_examples: N, the size of the training set.
        batch_size: examples whose mean gradient made one step, all devices and accumulation steps together.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not Adam's state, amsgrad, 8-bit states, no step taken, a parameter without state, or parameters that
            do not fit the model; each is named.
        TypeError: num_examples or batch_size is no whole number.
    """
    check_num_examples(num_examples)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise TypeError(f"batch_size must be a whole number, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parameters = trainable_parameters(model)
    if isinstance(state, torch.optim.Optimizer):
        found = list(_live(state, parameters))
    else:
        found = list(_stored(state if isinstance(state, Mapping) else _read(state), parameters))
    mean = {name: batch_size * _moment(name, parameters[name], entry, group) for name, entry, group in found}
    missing = sorted(set(parameters) - set(mean))
    if missing:
        raise ValueError(
            f"the optimizer has no state for {missing[0]!r} ({len(missing)} in all): it was not trained by it, or never had a "
            "gradient; set requires_grad to False on it to leave it out"
        )
    info = {
        "estimator": "adam",
        "labels": "true labels",
        "batch_size": str(batch_size),
        "fingerprint": fingerprint(parameters, model_sampler(model)),
        "torch": torch.__version__,
    }
    return Curvature.from_dict({name: mean[name] for name in parameters}, num_examples, info)


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    file = Path(path)
    file = file / "optimizer.pt" if file.is_dir() else file
    if not file.exists():
        raise FileNotFoundError(f"no optimizer state at {file}")
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping) or not {"state", "param_groups"} <= set(loaded):
        raise ValueError(f"{file} is no optimizer's state_dict: it lacks 'state' and 'param_groups'")
    return loaded


Entry = tuple[str, Mapping[str, Any], Mapping[str, Any]]  # name, state of the parameter, its group


def _live(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[Entry]:
    names = {id(value): name for name, value in parameters.items()}
    for group in optimizer.param_groups:
        for value in group["params"]:
            if id(value) in names:
                yield names[id(value)], optimizer.state.get(value, {}), group


def _stored(state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> Iterator[Entry]:
    """Names for the numbered states of a state_dict.

    Raises:
        ValueError: no way of ordering the model's parameters gives the shapes of the states, or several do.
    """
    groups = state["param_groups"]
    pairs = [(state["state"].get(number, {}), group) for group in groups for number in group["params"]]
    shapes = [tuple(entry["exp_avg_sq"].shape) if "exp_avg_sq" in entry else None for entry, _ in pairs]
    if len(pairs) != len(parameters):
        raise ValueError(
            f"the optimizer has {len(pairs)} parameters, the model {len(parameters)} trainable ones"
        )
    orders = _orders(groups, shapes, parameters)
    fitting = [order for order in orders if _misfit(order, shapes, parameters) is None]
    if not fitting:
        wrong = _misfit(orders[0], shapes, parameters) or 0
        raise ValueError(
            f"the optimizer's states do not fit the model: its parameter {wrong} has shape {list(shapes[wrong] or ())}, the "
            f"model's {orders[0][wrong]!r} has {list(parameters[orders[0][wrong]].shape)}"
        )
    for other in fitting[1:]:
        one, two = next(pair for pair in zip(fitting[0], other, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"the optimizer's states fit the model in two ways: the same state could be that of {one!r} or of {two!r}. Give "
            "the live optimizer, or train with optimizer = AdamW(model.named_parameters()), which keeps the names"
        )
    for name, (entry, group) in zip(fitting[0], pairs, strict=True):
        yield name, entry, group


def _misfit(order: list[str], shapes: list[Any], parameters: Mapping[str, nn.Parameter]) -> int | None:
    """The first place at which a state has another shape than the parameter; None where all fit."""
    wanted = [tuple(parameters[name].shape) for name in order]
    places = enumerate(zip(shapes, wanted, strict=True))
    return next((place for place, (has, wants) in places if has not in (None, wants)), None)


def _orders(
    groups: list[Mapping[str, Any]], shapes: list[Any], parameters: Mapping[str, nn.Parameter]
) -> list[list[str]]:
    """The distinct orders in which training code gives parameters to these groups.

    Their own names, where the optimizer kept them. Else the model's order; with two groups also those that are decayed
    first or last, by name or by dimension, provided that the groups have these sizes. Groups that differ
    in their weight decay are such a split, if any has these sizes and shapes.
    """
    names = list(parameters)
    named = [name for group in groups for name in group.get("param_names", [])]
    if len(named) == len(names) and set(named) == set(names):
        return [named]
    sizes = [len(group["params"]) for group in groups]
    splits: list[list[str]] = []
    if len(sizes) == 2:
        rules: tuple[Callable[[str], bool], ...] = (
            lambda name: bool(NO_DECAY.search(name)),
            lambda name: parameters[name].dim() < 2,
        )
        for rule in rules:
            kept = [name for name in names if rule(name)]
            decayed = [name for name in names if not rule(name)]
            splits += [a + b for a, b in ((decayed, kept), (kept, decayed)) if len(a) == sizes[0]]
    splits = [order for order in splits if _misfit(order, shapes, parameters) is None]
    decays = {float(group.get("weight_decay", 0)) for group in groups}
    orders = splits if splits and len(decays) == 2 else [*splits, names]
    return [order for place, order in enumerate(orders) if order not in orders[:place]]


def _moment(name: str, parameter: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """v_hat of one parameter.

    Raises:
        ValueError: what is wrong with its state.
    """
    if group.get("amsgrad"):
        raise ValueError(
            "amsgrad keeps a running maximum, not a mean of squares; curvature cannot be read off it"
        )
    if "state1" in entry or "absmax2" in entry or "qmap2" in entry:
        raise ValueError(
            f"the state of {name!r} is quantised to 8 bits; train with torch's own Adam or AdamW"
        )
    if "exp_avg_sq" not in entry:
        held = ", ".join(sorted(entry)) or "nothing"
        raise ValueError(
            f"the optimizer's state of {name!r} has no exp_avg_sq (it holds {held}): only Adam and AdamW have one, after a step "
            "in which the parameter had a gradient; set requires_grad to False on it to leave it out"
        )
    value = entry["exp_avg_sq"]
    if value.shape != parameter.shape:
        raise ValueError(
            f"the state of {name!r} has shape {list(value.shape)}, the parameter {list(parameter.shape)}"
        )
    step = float(entry.get("step", 0))
    if step < 1:
        raise ValueError(f"the optimizer has taken no step on {name!r} yet")
    return second_moment(value, step, float(group["betas"][1]))
