"""Opening a model in any form; headers only are read.

A folder as transformers saves it (one or many shards), a safetensors file, a hub id, a PEFT adapter folder, a state dict or a
module. Nothing is unpickled unless asked for, and then with weights_only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from gradmatch.common.settings import FIRST, layer_of
from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.estimators.names import first_line, nearest
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.estimators.wrapped import unwrap
from gradmatch.models.adapter_config import CONFIG, named_base
from gradmatch.models.adapters import open_adapter
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.reference import split_adapter, split_revision
from gradmatch.models.stores import FileStore, MemoryStore, Store, equal

if TYPE_CHECKING:
    from gradmatch.models.task import Model

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
PACKED = ("I8", "U8", "I32")  # what quantised weights are packed in; tables of indices are I64
SCALE = re.compile(r"scale|absmax|scb$|zero|quant", re.IGNORECASE)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
StoreT = TypeVar("StoreT", bound=Store)
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
    if not os.fspath(path):
        raise GradmatchError("a model is a path or a hub id, not an empty name", "empty_name")
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
            base or open_checkpoint(_base_at_hand(folder), allow_pickle=allow_pickle),
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
        raise GradmatchError(
            f"{whole!r}: what stands behind the + must be an adapter, and {adapter} has no {CONFIG}; two models are two tasks",
            "bad_model",
            whole,
        )
    return folder


def _base_at_hand(adapter: Path) -> Path:
    """The folder of the base that an adapter names, where it is here already; nothing is downloaded that nobody named.

    Raises:
        ValueError: it is not.
    """
    named = named_base(adapter)
    if Path(named).expanduser().exists():
        return Path(named).expanduser()
    try:
        return from_hub(named, local=True)
    except FileNotFoundError as error:
        raise GradmatchError(
            f"{adapter} is an adapter of {named!r}, which is neither a folder nor in the hub's cache here; fetch it, or name the base",
            "bad_model",
            adapter,
        ) from error


def _in_memory(model: Any) -> Checkpoint:
    """A state dict or a module; a transformers model brings its config along."""
    if isinstance(model, Mapping):
        store = MemoryStore(model)
        return Checkpoint(_checked(store, "the state dict"), aliases=store.aliases)
    if not hasattr(model, "state_dict"):
        raise TypeError(f"a model is a path, a hub id, a state dict or a module, not {type(model).__name__}")
    module = unwrap(model) if hasattr(model, "named_modules") else model
    where = type(module).__name__
    store = MemoryStore(module.state_dict(), where)
    if any(".lora_" in name or name.startswith("base_model.model.") for name in store):
        raise GradmatchError(
            f"{where} has adapters beside its weights: pass the folder that its save_pretrained writes, or the model "
            "that its merge_and_unload() returns",
            "bad_model",
            where,
        )
    owned: Any = getattr(module, "config", None)
    config = owned.to_dict() if hasattr(owned, "to_dict") else None
    return Checkpoint(_checked(store, where, config), config=config, aliases=store.aliases, module=module)


def _from_file(path: Path, allow_pickle: bool) -> Checkpoint:
    """A safetensors file, or a pickle where that is allowed."""
    if path.suffix not in PICKLES:
        file = TensorFile(path)
        if any(".lora_" in name for name in file):
            raise GradmatchError(
                f"{path} holds an adapter's factors alone; name the folder that it lies in, with its {CONFIG}",
                "bad_model",
                path,
            )
        return Checkpoint(_checked(FileStore([file]), path), path=path, aliases=_stored_aliases([file]))
    if not allow_pickle:
        raise GradmatchError(
            f"{path} is a pickle, which can run code when it is opened; save it as safetensors, or pass allow_pickle "
            "(it is then read with weights_only)",
            "pickle",
            path,
        )
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    store = MemoryStore(state, str(path))
    return Checkpoint(_checked(store, path), path=path, aliases=store.aliases)


def _from_folder(path: Path, allow_pickle: bool) -> Checkpoint:
    """A folder as transformers saves it."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if (path / INDEX).is_file():
        files = _whole_before_shards(path) if (path / WHOLE).is_file() else indexed_files(path)
    elif (path / WHOLE).is_file():
        files = [TensorFile(path / WHOLE)]
    else:
        candidates = sorted(path.glob("*.safetensors"))
        if len(candidates) > 1:
            raise GradmatchError(
                f"{path} holds {len(candidates)} safetensors files and no {INDEX}; name the one to read, or restore the index",
                "bad_model",
                path,
            )
        files = [TensorFile(candidate) for candidate in candidates]
    if not files:
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES and "model" in file.name)
        if not pickles:
            raise FileNotFoundError(
                f"{path} holds no model.safetensors, no {INDEX} and no adapter_config.json"
            )
        if len(pickles) > 1 and allow_pickle:
            raise GradmatchError(
                f"{path} holds {len(pickles)} pickled shards; save it with save_pretrained as safetensors first",
                "pickle",
                path,
            )
        opened = _from_file(pickles[0], allow_pickle)
        return Checkpoint(
            _checked(opened.store, path, config), path=path, config=config, aliases=opened.aliases
        )
    store = _checked(FileStore(files), path, config)
    checkpoint = Checkpoint(store, path=path, config=config, aliases=_stored_aliases(files))
    checkpoint.aliases |= _tied_copies(checkpoint)
    return checkpoint


def _whole_before_shards(path: Path) -> list[TensorFile]:
    """The file that transformers reads of a folder which holds model.safetensors and an index of shards too."""
    shards = set(listed_shards(path).values())
    if WHOLE in shards:
        return indexed_files(path)
    there = all((path / shard).is_file() for shard in shards)
    left = "shards that it lists are left aside" if there else "index is stale: shards that it lists are gone"
    warn(
        f"{path}: {WHOLE} is read, as transformers does, and not {INDEX}; the {left}. Remove what is not wanted"
    )
    return [TensorFile(path / WHOLE)]


def _checked(store: StoreT, where: object, config: Mapping[str, Any] | None = None) -> StoreT:
    """The store, unless its weights are quantised, which its config or its contents tell.

    Raises:
        ValueError: quantised weights.
    """
    told = next(_quantised_by(config), None)
    for name in () if told else store:
        spec = store.spec(name)
        if spec.dtype in EIGHT_BITS or (spec.dtype in PACKED and len(spec.shape) > 1):
            module = name.rpartition(".")[0]
            beside = (
                other for other in store if other != name and other.startswith(f"{module}." if module else "")
            )
            scale = next((other for other in beside if SCALE.search(other[len(module) :])), None)
            if scale is not None:
                told = f"{name!r} is {spec} with {scale!r} beside it"
                break
    if told:
        raise GradmatchError(
            f"{where} is quantised ({told}); quantised weights cannot be averaged: merge the unquantised model and quantise the result",
            "quantised",
            where,
        )
    return store


def _quantised_by(config: Any, at: str = "") -> Iterator[str]:
    """Where a config says that weights are quantised, in nested configs too."""
    if isinstance(config, Mapping):
        if config.get("quantization_config"):
            yield f"{at}quantization_config in its config.json"
        for key, value in config.items():
            yield from _quantised_by(value, f"{at}{key}.")


def listed_shards(path: Path, index: str = INDEX) -> dict[str, str]:
    """Tensor -> shard, as a folder's index says.

    Raises:
        ValueError: no such table, or one that leaves its folder.
    """
    weight_map: Any = read_json(path / index).get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    if not weight_map or not named:
        raise GradmatchError(
            f"{path / index} has no weight_map from the name of a tensor to that of its shard",
            "bad_model",
            path / index,
        )
    for shard in weight_map.values():
        pure = PurePosixPath(shard)
        if pure.is_absolute() or ".." in pure.parts or "\\" in shard:
            raise GradmatchError(
                f"{path / index} points outside its folder: {shard!r}; do not trust this checkpoint",
                "unsafe_path",
                path / index,
            )
    return dict(weight_map)


def indexed_files(path: Path, index: str = INDEX) -> list[TensorFile]:
    """The shards that a folder's index names, after checking that index and shards agree.

    Raises:
        ValueError: the index leaves its folder, or names other tensors than the shards hold.
        FileNotFoundError: a shard is missing.
    """
    weight_map = listed_shards(path, index)
    files = {shard: TensorFile(path / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise GradmatchError(
                f"{path / index} says that {shard} holds {name!r}, but it does not; fetch the checkpoint again",
                "bad_model",
                path / index,
            )
    for shard, file in files.items():
        unlisted = [name for name in file if weight_map.get(name) != shard]
        if unlisted:
            raise GradmatchError(
                f"{file.path} holds {unlisted[0]!r}, which the index does not place there; fetch the checkpoint again",
                "bad_model",
                file.path,
            )
    return list(files.values())


def _stored_aliases(files: list[TensorFile]) -> dict[str, str]:
    """Tied names that were left out of a file: its metadata maps each to the name that was kept."""
    names = {name for file in files for name in file}
    pairs = ((key, value) for file in files for key, value in file.metadata.items())
    return {key: value for key, value in pairs if value in names and key not in names}


def _tied_copies(checkpoint: Checkpoint) -> dict[str, str]:
    """Matrices that a folder stores beside the embeddings which its config ties them to: equal in every value."""
    config, store = checkpoint.config or {}, checkpoint.store
    flags = [part.get("tie_word_embeddings", True) for part in (config, config.get("text_config") or {})]
    if not config or not all(flags):
        return {}
    same: dict[Any, list[str]] = {}
    for name in store:
        if layer_of(name) is None and len(store.spec(name).shape) == 2 and store.spec(name).floating:
            same.setdefault(store.spec(name), []).append(name)
    tied: dict[str, str] = {}
    for names in same.values():
        kept = next(
            (name for name in sorted(names, key=lambda n: "shared" not in n) if FIRST.search(name)), None
        )
        if kept is None or len(names) < 2:
            continue
        sample = checkpoint.sample(kept)  # most that differ do so here
        tied |= {
            name: kept
            for name in names
            if name != kept and checkpoint.sample(name) == sample and equal(store, name, store, kept)
        }
    return tied


def from_hub(name: str, patterns: Sequence[str] = WANTED, local: bool = False) -> Path:
    """The local snapshot of a hub repository ("me/base", "me/base@revision"), of the files that match `patterns`.

    With `local`, only one that is here already.

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
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=local)
        )
    except Exception as error:  # the library's errors share no base class across versions
        raise FileNotFoundError(
            f"no file or folder {name}{hint}, and no hub repository of that name {f'at revision {revision} ' if revision else ''}could be fetched ({type(error).__name__}: {first_line(error)})"
        ) from error
