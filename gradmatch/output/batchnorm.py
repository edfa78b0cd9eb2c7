"""BatchNorm statistics of a merged module, measured again on data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.batchnorm import batchnorm_statistics
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.loading import fill
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import FileStore, torch_dtype
from gradmatch.models.structure import Structure, architecture, build

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.output.writer import FolderSink


EMPTY = "the batches for recalibrating BatchNorm are empty"


def check_batches(base: Checkpoint, batches: Any) -> None:
    """Refuse a recalibration that cannot be done, before anything is merged.

    Raises:
        ValueError: no module to run and no config that describes one, or no batches.
    """
    if base.module is None and architecture(base.config) is None:
        raise GradmatchError(
            "batchnorm='recalibrate' runs the model: pass the base as a module, or as a folder whose config.json names an "
            "architecture of transformers; or choose 'average' or 'copy'",
            "bad_output",
        )
    if hasattr(batches, "__len__") and not len(batches):
        raise GradmatchError(EMPTY, "bad_output")
    if batches is None:
        raise GradmatchError(
            "batchnorm='recalibrate' needs batches=... (inputs, (inputs, targets) tuples or dicts of tensors); from the command "
            "line choose 'average' or 'copy'",
            "bad_output",
        )


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
    module = copy.deepcopy(base.module)
    if module is None:
        module = build(architecture(base.config), base.config or {})
    try:
        fill(module, open_checkpoint(merged))
    except ValueError as error:
        raise GradmatchError(
            f"batchnorm='recalibrate': {error}; pass the base as a module", "bad_output"
        ) from error
    count = 0

    def runs() -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
        nonlocal count
        for batch in batches:
            count += 1
            if isinstance(batch, Mapping):
                yield (), {key: value for key, value in batch.items() if key != "labels"}
            else:
                yield (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}

    measured = batchnorm_statistics(module, {}, runs())
    if not count:
        raise GradmatchError(EMPTY, "bad_output")
    stored = Structure(module).names(base).plain
    found = {stored[name]: value for name, value in measured.items() if name in stored}
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise GradmatchError(
                f"batchnorm='recalibrate': {name!r} is not finite; every batch needs finite inputs and more than one value a channel",
                "not_finite",
                name,
            )
    return found
