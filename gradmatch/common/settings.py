"""Settings that may differ from tensor to tensor: a number, a gradient over the depth, or numbers by name pattern.

0.5                                            everywhere
[0.0, 1.0]                                     interpolated from the first layer to the last
{"*mlp*": 0.7, "*": 0.3}                       the first pattern that matches the name
[{"filter": "mlp", "value": 0.7}, {"value": 0.3}]   the same as mergekit spells it: a filter is a part of the name
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from gradmatch.estimators.errors import GradmatchError

Setting = float | Sequence[Any] | Mapping[str, Any]
LAYER = re.compile(r"(?:^|\.)(?:(?:layers?|h|blocks?|encoder|decoder|stages)\.|layer)(\d+)(?:\.|$)")
NUMBERED = re.compile(r"^(\d+)\.")  # the modules of an nn.Sequential
FIRST = re.compile(r"embed|wte|wpe|shared|patch|^conv1\.|^bn1\.|stem", re.IGNORECASE)


def layer_of(name: str) -> int | None:
    """The index of the layer that a parameter belongs to, or None: `model.layers.7.mlp.up.weight` -> 7."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else None


class Depth:
    """Where in the depth of a model a tensor lies: 0 at the first layer, 1 at the last.

    Embeddings count as the first layer, everything else outside the layers (final norm, head) as the last. Where no name
    holds a layer, numbers that lead the names count as layers.
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self._index: Callable[[str], int | None] = layer_of
        if all(layer_of(name) is None for name in names):
            self._index = _leading_number
        found = [index for index in map(self._index, names) if index is not None]
        self._range = (min(found), max(found)) if found else None

    def of(self, name: str) -> float | None:
        """Position in [0, 1]; None in a model without layers."""
        if self._range is None:
            return None
        index = self._index(name)
        if index is None:
            return 0.0 if FIRST.search(name) else 1.0
        first, last = self._range
        return (index - first) / max(1, last - first)


def _leading_number(name: str) -> int | None:
    """The module of an nn.Sequential that a parameter belongs to, or None."""
    found = NUMBERED.search(name)
    return int(found.group(1)) if found else None


def value_at(setting: Setting | Any, name: str, depth: float | None, what: str = "setting") -> Any:
    """The value of a setting for one tensor.

    Args:
        setting: see the module's head; text and booleans are returned as they are.
        name: the tensor.
        depth: its position in [0, 1], or None in a model without layers.
        what: how to call the setting in an error.

    Raises:
        ValueError: no pattern or filter matches the name, or a list over the depth of a model without layers.
        TypeError: nothing that a setting can be.
    """
    if isinstance(setting, (bool, str)) or setting is None:
        return setting
    if isinstance(setting, (int, float)):
        return float(setting)
    if isinstance(setting, Mapping):
        for pattern, value in setting.items():
            if fnmatch.fnmatchcase(name, pattern):
                return value_at(value, name, depth, what)
        raise GradmatchError(
            f'{what}: no pattern of {list(setting)} matches tensor {name!r}; add a last entry "*"',
            "bad_setting",
            name,
        )
    if isinstance(setting, Sequence) and setting:
        if all(isinstance(entry, Mapping) and "value" in entry for entry in setting):
            for entry in setting:
                if _holds(entry, name):
                    return value_at(entry["value"], name, depth, what)
            raise GradmatchError(
                f"{what}: no filter matches tensor {name!r}; add a last entry without a filter",
                "bad_setting",
                name,
            )
        if all(isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in setting):
            if len(setting) == 1:
                return float(setting[0])
            if depth is None:
                raise GradmatchError(
                    f"{what} is a list over the depth, {list(setting)}, but names such as {name!r} hold no layers; "
                    'give numbers by patterns of names instead, such as {"*.weight": 0.7, "*": 0.3}',
                    "bad_setting",
                    name,
                )
            position = depth * (len(setting) - 1)
            left = min(int(position), len(setting) - 2)
            share = position - left
            return float((1 - share) * setting[left] + share * setting[left + 1])
    raise TypeError(
        f"{what}: {setting!r} is no number, list of numbers over the depth, table of patterns, or list of filters with values"
    )


def idle(setting: Setting | Any, names: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Patterns and filters that decide no name's value; with each, whether it matches any at all (others come first then)."""
    if isinstance(setting, Mapping):
        tests = [(pattern, partial(fnmatch.fnmatchcase, pat=pattern)) for pattern in setting]
        inner = list(setting.values())
    elif isinstance(setting, Sequence) and all(isinstance(entry, Mapping) for entry in setting):
        tests = [(entry.get("filter") or "*", partial(_holds, entry)) for entry in setting]
        inner = [entry["value"] for entry in setting]
    else:
        return
    found = [[name for name in names if test(name)] for _, test in tests]
    taken: set[str] = set()
    unused: dict[
        str, bool
    ] = {}  # a pattern may stand in several entries, one a layer: each but one may be idle
    used = {"*"}
    for (pattern, _), matches in zip(tests, found, strict=True):
        if taken.issuperset(matches):
            unused[pattern] = unused.get(pattern, False) or bool(matches)
        else:
            used.add(pattern)
        taken.update(matches)
    yield from ((pattern, matches) for pattern, matches in unused.items() if pattern not in used)
    for value in inner:
        yield from idle(value, names)


def _holds(entry: Mapping[str, Any], name: str) -> bool:
    """Whether a filter takes a name; `layer` is a number, "before" or "after" the layers, or None: outside."""
    part = entry.get("filter")
    if part not in (None, "*") and part not in name:
        return False
    layer = layer_of(name)
    place = ("before" if FIRST.search(name) else "after") if layer is None else layer
    return "layer" not in entry or entry["layer"] in (layer, place)


def numbers(setting: Setting | Any) -> list[float]:
    """Every number that occurs in a setting, for range checks before any tensor is known."""
    if isinstance(setting, bool) or setting is None or isinstance(setting, str):
        return []
    if isinstance(setting, (int, float)):
        return [float(setting)]
    if isinstance(setting, Mapping):
        values: Iterable[Any] = [setting["value"]] if "value" in setting else setting.values()
        return [number for value in values for number in numbers(value)]
    if isinstance(setting, Sequence):
        return [number for value in setting for number in numbers(value)]
    return []


def times(setting: Any, factor: float) -> Any:
    """A setting with every number multiplied."""
    if isinstance(setting, Mapping):
        if "value" in setting:
            return {**setting, "value": times(setting["value"], factor)}
        return {key: times(value, factor) for key, value in setting.items()}
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        return [times(value, factor) for value in setting]
    return setting * factor if isinstance(setting, (int, float)) else setting
