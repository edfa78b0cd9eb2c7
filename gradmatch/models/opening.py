"""Opening a model in any form; headers only are read.

A folder as transformers saves it (one or many shards), a safetensors file, a hub id, a PEFT adapter folder, a state dict or a
module. Nothing is unpickled unless asked for, and then with weights_only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.wrapped import unwrap
from gradmatch.models.adapter_config import CONFIG, named_base
from gradmatch.models.adapters import open_adapter
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.files import open_file, open_folder
from gradmatch.models.hub import from_hub
from gradmatch.models.lineage import base_notes
from gradmatch.models.quantised import refuse_quantised
from gradmatch.models.reference import split_adapter
from gradmatch.models.stores import MemoryStore

if TYPE_CHECKING:
    from gradmatch.models.task import Model


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
        return open_file(folder, allow_pickle)
    if not folder.is_dir():
        folder = from_hub(str(path))
    if (folder / CONFIG).is_file():
        on = base or open_checkpoint(_base_at_hand(folder), allow_pickle=allow_pickle)
        opened = open_adapter(folder, on, allow_pickle=allow_pickle)
        if base is not None and opened.under is not None:
            opened.notes += base_notes(
                folder,
                opened.under,
                lambda: open_checkpoint(_base_at_hand(folder), allow_pickle=allow_pickle),
            )
        return opened
    return open_folder(folder, allow_pickle)


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
    """The folder of the base that an adapter names, where it is here already; nothing is downloaded that nobody named."""
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
        return Checkpoint(refuse_quantised(store, "the state dict"), aliases=store.aliases)
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
    return Checkpoint(
        refuse_quantised(store, where, config), config=config, aliases=store.aliases, module=module
    )
