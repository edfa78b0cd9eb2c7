"""How a model is called: MODEL[@REVISION][+ADAPTER[@REVISION]] where it is asked for, and a name without paths where it is published."""

from __future__ import annotations

import re
from pathlib import Path

from gradmatch.estimators.errors import GradmatchError

SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/([^/]+)(?:/(.+))?$")  # a hub repository in the cache


def split_adapter(text: str) -> tuple[str, str]:
    """("model", "adapter") of "model+adapter", the last one of several; "" where there is none, or where a path is called so.

    Example:
        >>> split_adapter("me/base@v2+me/lora")
        ('me/base@v2', 'me/lora')
    """
    if "+" not in text or Path(text).expanduser().exists():
        return text, ""
    model, _, adapter = text.rpartition("+")
    return model, adapter


def split_revision(text: str) -> tuple[str, str | None]:
    """("me/base", "v2") of "me/base@v2"; None where there is no revision, or where a path is called so.

    Raises:
        ValueError: the revision of a folder or file.
    """
    if "@" not in text or Path(text).expanduser().exists():
        return text, None
    name, _, revision = text.partition("@")
    if Path(name).expanduser().exists():
        raise GradmatchError(
            f"{text!r} asks for revision {revision!r} of a local path, which has none; write {name}, or a hub id before the @",
            "bad_model",
            text,
        )
    return name, revision


def locate(model: str, folder: Path) -> str:
    """A path relative to the recipe where there is one, else the text as it is (a hub id, or a path from here).

    In "model@revision" and "model+adapter" each part is looked for.
    """
    beside = folder / Path(model).expanduser()
    if model and beside.exists():
        return str(beside)
    first, plus, adapter = model.rpartition("+")
    if plus:
        return f"{locate(first, folder)}+{locate(adapter, folder)}"
    name, at, revision = model.partition("@")
    return f"{locate(name, folder)}@{revision}" if at else model


def published(path: Path) -> str:
    """What to call a path where others read it: a hub id with its revision, or the last part of a local path alone.

    Example:
        >>> published(Path("/home/me/.cache/huggingface/hub/models--me--base/snapshots/4f2a"))
        'me/base@4f2a'
        >>> published(Path("/home/me/models/base")), published(Path("/home/me/models/base/model.safetensors"))
        ('base', 'base/model.safetensors')
    """
    found = SNAPSHOT.search(path.as_posix())
    if found:
        name, revision, rest = found.groups()
        return f"{name.replace('--', '/', 1)}@{revision}" + (f"/{rest}" if rest else "")
    path = path.expanduser().absolute()
    return (
        f"{path.parent.name}/{path.name}"
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        else path.name
    )


def hub_id(name: str) -> str | None:
    """The repository of a published name, without its revision; None of a local folder."""
    found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@[0-9a-f]{40}", name)
    return found.group(1) if found else None
