"""Parts that users add: found by name in a table, as "package.module:NAME", or as an entry point of an installed package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest

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
    found: Any = known.get(name)
    if found is None and ":" in str(name):
        found = _imported(what, *name.split(":", 1))
    elif found is None:
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
    """A name, or a name in a name, of a module that can be imported."""
    try:
        held: Any = import_module(module)
    except (ModuleNotFoundError, ValueError) as error:  # ValueError: no name of a module
        missing = getattr(error, "name", module)
        if missing is None or not (module == missing or module.startswith(missing + ".")):
            raise  # of something that the module itself imports
        raise GradmatchError(
            f"{what} {module + ':' + name!r}: there is no module {missing!r} to import; install it, or put its folder on PYTHONPATH",
            "bad_setting",
            module,
        ) from None
    for part in name.split("."):
        if not hasattr(held, part):
            raise GradmatchError(
                f"{what} {module + ':' + name!r}: module {module!r} holds no {part!r}{nearest(part, dir(held))}",
                "bad_setting",
                module,
            )
        held = getattr(held, part)
    return held
