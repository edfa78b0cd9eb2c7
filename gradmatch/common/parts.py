"""Parts that users add: found by name in a table, as "package.module:NAME", or as an entry point of an installed package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

from gradmatch.common.names import nearest
from gradmatch.estimators.errors import GradmatchError

Part = TypeVar("Part")


def find_part(
    what: str, group: str, name: str, known: Mapping[str, Part], kind: type[Part] | None = None
) -> Part:
    """The part of a name.

    Args:
        what: how to call it in an error, as the argument that named it ("method").
        group: of entry points, as packages declare them (`[project.entry-points."gradmatch.rules"]`).
        name: of the part.
        known: the parts that come with gradmatch, and those that were put beside them.
        kind: what a part must be, or None where anything is.

    Raises:
        ValueError: no part of this name (the nearest is named), no such module, or nothing of that name in it.
        TypeError: a part of another kind.

    Example:
        >>> find_part("method", "gradmatch.rules", "statistics:mean", {})([1, 2, 3])
        2
    """
    if name in known:
        return known[name]
    found: Any
    if isinstance(name, str) and ":" in name:
        found = _imported(what, *name.split(":", 1))
    else:
        from importlib.metadata import entry_points

        installed = {point.name: point for point in entry_points(group=group)}
        if name not in installed:
            names = [*known, *installed]
            raise GradmatchError(
                f"unknown {what} {name!r}{nearest(name, names)}; known are {', '.join(names)}",
                "unknown_name",
                name,
            )
        found = installed[name].load()
    if kind is not None and not isinstance(found, kind):
        raise TypeError(f"{what} {name!r} is a {type(found).__name__}, not a gradmatch.{kind.__name__}")
    part: Part = found
    return part


def _imported(what: str, module: str, name: str) -> Any:
    """A name of a module that can be imported."""
    try:
        held = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # of something that the module itself imports
        raise GradmatchError(
            f"{what} {module + ':' + name!r}: there is no module {error.name!r} to import; install it, or put its folder on PYTHONPATH",
            "bad_setting",
        ) from None
    if not hasattr(held, name):
        raise GradmatchError(
            f"{what} {module + ':' + name!r}: module {module!r} holds no {name!r}{nearest(name, dir(held))}",
            "bad_setting",
            module,
        )
    return getattr(held, name)
