"""Small files and paths: JSON tables, paths beside a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: not JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table")
    return content


def locate(model: str, folder: Path) -> str:
    """A path relative to the recipe where there is one, else the text as it is (a hub id, or a path from here).

    In "model@revision" and "model+adapter" each part is looked for.
    """
    beside = folder / Path(model).expanduser()
    if beside.exists():
        return str(beside)
    first, plus, adapter = model.rpartition("+")
    if plus:
        return f"{locate(first, folder)}+{locate(adapter, folder)}"
    name, at, revision = model.partition("@")
    return f"{locate(name, folder)}@{revision}" if at else model
