"""What a model must be for per-example curvature to exist: deterministic, and without influence between rows."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.general import differentiable
from gradmatch.estimators.memory import raise_if_full
from gradmatch.estimators.uses import watchable

log = logging.getLogger(__name__)


def check_determinism(model: nn.Module, batch: Batch, output: Any) -> None:
    """A second run must give the output of the first: dropout that ignores eval mode would be measured as curvature.

    Every module's outputs are compared only where the model's own differ: to keep them all takes memory.
    """
    with torch.no_grad():
        again = differentiable(model(*batch.args, **batch.kwargs))
    first = differentiable(output)
    if len(first) == len(again) and all(
        _close(one, other, 1e-5) for (_, one), (_, other) in zip(first, again, strict=True)
    ):
        return
    del again
    for (name, kind, one), (_, _, other) in zip(_outputs(model, batch), _outputs(model, batch), strict=False):
        if not _close(one, other, 1e-5):
            raise GradmatchError(
                f"two runs of the model in eval mode differ, first at {name or 'the model itself'} ({kind}): it is random "
                "(dropout that is always on?) or keeps state from one run to the next; make it deterministic",
                "unsupported_model",
            )


def check_inputs_kept(given: Batch, used: Batch) -> None:
    """A run must leave its inputs as they are: they are used again."""
    pairs = zip(
        pytree.tree_leaves((given.args, given.kwargs)),
        pytree.tree_leaves((used.args, used.kwargs)),
        strict=True,
    )
    for before, after in pairs:
        if isinstance(before, Tensor) and not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):
            raise GradmatchError(
                f"the model changes its input of shape {list(before.shape)} in place, but estimates use inputs again: let it "
                "work on a copy (x = x - mean, not x -= mean)",
                "unsupported_model",
            )


def check_independence(model: nn.Module, batch: Batch, output: Any) -> None:
    """The outputs for a row must not change when the last row is taken away; `output` is the whole batch's."""
    if batch.size < 2:
        return
    less = batch.rows(0, batch.size - 1)
    try:
        with torch.no_grad():
            found = differentiable(model(*less.args, **less.kwargs))
    except Exception as error:  # some models need the very batch they were given
        raise_if_full(error)
        log.debug("the model does not run on fewer rows: %s", error)
        return
    if all(
        _rows_stay(one, other)
        for (_, one), (_, other) in zip(differentiable(output)[:1], found, strict=False)
    ):
        return
    del found
    culprit = _culprit(model, batch)
    if culprit:
        raise GradmatchError(
            "the model mixes the examples of a batch (its output for one row depends on the other rows), so per-example "
            f"curvature does not exist; the first module that does so is {culprit}",
            "unsupported_model",
        )


def _culprit(model: nn.Module, batch: Batch) -> str:
    """The first module whose output for a row changes when the last row is taken away; "" where the whole's does not."""
    changed = []
    for (name, kind, value), (_, _, less) in zip(
        _outputs(model, batch), _outputs(model, batch.rows(0, batch.size - 1)), strict=False
    ):
        if not _rows_stay(value, less):
            changed.append((name, f"{name or 'the model itself'} ({kind})"))
    return changed[0][1] if changed and changed[-1][0] == "" else ""


def _rows_stay(value: Tensor, less: Tensor) -> bool:
    """Whether the rows of an output are those of the output without the last row; other shapes tell nothing."""
    if not value.dim() or less.shape != (value.shape[0] - 1, *value.shape[1:]):
        return True
    return _close(value[:-1], less, 1e-3 if value.dtype in (torch.float32, torch.float64) else 5e-2, value)


def _close(one: Tensor, other: Tensor, tolerance: float, scale: Tensor | None = None) -> bool:
    """Within a share of the largest value; compared row by row, so that no copy of the whole is made."""
    if one.shape != other.shape:
        return False
    scale = one if scale is None else scale
    if not one.numel():
        return True
    limit = tolerance * float(torch.linalg.vector_norm(scale.detach().float(), torch.inf))
    rows = zip(one.detach(), other.detach(), strict=True) if one.dim() else [(one.detach(), other.detach())]
    return not any(float((a - b).abs().max()) > limit for a, b in rows)


def _outputs(model: nn.Module, batch: Batch) -> list[tuple[str, str, Tensor]]:
    """The first floating output of every module, innermost first, in the order in which they finish."""
    found: list[tuple[str, str, Tensor]] = []

    def note(name: str, module: nn.Module, output: Any) -> None:
        values = differentiable(output)
        if values:
            found.append((name, type(module).__name__, values[0][1].detach()))

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in watchable(model)
    ]
    try:
        with torch.no_grad():
            model(*batch.args, **batch.kwargs)
    except Exception as error:  # some models need the very batch they were given
        raise_if_full(error)
        log.debug("the model does not run on fewer rows: %s", error)
    finally:
        for handle in handles:
            handle.remove()
    return found
