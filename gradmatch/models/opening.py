"""Opening a model in any form; headers only are read.

A folder as transformers saves it (one or many shards), a safetensors file, a hub id, a PEFT adapter folder, a state dict or a
module. Nothing is unpickled unless asked for, and then with weights_only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gradmatch.common.files import read_json
from gradmatch.common.names import nearest
from gradmatch.common.settings import FIRST
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.adapter_config import CONFIG, named_base
from gradmatch.models.adapters import open_adapter
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.reference import split_adapter, split_revision
from gradmatch.models.stores import FileStore, MemoryStore

if TYPE_CHECKING:
    from gradmatch.models.task import Model

INDEX = "model.safetensors.index.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
# What is fetched of a hub repository: no pickles; code is carried along and never run.
WANTED = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "*.codes", "*.bpe", "*.vocab", "*.merges", "*.py",
)  # fmt: skip


def open_checkpoint(
    path: Model | Checkpoint, *, base: Checkpoint | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Open any model as a lazy mapping name -> tensor.

    Args:
        path: folder, safetensors file, hub id ("me/base", "me/base@revision"), PEFT adapter folder, "model+adapter", state dict or
            module.
        base: the model that an adapter is expanded on; None: the one that its config names.
        allow_pickle: read .bin / .pt files too, with weights_only.

    Raises:
        FileNotFoundError: nothing is there, or the hub cannot be reached.
        ValueError: corrupt or truncated files, an index that leaves its folder, a pickle that was not asked for, a quantised
            model, an adapter of a kind that cannot be expanded.
        TypeError: nothing that a checkpoint can be opened from.
    """
    if isinstance(path, Checkpoint):
        return path
    if not isinstance(path, (str, os.PathLike)):
        return _in_memory(path)
    model, adapter = split_adapter(str(path))
    if adapter:
        return open_checkpoint(
            adapter_folder(adapter, str(path)),
            base=open_checkpoint(model, allow_pickle=allow_pickle),
            allow_pickle=allow_pickle,
        )
    folder = Path(path).expanduser()
    if folder.is_file():
        return _from_file(folder, allow_pickle)
    if not folder.is_dir():
        folder = from_hub(str(path))
    if (folder / CONFIG).is_file():
        return open_adapter(
            folder,
            base or open_checkpoint(named_base(folder), allow_pickle=allow_pickle),
            allow_pickle=allow_pickle,
        )
    return _from_folder(folder, allow_pickle)


def adapter_folder(adapter: str, whole: str) -> Path:
    """The folder of the adapter in "model+adapter".

    Raises:
        ValueError: it is none.
    """
    folder = Path(adapter).expanduser()
    folder = folder if folder.exists() else from_hub(adapter)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{whole!r}: what stands behind the + must be an adapter, and {adapter} has no {CONFIG}; two models are two tasks"
        )
    return folder


def _in_memory(model: Any) -> Checkpoint:
    """A state dict or a module; a transformers model brings its config along."""
    if isinstance(model, Mapping):
        store = MemoryStore(model)
        return Checkpoint(store, aliases=store.aliases)
    if not hasattr(model, "state_dict"):
        raise TypeError(f"a model is a path, a hub id, a state dict or a module, not {type(model).__name__}")
    module = model
    store = MemoryStore(module.state_dict(), type(module).__name__)
    if any(".lora_" in name or name.startswith("base_model.model.") for name in store):
        raise ValueError(
            f"{type(module).__name__} has adapters beside its weights: pass the folder that its save_pretrained writes, or the model "
            "that its merge_and_unload() returns"
        )
    owned: Any = getattr(module, "config", None)
    config = owned.to_dict() if hasattr(owned, "to_dict") else None
    return Checkpoint(store, config=config, aliases=store.aliases, module=module)


def _from_file(path: Path, allow_pickle: bool) -> Checkpoint:
    """A safetensors file, or a pickle where that is allowed."""
    if path.suffix not in PICKLES:
        file = TensorFile(path)
        return Checkpoint(FileStore([file]), path=path, aliases=_stored_aliases([file]))
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is opened; save it as safetensors, or pass allow_pickle "
            "(it is then read with weights_only)"
        )
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    store = MemoryStore(state, str(path))
    return Checkpoint(store, path=path, aliases=store.aliases)


def _from_folder(path: Path, allow_pickle: bool) -> Checkpoint:
    """A folder as transformers saves it."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if config and config.get("quantization_config"):
        raise ValueError(
            f"{path} is quantised (quantization_config in its config.json); quantised weights cannot be averaged: "
            "merge the unquantised model and quantise the result"
        )
    if (path / INDEX).is_file():
        files = indexed_files(path)
    elif (path / "model.safetensors").is_file():
        files = [TensorFile(path / "model.safetensors")]
    else:
        candidates = sorted(path.glob("*.safetensors"))
        if len(candidates) > 1:
            raise ValueError(
                f"{path} holds {len(candidates)} safetensors files and no {INDEX}; name the one to read, or restore the index"
            )
        files = [TensorFile(candidate) for candidate in candidates]
    if not files:
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES and "model" in file.name)
        if not pickles:
            raise FileNotFoundError(
                f"{path} holds no model.safetensors, no {INDEX} and no adapter_config.json"
            )
        if len(pickles) > 1 and allow_pickle:
            raise ValueError(
                f"{path} holds {len(pickles)} pickled shards; save it with save_pretrained as safetensors first"
            )
        opened = _from_file(pickles[0], allow_pickle)
        return Checkpoint(opened.store, path=path, config=config, aliases=opened.aliases)
    checkpoint = Checkpoint(FileStore(files), path=path, config=config, aliases=_stored_aliases(files))
    checkpoint.aliases |= _tied_copy(checkpoint)
    return checkpoint


def indexed_files(path: Path, index: str = INDEX) -> list[TensorFile]:
    """The shards that a folder's index names, after checking that index and shards agree.

    Raises:
        ValueError: the index leaves its folder, or names other tensors than the shards hold.
        FileNotFoundError: a shard is missing.
    """
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / index} has no weight_map from tensor to shard")
    files: dict[str, TensorFile] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        pure = PurePosixPath(shard)
        if pure.is_absolute() or ".." in pure.parts or "\\" in shard:
            raise ValueError(
                f"{path / index} points outside its folder: {shard!r}; do not trust this checkpoint"
            )
        files[shard] = TensorFile(path / shard)
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise ValueError(
                f"{path / index} says that {shard} holds {name!r}, but it does not; fetch the checkpoint again"
            )
    for shard, file in files.items():
        unlisted = [name for name in file if weight_map.get(name) != shard]
        if unlisted:
            raise ValueError(
                f"{file.path} holds {unlisted[0]!r}, which the index does not place there; fetch the checkpoint again"
            )
    return list(files.values())


def _stored_aliases(files: list[TensorFile]) -> dict[str, str]:
    """Tied names that were left out of a file: its metadata maps each to the name that was kept."""
    names = {name for file in files for name in file}
    pairs = ((key, value) for file in files for key, value in file.metadata.items())
    return {key: value for key, value in pairs if value in names and key not in names}


def _tied_copy(checkpoint: Checkpoint) -> dict[str, str]:
    """An lm_head that a folder stores beside the embedding which its config ties it to: equal values under two names."""
    config = checkpoint.config or {}
    heads = [name for name in checkpoint.store if name.endswith("lm_head.weight")]
    if not config.get("tie_word_embeddings", bool(config)):
        return {}
    tied: dict[str, str] = {}
    for head in heads:
        sample, spec = checkpoint.sample(head), checkpoint.spec(head)
        held = [
            name
            for name in checkpoint.store
            if name != head
            and FIRST.search(name)
            and checkpoint.spec(name) == spec
            and checkpoint.sample(name) == sample
        ]
        tied |= {head: held[0]} if held else {}
    return tied


def from_hub(name: str, patterns: Sequence[str] = WANTED) -> Path:
    """The local snapshot of a hub repository ("me/base", "me/base@revision"), of the files that match `patterns`.

    Raises:
        FileNotFoundError: neither a path nor a repository that can be reached.
    """
    name, revision = split_revision(name)
    folder = Path(name).expanduser().parent
    siblings = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    hint = nearest(Path(name).name, siblings)
    if not HUB_ID.match(name):
        raise FileNotFoundError(f"no file or folder {name}{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the library's errors share no base class across versions
        raise FileNotFoundError(
            f"no file or folder {name}{hint}, and no hub repository of that name {f'at revision {revision} ' if revision else ''}could be fetched ({type(error).__name__}: {error})"
        ) from error
