"""BatchNorm statistics of a merged module, measured again on data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.checkpoint import Checkpoint


def check_batches(base: Checkpoint, batches: Any, out: Any) -> None:
    """Refuse a recalibration that cannot be done, before anything is merged.

    Raises:
        ValueError: no module to run, no batches, or an output folder.
    """
    if base.module is None:
        raise ValueError(
            "batchnorm='recalibrate' runs the model: pass the base as a module, or choose 'average' or 'copy'"
        )
    if batches is None:
        raise ValueError(
            "batchnorm='recalibrate' needs batches=... (inputs, (inputs, targets) tuples or dicts of tensors)"
        )
    if out is not None:
        raise ValueError(
            "batchnorm='recalibrate' works in memory: merge without `out`, load the result and save the module"
        )


def recalibrate(module: Any, merged: Mapping[str, Tensor], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean and variance of every BatchNorm layer's inputs under the merged weights, averaged over the batches.

    Args:
        module: of the architecture; it is copied, not changed.
        merged: its merged state.
        batches: what it is run on: tensors, (inputs, targets) tuples, or dicts of keyword arguments.

    Returns:
        The statistics by name, to be put into the merged state.

    Raises:
        ValueError: no batches.
    """
    import torch

    model = copy.deepcopy(module)
    model.load_state_dict(dict(merged))
    model.eval()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    }
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    seen = 0
    with torch.no_grad():
        for batch in batches:
            seen += 1
            if isinstance(batch, Mapping):
                model(**{key: value for key, value in batch.items() if key != "labels"})
            else:
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    if not seen:
        raise ValueError("the batches for recalibrating BatchNorm are empty")
    return {
        f"{name}.{key}" if name else key: value.clone()
        for name, layer in layers.items()
        for key, value in layer.named_buffers(recurse=False)
    }
