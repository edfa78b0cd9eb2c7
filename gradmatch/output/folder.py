"""A folder of tensors, config, tokenizer and card that is no merge of one plan: written aside, renamed into place when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import claim, replacing, write_atomically
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import FLOATING, SAFETENSORS_NAME, FileStore, Spec, spans, take, torch_dtype
from gradmatch.output.card import CARD, public, versions
from gradmatch.output.carried import carried, without_paths
from gradmatch.output.layout import Layout
from gradmatch.output.publishing import appearing, check_apart_from, place

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.stores import Store

SPAN = 2**22  # elements copied at a time
NOT_CONFIG = ("config.json", "generation_config.json")


def write_folder(
    out: str | os.PathLike[str],
    store: Store,
    config: Mapping[str, Any],
    card: Mapping[str, Any],
    *,
    beside_of: Path | None = None,
    reads: Sequence[Checkpoint] = (),
    apart: Mapping[str, Sequence[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write a folder that appears whole or not at all; one span of a tensor is in memory at a time.

    Args:
        out: the folder.
        store: the tensors, in the order in which they are written.
        config: of config.json; paths of this machine are left out of it.
        card: what gradmatch.json says, beside the versions of the libraries.
        beside_of: a model's folder whose tokenizer and other text files go along.
        reads: models that are read: the output must not lie in one of them.
        apart: names of a shard -> tensors that stand in it alone.
        metadata: of the shards in `apart`.
        texts: name -> content of other files.
        dtype: of floating tensors ("bfloat16"); None: as they are stored.
        shard_bytes: largest size of a file's values.
        overwrite: replace an output that is there.
        progress: show a bar.

    Returns:
        The folder, links followed.

    Raises:
        GradmatchError: the output lies on an input.
        FileExistsError: `out` is there and holds something, or what stands there is no output of this package.
        BlockingIOError: another process is writing it.
        OSError: no space left.
    """
    out = place(out)
    read = (path for model in reads for path in (model.path, model.folder) if path is not None)
    check_apart_from(out, read, "is read")
    wanted = SAFETENSORS_NAME[dtype] if dtype else None
    specs = {name: _in_dtype(store.spec(name), wanted) for name in store}
    layout = Layout(specs, shard_bytes, apart=apart, metadata=metadata)
    with appearing(out, "a folder of its own", overwrite) as folder:
        _write_shards(folder, store, layout, progress)
        files = {
            CARD: {**card, "versions": versions()},
            "config.json": without_paths(json.loads(json.dumps(config))),
        }
        for name in carried(beside_of) if beside_of else ():
            if name not in NOT_CONFIG or name not in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(beside_of / name, folder / name)  # type: ignore[operator]
                if name.endswith("config.json"):
                    files.setdefault(name, without_paths(json.loads((folder / name).read_bytes())))
        if len(layout.shards) > 1:
            write_atomically(folder / layout.index_name, layout.index())
        for name, content in files.items():
            write_atomically(folder / name, json.dumps(public(content), indent=2) + "\n")
        for name, text in (texts or {}).items():
            write_atomically(folder / name, text)
    return out


def _in_dtype(spec: Spec, dtype: str | None) -> Spec:
    return Spec(dtype, spec.shape) if dtype and spec.dtype in FLOATING else spec


def _write_shards(folder: Path, store: Store, layout: Layout, progress: bool) -> None:
    """Every shard, tensor by tensor."""
    import torch

    bar = None
    if progress:
        from tqdm import tqdm

        total = sum(spec.nbytes for spec in layout.specs.values())
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="write")
    try:
        for shard, names in layout.shards.items():
            header, size = layout.header(shard)
            with (folder / shard).open("wb") as file:
                claim(file.fileno(), size)
                file.write(header)
                for name in names:
                    spec = layout.specs[name]
                    _, start = layout.place[name]
                    file.seek(start)
                    for first, last in spans(spec.numel, SPAN):
                        values = take(store, name, first, last)
                        if not torch.isfinite(values).all():
                            raise GradmatchError(
                                f"{name!r} holds NaN or infinite values; a mixture of them gives no answer, find the model that they come from",
                                "not_finite",
                                name,
                            )
                        values = values.to(torch_dtype(spec.dtype)).contiguous()
                        file.write(values.view(torch.uint8).numpy().data)
                        if bar:
                            bar.update(values.nbytes)
                file.flush()
                os.fsync(file.fileno())
    finally:
        if bar:
            bar.close()


def replace_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Give some tensors of a folder new values, in their stored dtype; every file that holds one is replaced whole.

    Args:
        folder: with safetensors files.
        tensors: name in the files -> values of the stored shape.

    Raises:
        GradmatchError: a tensor that the folder does not hold in this shape.
    """
    import torch

    checkpoint = open_checkpoint(folder)
    store = checkpoint.store
    assert isinstance(store, FileStore)
    by_file: dict[Path, list[str]] = {}
    for name, value in tensors.items():
        if name not in store or store.spec(name).shape != tuple(value.shape):
            found = store.spec(name) if name in store else "nothing of that name"
            raise GradmatchError(
                f"{folder} holds {found} for {name!r}, and its new values are {list(value.shape)}; mix again",
                "shape_mismatch",
                name,
            )
        by_file.setdefault(store.files(name)[0][0].path, []).append(name)
    for path, names in by_file.items():
        places = {name: store.files(name)[0][1:] for name in names}
        with replacing(path) as aside:
            shutil.copyfile(path, aside)
            with aside.open("r+b") as file:
                for name in names:
                    value = tensors[name].detach().to(torch_dtype(store.spec(name).dtype)).contiguous()
                    first, last = places[name]
                    data = (
                        value.view(torch.uint8).numpy()
                        if value.dim()
                        else value.reshape(1).view(torch.uint8).numpy()
                    )
                    assert last - first == data.nbytes
                    file.seek(first)
                    file.write(data.data)
