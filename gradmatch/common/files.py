"""Small files and paths: JSON tables, paths beside a recipe."""

from __future__ import annotations

from pathlib import Path

from gradmatch.estimators.files import read_json

__all__ = ["locate", "read_json"]


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
