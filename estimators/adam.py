"""Curvature from Adam's second moment, free of charge where the optimizer's state was kept.

For gradients that are means over batches of B examples, E[g_B^2] = gbar^2 + Var(g_n) / B, so near an optimum, where the
mean gradient gbar is small, the Fisher is F ~ B v_hat with v_hat = exp_avg_sq / (1 - beta2^step), and H = N B v_hat.
Far from an optimum gbar^2 is counted B-fold: it is an approximation. What else a training loop does to the gradient
(means over tokens, clipping, accumulation) is undone where the Trainer's files tell it (`steps.py`), settled by a few
examples (`calibrate`), or refused. Decoupled weight decay (AdamW) leaves v alone. Adam's own is part of its gradient,
g_B + wd theta, whose mean is zero at the regularised optimum, so that v is the Fisher there as well.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradmatch.estimators.adam_state import (
    beta2_of,
    check_some_moment,
    checked_form,
    live_states,
    locate,
    moment,
    read_state,
    trace_of,
)
from gradmatch.estimators.blocks import check_count, units
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError, within
from gradmatch.estimators.estimation import estimate
from gradmatch.estimators.fingerprint import fingerprint, model_sampler
from gradmatch.estimators.matching import name_states
from gradmatch.estimators.problem import trainable_parameters
from gradmatch.estimators.steps import Units, has_own_loss, of_run, own_loss
from gradmatch.estimators.trainer import Run, check_beside, read_run
from gradmatch.estimators.wrapped import unwrap

log = logging.getLogger(__name__)

PARTS = 8  # a calibration has at least so many batches, so that its error can be told
STEPS_OF_BFLOAT16 = 128  # after n steps a step changes v by 1/n of it; bfloat16 holds 8 bits


def from_adam(
    state: torch.optim.Optimizer | Mapping[str, Any] | str | os.PathLike[str],
    model: nn.Module,
    *,
    num_examples: int,
    batch_size: int | None = None,
    calibrate: Iterable[Any] | None = None,
) -> Curvature:
    """Curvature of the summed loss from the state of Adam or AdamW.

    Args:
        state: a live optimizer, its state_dict, or the `optimizer.pt` that transformers' Trainer writes into a
            checkpoint (or that folder); files are read with weights_only=True. Beside a file the Trainer's own files are
            read too: what they tell of batches, accumulation and clipping is undone, and the model there must be the one given.
        model: the model it trained; states are matched to its trainable parameters by identity, by the names that the
            optimizer kept, or by order, and checked by shape. Parameters that are frozen are left out.
        num_examples: N, the size of the training set.
        batch_size: examples whose mean gradient made one step, all devices and accumulation steps together; may be left out
            where the Trainer's files tell it. Without such files the loss is taken for the model's own (of a module that is not
            of transformers: a mean over examples of -log p), and gradients for unclipped.
        calibrate: batches of a few examples with true labels, as for `estimate`. The curvature as a whole is then scaled so that its trace is
            that of their empirical Fisher at this model, whatever the units of the state were.

    Returns:
        Per-example means; `info["assumed"]` says what they rest on, `info["scale_error"]` how well the scale is known.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, another optimizer's state, amsgrad, no step taken, a parameter without state,
            parameters that do not fit the model, or in several ways, a state of another model than the one given, a batch size
            that is not the run's, or a step whose scale is not known; each is named.
        TypeError: num_examples or batch_size is no whole number, or `state` is none of the above.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(4, 2)).mean().backward()
        >>> optimizer.step()
        >>> from_adam(optimizer, model, num_examples=100, batch_size=4)["bias"]  # 4 x 1^2
        tensor([4.])
    """
    check_count("num_examples", num_examples)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    model = unwrap(model)
    parameters = trainable_parameters(model)
    file = locate(Path(state).expanduser()) if isinstance(state, (str, os.PathLike)) else None
    stored: Mapping[str, Any] | None = read_state(file) if file else None
    run = read_run(file.parent) if file else None
    with within(file, "optimizer_state") if file else nullcontext():
        if isinstance(state, torch.optim.Optimizer):
            found = list(live_states(state, parameters))
        elif stored is not None:
            found = list(name_states(check_some_moment(stored), model, parameters))
        elif isinstance(state, Mapping):
            found = list(name_states(check_some_moment(checked_form(state)), model, parameters))
        else:
            raise TypeError(
                f"state must be an optimizer, its state_dict or a file, got {type(state).__name__}"
            )
        mean = {name: moment(name, parameters[name], entry, group) for name, entry, group in found}
    beside = check_beside(file.parent, parameters) if file else ""
    trace = trace_of(stored) if stored is not None else 0.0
    missing = sorted(set(parameters) - set(mean))
    if missing:
        raise GradmatchError(
            f"the optimizer has no state for {missing[0]!r} ({len(missing)} in all): it was not trained by it, or never had a "
            "gradient; set requires_grad to False on it to leave it out",
            "optimizer_state",
            missing[0],
        )
    mean = {name: mean[name] for name in parameters}
    batch_size = _batch_size(batch_size, run, calibrate is not None)
    steps, beta2 = max(float(entry["step"]) for _, entry, _ in found), beta2_of(found[0][2])
    if calibrate is not None:
        known = _calibrated(mean, model, calibrate)
    elif run is not None:
        known = of_run(run, model, batch_size, num_examples, trace, beta2, steps)
    else:
        known = _as_told(model, batch_size)
    kinds = {entry["exp_avg_sq"].dtype for _, entry, _ in found}
    if torch.bfloat16 in kinds and steps > STEPS_OF_BFLOAT16:
        (known.unknown if calibrate is None else known.assumed).append(
            f"moments are bfloat16, whose 8 bits lose what {steps:.0f} steps add up"
        )
    _check_known(known, file or "")
    for value in mean.values():
        value.mul_(known.factor)
    info = {
        "estimator": "adam",
        "reduction": "batch",
        "units": units(num_examples),
        "labels": "true labels",
        "batch_size": str(batch_size or "unknown"),
        "steps": f"{steps:.0f}",
        "beta2": f"{beta2:g}",
        "assumed": "; ".join(known.assumed),
        **({"scale_error": f"{known.error:.3g}"} if known.error else {}),
        **({"beside": beside} if beside else {}),
        "fingerprint": fingerprint(parameters, model_sampler(model)),
        "torch": torch.__version__,
    }
    log.info("Adam's moments: %s", info["assumed"])
    return Curvature.from_dict(mean, num_examples, info)


def _batch_size(given: int | None, run: Run | None, calibrated: bool) -> int:
    """Examples a step, from the caller or the run's files; 0 where nothing needs it."""
    told = run.batch_size if run is not None else 0
    if run is not None and given and told and given != told:
        raise GradmatchError(
            f"batch_size is {given}, but the run in {run.folder} made steps of {told} examples ({run.rows} rows x "
            f"{run.accumulation} passes x {run.processes} processes)", "batch_size", run.folder, "leave batch_size away",
        )  # fmt: skip
    if not (given or told or calibrated):
        why = "; ".join(run.unknown) if run else "no Trainer's training_args.bin lies beside the state"
        raise GradmatchError(
            f"the number of examples whose mean gradient made one step is not known: {why}", "batch_size",
            remedy="pass batch_size=, or calibrate=, a few dozen examples of the training set",
        )  # fmt: skip
    return given or told


def _as_told(model: nn.Module, batch_size: int) -> Units:
    """Units of a state without a run: what the caller says, and the loss of the model's kind."""
    words, share = own_loss(model)
    found = Units(float(batch_size))
    if share is not None:
        found.factor *= share**2
    elif has_own_loss(model):
        found.unknown.append(words)
    loss = words if share is not None else "a mean over examples of -log p"
    warnings.warn(
        "no file tells how gradients were scaled or clipped, so they are taken as not clipped; transformers' Trainer clips them at "
        "norm 1 by default, and the curvature is then too small, by thousands at times: keep training_args.bin and trainer_state.json "
        "beside the state, or pass calibrate= (--calibrate ROWS)",
        stacklevel=4,
    )
    found.assumed.append(
        f"the loss of a step is {loss}, {batch_size} examples a step, gradients not clipped; no file tells"
    )
    return found


def _check_known(known: Units, where: object) -> None:
    """Refuse a scale that is not known."""
    if known.unknown:
        raise GradmatchError(
            f"{f'{where}: ' if where else ''}the scale of these moments is not known: {'; '.join(known.unknown)}", "units", where,
            remedy="pass calibrate=, a few dozen examples of the training set, whose empirical Fisher then gives the scale",
        )  # fmt: skip


def _calibrated(mean: Mapping[str, Tensor], model: nn.Module, batches: Iterable[Any]) -> Units:
    """Units such that the trace is that of the empirical Fisher of these examples, per example."""
    if isinstance(batches, (Tensor, Mapping)):
        raise GradmatchError(
            f"calibrate is a single {type(batches).__name__}; it must yield batches: wrap it in a list",
            "optimizer_state",
        )
    measured = estimate(model, _in_parts(list(batches)), method="empirical_fisher", progress=False)
    there, here = measured.trace(), sum(float(value.sum(dtype=torch.float64)) for value in mean.values())
    if not there > 0 or not here > 0:
        raise GradmatchError(
            f"calibrate: the moments have a trace of {here:g}, the empirical Fisher {there:g}; neither may be 0",
            "optimizer_state",
        )
    seen, error = measured.info["examples_seen"], float(measured.info.get("relative_error", "inf"))
    known = (
        f"known to {100 * error:.0f} % (one standard error)" if error < math.inf else "which tells no error"
    )
    words = f"scaled as a whole by {there / here:.4g} to the trace of the empirical Fisher of {seen} examples"
    return Units(there / here, error, [f"{words}, {known}"])


def _in_parts(batches: list[Any]) -> list[Any]:
    """The batches, cut so that there are at least `PARTS`, where they have the rows."""
    if not batches or len(batches) >= PARTS:
        return batches
    pieces, each = [], -(-PARTS // len(batches))
    for given in batches:
        batch = dict(given) if isinstance(given, Mapping) else given
        size = next((v.shape[0] for v in pytree.tree_leaves(batch) if isinstance(v, Tensor) and v.dim()), 1)
        for first in range(0, size, max(1, size // each)):
            rows = slice(first, first + max(1, size // each))

            def cut(value: Any, rows: slice = rows, size: int = size) -> Any:
                batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == size
                return value[rows] if batched else value

            pieces.append(pytree.tree_map(cut, batch))
    return pieces
