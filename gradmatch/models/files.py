"""A model in files: a folder as transformers saves it, in one file or in shards; a safetensors file; a pickle, where that is allowed."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from gradmatch.common.settings import FIRST, layer_of
from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.quantised import refuse_quantised
from gradmatch.models.stores import FileStore, Store, equal, read, unpickled

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
MODELS = ("config.json", "adapter_config.json")  # what a folder with a model holds
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_file(path: Path, allow_pickle: bool) -> Checkpoint:
    """A safetensors file, or a pickle where that is allowed.

    Raises:
        ValueError: a pickle that was not asked for, an adapter's factors alone, quantised weights.
    """
    if path.suffix in PICKLES:
        state = refuse_quantised(unpickled(path, allow_pickle), path)
        return Checkpoint(state, path=path, aliases=state.aliases)
    if path.name.endswith(".index.json"):
        raise GradmatchError(
            f"{path} says which tensor lies in which shard; name the folder that it lies in",
            "bad_model",
            path,
        )
    file = TensorFile(path)
    if any(".lora_" in name for name in file):
        raise GradmatchError(
            f"{path} holds an adapter's factors alone; name the folder that it lies in, with its adapter_config.json",
            "bad_model",
            path,
        )
    store = refuse_quantised(FileStore([file]), path)
    return Checkpoint(store, path=path, aliases=_stored_aliases([file]))


def open_folder(path: Path, allow_pickle: bool) -> Checkpoint:
    """A folder as transformers saves it.

    Raises:
        FileNotFoundError: it holds no weights.
        ValueError: several files and no index, an index that leaves the folder or disagrees with its shards, quantised weights, a
            pickle that was not asked for.
    """
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if (path / INDEX).is_file():
        files = _whole_before_shards(path) if (path / WHOLE).is_file() else _indexed_files(path)
    else:
        found = [path / WHOLE] if (path / WHOLE).is_file() else sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            raise GradmatchError(
                f"{path} holds {len(found)} safetensors files and no {INDEX}; name the one to read, or restore the index",
                "bad_model",
                path,
            )
        files = [TensorFile(file) for file in found]
    if not files:
        return _from_pickle(path, config, allow_pickle)
    store = refuse_quantised(FileStore(files), path, config)
    checkpoint = Checkpoint(store, path=path, config=config, aliases=_stored_aliases(files))
    checkpoint.aliases |= _tied_copies(checkpoint)
    return checkpoint


def _from_pickle(path: Path, config: dict[str, Any] | None, allow_pickle: bool) -> Checkpoint:
    """A folder without safetensors files."""
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES and "model" in file.name)
    if not pickles:
        inside = sorted(found.parent.name for found in path.glob("*/*config.json") if found.name in MODELS)
        hint = f"; its folder {inside[0]} may be what is meant" if inside else ""
        raise FileNotFoundError(f"{path} holds no {WHOLE}, no {INDEX} and no adapter_config.json{hint}")
    if len(pickles) > 1 and allow_pickle:
        raise GradmatchError(
            f"{path} holds {len(pickles)} pickled shards; save it with save_pretrained as safetensors first",
            "pickle",
            path,
        )
    state = refuse_quantised(unpickled(pickles[0], allow_pickle), path, config)
    return Checkpoint(state, path=path, config=config, aliases=state.aliases)


def _whole_before_shards(path: Path) -> list[TensorFile]:
    """The file that transformers reads of a folder which holds model.safetensors and an index of shards too."""
    shards = set(_listed_shards(path).values())
    if WHOLE in shards:
        return _indexed_files(path)
    whole = [TensorFile(path / WHOLE)]
    if not all((path / shard).is_file() for shard in shards):
        warn(
            f"{path}: {WHOLE} is read, as transformers does; its {INDEX} is stale, the shards that it lists are gone: remove it"
        )
    elif said := _difference(FileStore(whole), FileStore(_indexed_files(path))):
        warn(
            f"{path} holds two models: {WHOLE} is read, as transformers does, and the shards of {INDEX} are other weights ({said}); "
            "remove what is not wanted"
        )
    return whole


def _difference(one: Store, other: Store) -> str:
    """The first tensor that two stores do not have alike, in words; "" where every value is the same."""
    for name in dict.fromkeys((*one, *other)):
        if name not in one or name not in other:
            return f"{name!r} is in {'the shards' if name in other else WHOLE} alone"
        if one.spec(name) != other.spec(name):
            return f"{name!r} is {one.spec(name)} and {other.spec(name)}"
        if not equal(one, name, other, name):
            here, there = read(one, name).flatten(), read(other, name).flatten()
            at = int((here != there).nonzero()[0])
            return f"first {name!r}: {here[at]:.4g} and {there[at]:.4g}"
    return ""


def _listed_shards(path: Path) -> dict[str, str]:
    """Tensor -> shard, as a folder's index says."""
    weight_map: Any = read_json(path / INDEX).get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    if not weight_map or not named:
        raise GradmatchError(
            f"{path / INDEX} has no weight_map from the name of a tensor to that of its shard",
            "bad_model",
            path / INDEX,
        )
    for shard in weight_map.values():
        pure = PurePosixPath(shard)
        if pure.is_absolute() or ".." in pure.parts or "\\" in shard:
            raise GradmatchError(
                f"{path / INDEX} points outside its folder: {shard!r}; do not trust this checkpoint",
                "unsafe_path",
                path / INDEX,
            )
    return dict(weight_map)


def _indexed_files(path: Path) -> list[TensorFile]:
    """The shards that a folder's index names, after checking that index and shards agree."""
    weight_map = _listed_shards(path)
    files = {shard: TensorFile(path / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise GradmatchError(
                f"{path / INDEX} says that {shard} holds {name!r}, but it does not; fetch the checkpoint again",
                "bad_model",
                path / INDEX,
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
