"""BatchNorm statistics of a merged module, measured again on data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.stores import FileStore, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.output.writer import FolderSink


EMPTY = "the batches for recalibrating BatchNorm are empty"


def check_batches(base: Checkpoint, batches: Any) -> None:
    """Refuse a recalibration that cannot be done, before anything is merged.

    Raises:
        ValueError: no module to run and no config that describes one, or no batches.
    """
    if base.module is None and (base.folder is None or not architecture(base)):
        raise ValueError(
            "batchnorm='recalibrate' runs the model: pass the base as a module, or as a folder whose config.json names an "
            "architecture of transformers; or choose 'average' or 'copy'"
        )
    if hasattr(batches, "__len__") and not len(batches):
        raise ValueError(EMPTY)
    if batches is None:
        raise ValueError(
            "batchnorm='recalibrate' needs batches=... (inputs, (inputs, targets) tuples or dicts of tensors); from the command "
            "line choose 'average' or 'copy'"
        )


def architecture(base: Checkpoint) -> Any:
    """The class of transformers that the config names, or None."""
    import transformers

    names = (base.config or {}).get("architectures") or []
    return getattr(transformers, names[0], None) if names else None


def module_of(base: Checkpoint) -> Any:
    """What the statistics are measured on: the base's own module, or a new one of its config's architecture."""
    if base.module is not None:
        return copy.deepcopy(base.module)
    import transformers

    return architecture(base)(transformers.AutoConfig.from_pretrained(base.folder))


def recalibrate_folder(sink: FolderSink, batches: Iterable[Any]) -> None:
    """Measure the statistics of the weights that stand in an unpublished output, and write them to their places there.

    They are the same however often it is done, so that a run which is interrupted here repeats it.

    Raises:
        ValueError: no batches, or a module that does not take the output's tensors.
    """
    base = sink.plan.inputs.base
    store = FileStore([TensorFile(sink.folder / shard) for shard in sink.layout.shards])
    steps = {step.name: step for step in sink.plan.steps}
    found = recalibrate(base, Checkpoint(store, aliases=base.aliases), batches)
    for name, values in found.items():
        step = steps[base.aliases.get(name, name)]
        sink.write(step, 0, values.reshape(-1).to(torch_dtype(step.spec.dtype)))


def recalibrate(base: Checkpoint, merged: Mapping[str, Tensor], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean and variance of every BatchNorm layer's inputs under the merged weights, averaged over the batches.

    Args:
        base: a module, which is copied, or a folder whose config describes one.
        merged: its merged state.
        batches: what it is run on: tensors, (inputs, targets) tuples, or dicts of keyword arguments.

    Returns:
        The statistics by name, to be put into the merged state.

    Raises:
        ValueError: no batches, or a module that does not take the merged tensors.
    """
    import torch

    model = module_of(base)
    try:
        model.load_state_dict(dict(merged))
    except RuntimeError as error:
        raise ValueError(
            f"batchnorm='recalibrate': {type(model).__name__} does not take the merged tensors ({error}); pass the base as a module"
        ) from error
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
        raise ValueError(EMPTY)
    found = {
        f"{name}.{key}" if name else key: value.clone()
        for name, layer in layers.items()
        for key, value in layer.named_buffers(recurse=False)
    }
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"batchnorm='recalibrate': {name!r} is not finite; every batch needs finite inputs and more than one value a channel"
            )
    return found
