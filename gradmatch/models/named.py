"""Models by their names in commands: where the config and tokenizer of a folder, hub id or adapter lie, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.models.adapter_config import CONFIG, named_base
from gradmatch.models.hub import TEXT, from_hub
from gradmatch.models.reference import split_adapter


def config_folder(model: str) -> Path:
    """Where the config and tokenizer of a named model lie: its own folder, that of an adapter's base, a snapshot of the hub.

    Raises:
        FileNotFoundError: neither a folder nor a hub repository.
        ValueError: an adapter that names no base.
    """
    model, _ = split_adapter(model)
    folder = Path(model).expanduser()
    folder = folder if folder.exists() else from_hub(model, TEXT)
    return config_folder(named_base(folder)) if (folder / CONFIG).is_file() else folder


def is_adapter(model: str) -> bool:
    """Whether a name is that of an adapter, alone or behind the model that it is on ("model+adapter")."""
    return bool(split_adapter(model)[1]) or (Path(model).expanduser() / CONFIG).is_file()


def config_of(model: str) -> Any:
    """The config of a named model, as transformers reads it; code that comes with a model is not run.

    Raises:
        ValueError: a config that needs such code.
    """
    from transformers import AutoConfig

    folder = config_folder(model)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        code = sorted((read_json(folder / "config.json").get("auto_map") or {}).values())
        if not code:
            raise
        raise GradmatchError(
            f"{model} comes with code of its own ({', '.join(map(str, code))}), which is not run here: load it with transformers and "
            "trust_remote_code=True, and pass the module to the Python function (gradmatch.estimators.estimate(model, batches))",
            "bad_model",
        ) from error
