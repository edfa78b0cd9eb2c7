"""The state of Adam or AdamW as torch writes it: found, read without unpickling code, and told from other optimizers' states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.matching import Entry

STATES = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "mu_product"}  # the last is NAdam's
OTHERS = {  # by what only their states hold
    "exp_avg_sq_row": "Adafactor, which keeps rows and columns of the squares",
    "qmap2": "bitsandbytes, quantised to 8 bits",
    "state2": "bitsandbytes, quantised to 8 bits or under names of its own",
    "exp_inf": "Adamax, which keeps a maximum",
    "z": "a schedule-free optimizer",
}
MEASURE = "train with torch's own Adam or AdamW, or measure the curvature on data instead (`gradmatch estimate MODEL --data FILE`)"
SHARDS = ("optimizer_0", "optimizer_0_rank*.bin", "global_step*", "*_optim_states.pt", "pytorch_model_fsdp_0")


def second_moment(exp_avg_sq: Tensor, step: float, beta2: float) -> Tensor:
    """v_hat = exp_avg_sq / (1 - beta2^step), Kingma & Ba 2015; any shape."""
    correction: float = 1 - beta2**step
    return exp_avg_sq.to(torch.float32) / correction


def locate(path: Path) -> Path:
    """The file of a whole state: itself, or the one in a folder."""
    if not path.is_dir():
        if path.exists():
            return path
        raise FileNotFoundError(f"no optimizer state at {path}")
    whole = [path / name for name in ("optimizer.pt", "optimizer.bin") if (path / name).is_file()]
    if whole:
        return whole[0]
    shards = [found.name for pattern in SHARDS for found in sorted(path.glob(pattern))]
    if shards:
        raise GradmatchError(
            f"{path} holds the optimizer's state in shards ({shards[0]}, of FSDP or DeepSpeed): gather it into one "
            "state_dict first (FSDP: StateDictType.FULL_STATE_DICT), whose file is optimizer.bin",
            "optimizer_state",
            path,
        )
    raise FileNotFoundError(f"no optimizer state at {path / 'optimizer.pt'}")


def read_state(file: Path) -> Mapping[str, Any]:
    """An optimizer's state_dict from its file."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler trips over first
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise GradmatchError(
            f"{file} cannot be read ({reason}): it is cut short, no file of torch.save, or holds more than tensors and numbers; "
            "save optimizer.state_dict(), not the optimizer",
            "unreadable_file",
            file,
        ) from error
    if not isinstance(loaded, Mapping):
        raise GradmatchError(
            f"{file} holds a {type(loaded).__name__}, not an optimizer's state_dict", "optimizer_state", file
        )
    return checked_form(loaded, f"{file} is no")


def checked_form(state: Mapping[str, Any], what: str = "this is no") -> Mapping[str, Any]:
    """A state_dict as torch's optimizers write it."""
    if {"state", "param_groups"} <= set(state):
        entries, groups = state["state"], state["param_groups"]
        if not isinstance(entries, Mapping) or not all(
            isinstance(entry, Mapping) for entry in entries.values()
        ):
            raise GradmatchError(
                f"{what} optimizer's state_dict: its 'state' is no mapping of mappings", "optimizer_state"
            )
        if not isinstance(groups, list) or not all(
            isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups
        ):
            raise GradmatchError(
                f"{what} optimizer's state_dict: its 'param_groups' are no list of groups with 'params'",
                "optimizer_state",
            )
        return state
    inside = [
        f"{key}[0]" if isinstance(value, list) else key  # Lightning lists those of several optimizers
        for key, value in state.items()
        for one in (value[:1] if isinstance(value, list) else [value])
        if isinstance(one, Mapping) and {"state", "param_groups"} <= set(one)
    ]
    hint = f"; its part {inside[0]!r} is one: give that" if inside else ""
    raise GradmatchError(
        f"{what} optimizer's state_dict: it lacks 'state' and 'param_groups'{hint}", "optimizer_state"
    )


def check_some_moment(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse another optimizer's state before its numbers are given names."""
    entries = state["state"].values()
    for number, entry in state["state"].items():
        _check_precise(f"parameter {number}", entry)
    if not any("exp_avg_sq" in entry for entry in entries):
        held = ", ".join(sorted({str(key) for entry in entries for key in entry})) or "nothing"
        raise GradmatchError(
            f"the optimizer's state has no exp_avg_sq for any parameter (it holds {held}): only Adam and AdamW have one, "
            "after a step",
            "optimizer_state",
            remedy=MEASURE,
        )
    return state


def _check_precise(name: str, entry: Mapping[str, Any]) -> None:
    """Refuse the states of other optimizers, which may hold an exp_avg_sq of another meaning."""
    known = next((words for key, words in OTHERS.items() if key in entry), None)
    if known is not None:
        raise GradmatchError(
            f"the state of {name} is that of {known}",
            "optimizer_state",
            name,
            MEASURE,
        )
    strange = sorted(str(key) for key in set(entry) - STATES)
    if "exp_avg_sq" in entry and strange:
        raise GradmatchError(
            f"the state of {name} holds {', '.join(strange)} besides exp_avg_sq: it is not that of torch's Adam or AdamW, and its "
            "exp_avg_sq may be another quantity",
            "optimizer_state",
            name,
            MEASURE,
        )


def live_states(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[Entry]:
    """States by the identity of their parameters."""
    names = {id(value): name for name, value in parameters.items()}
    pairs = [(value, group) for group in optimizer.param_groups for value in group["params"]]
    if not any(id(value) in names for value, _ in pairs):
        raise GradmatchError(
            f"the optimizer holds {len(pairs)} parameters, none of them this model's (a copy, or loaded again?): give the "
            "model that it trains, or optimizer.state_dict(), whose states are matched by order",
            "optimizer_state",
        )
    for value, group in pairs:
        if id(value) in names:
            yield names[id(value)], optimizer.state.get(value, {}), group


def moment(name: str, parameter: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """v_hat of one parameter."""
    if group.get("amsgrad"):
        raise GradmatchError(
            "amsgrad keeps a running maximum, not a mean of squares; curvature cannot be read off it",
            "optimizer_state",
        )
    _check_precise(repr(name), entry)
    if "exp_avg_sq" not in entry:
        held = ", ".join(sorted(entry)) or "nothing"
        raise GradmatchError(
            f"the optimizer's state of {name!r} has no exp_avg_sq (it holds {held}): only Adam and AdamW have one, after a step "
            "in which the parameter had a gradient; set requires_grad to False on it to leave it out",
            "optimizer_state",
            name,
        )
    value = entry["exp_avg_sq"]
    plain = type(value) is Tensor and value.layout == torch.strided and value.is_floating_point()
    if not plain or value.dtype == torch.float16:
        kind = value.dtype if type(value) is Tensor else f"a {type(value).__name__}"
        raise GradmatchError(
            f"exp_avg_sq of {name!r} is {kind}: float32 is needed (16-bit floats hold nothing below 6e-8, most of it)",
            "optimizer_state",
            name,
        )
    if value.shape != parameter.shape:
        raise GradmatchError(
            f"the state of {name!r} has shape {list(value.shape)}, the parameter {list(parameter.shape)}",
            "shape_mismatch",
            name,
        )
    step, beta2 = float(entry.get("step", 0)), beta2_of(group)
    if step < 1:
        raise GradmatchError(f"the optimizer has taken no step on {name!r} yet", "optimizer_state", name)
    if bool((value < 0).any()):
        raise GradmatchError(
            f"exp_avg_sq of {name!r} has negative values: it is no mean of squares", "not_positive", name
        )
    return second_moment(value, step, beta2)


def beta2_of(group: Mapping[str, Any]) -> float:
    """The weight with which Adam's mean of squares keeps its past."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not 0 <= float(betas[1]) < 1:
        raise GradmatchError(
            f"a group of the optimizer has betas {betas!r}: Adam has two, from 0 to below 1",
            "optimizer_state",
        )
    return float(betas[1])


def trace_of(state: Mapping[str, Any]) -> float:
    """Sum of v_hat over everything that was trained: the mean squared norm of a step's gradient."""
    pairs = [(state["state"].get(n, {}), group) for group in state["param_groups"] for n in group["params"]]
    total = 0.0
    for entry, group in pairs:
        value, step = entry.get("exp_avg_sq"), float(entry.get("step", 0))
        if value is not None and step >= 1:
            total += float(value.sum(dtype=torch.float64)) / (1 - beta2_of(group) ** step)
    return total
