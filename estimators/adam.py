"""Curvature from Adam's second moment, free of charge where the optimizer's state was kept.

For gradients that are means over batches of B examples, E[g_B^2] = gbar^2 + Var(g_n) / B, so near an optimum, where the
mean gradient gbar is small, the Fisher is F ~ B v_hat with v_hat = exp_avg_sq / (1 - beta2^step), and H = N B v_hat.
Far from an optimum gbar^2 is counted B-fold, and clipped gradients make everything smaller: it is an approximation.
Decoupled weight decay (AdamW) leaves v alone. Adam's own is part of its gradient, g_B + wd theta, whose mean is zero at
the regularised optimum, so that v is the Fisher there as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.blocks import check_count
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.distributed import unwrap
from gradmatch.estimators.fingerprint import fingerprint, model_sampler
from gradmatch.estimators.matching import Entry, name_states
from gradmatch.estimators.problem import trainable_parameters


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
        model: the model it trained; states are matched to its trainable parameters by identity, by the names that the
            optimizer kept, or by order, and checked by shape. Parameters that are frozen are left out.
        num_examples: N, the size of the training set.
        batch_size: examples whose mean gradient made one step, all devices and accumulation steps together.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, not Adam's state, amsgrad, 8-bit states, no step taken, a parameter
            without state, or parameters that do not fit the model, or in several ways; each is named.
        TypeError: num_examples or batch_size is no whole number, or `state` is none of the above.
    """
    check_count("num_examples", num_examples)
    check_count("batch_size", batch_size)
    model = unwrap(model)
    parameters = trainable_parameters(model)
    if isinstance(state, torch.optim.Optimizer):
        found = list(_live(state, parameters))
    else:
        if not isinstance(state, (Mapping, str, os.PathLike)):
            raise TypeError(
                f"state must be an optimizer, its state_dict or a file, got {type(state).__name__}"
            )
        stored = _checked_form(state) if isinstance(state, Mapping) else _read(state)
        _check_some_moment(stored)
        found = list(name_states(stored, model, parameters))
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
    file = Path(path).expanduser()
    file = file / "optimizer.pt" if file.is_dir() else file
    if not file.exists():
        raise FileNotFoundError(f"no optimizer state at {file}")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler trips over first
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise ValueError(
            f"{file} cannot be read ({reason}): it is cut short, no file of torch.save, or holds more than tensors and numbers; "
            "save optimizer.state_dict(), not the optimizer"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, not an optimizer's state_dict")
    return _checked_form(loaded, f"{file} is no")


def _checked_form(state: Mapping[str, Any], what: str = "this is no") -> Mapping[str, Any]:
    """A state_dict as torch's optimizers write it.

    Raises:
        ValueError: no such mapping; the part that looks like one is named.
    """
    if {"state", "param_groups"} <= set(state):
        return state
    inside = [
        key
        for key, value in state.items()
        if isinstance(value, Mapping) and {"state", "param_groups"} <= set(value)
    ]
    hint = f"; its part {inside[0]!r} is one: give that" if inside else ""
    raise ValueError(f"{what} optimizer's state_dict: it lacks 'state' and 'param_groups'{hint}")


def _check_some_moment(state: Mapping[str, Any]) -> None:
    """Refuse another optimizer's state before its numbers are given names.

    Raises:
        ValueError: quantised states, or none with a second moment.
    """
    entries = state["state"].values()
    for number, entry in state["state"].items():
        _check_precise(f"parameter {number}", entry)
    if not any("exp_avg_sq" in entry for entry in entries):
        held = ", ".join(sorted({str(key) for entry in entries for key in entry})) or "nothing"
        raise ValueError(
            f"the optimizer's state has no exp_avg_sq for any parameter (it holds {held}): only Adam and AdamW have one, "
            "after a step"
        )


def _check_precise(name: str, entry: Mapping[str, Any]) -> None:
    """Refuse the states of bitsandbytes.

    Raises:
        ValueError: they are.
    """
    if {"state1", "absmax2", "qmap2"} & set(entry):
        raise ValueError(
            f"the state of {name} is that of bitsandbytes, quantised to 8 bits; train with torch's own Adam or AdamW"
        )


def _live(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[Entry]:
    """States by the identity of their parameters.

    Raises:
        ValueError: the optimizer holds none of the model's parameters.
    """
    names = {id(value): name for name, value in parameters.items()}
    pairs = [(value, group) for group in optimizer.param_groups for value in group["params"]]
    if not any(id(value) in names for value, _ in pairs):
        raise ValueError(
            f"the optimizer holds {len(pairs)} parameters, none of them this model's (a copy, or loaded again?): give the "
            "model that it trains, or optimizer.state_dict(), whose states are matched by order"
        )
    for value, group in pairs:
        if id(value) in names:
            yield names[id(value)], optimizer.state.get(value, {}), group


def _moment(name: str, parameter: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """v_hat of one parameter.

    Raises:
        ValueError: what is wrong with its state.
    """
    if group.get("amsgrad"):
        raise ValueError(
            "amsgrad keeps a running maximum, not a mean of squares; curvature cannot be read off it"
        )
    _check_precise(repr(name), entry)
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
