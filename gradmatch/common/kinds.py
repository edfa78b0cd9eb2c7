"""Of what kind the values of options are: whatever an option holds, by tensor or not, must be of its default's kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from gradmatch.estimators.errors import GradmatchError


def plain(value: Any) -> Any:
    """A setting in Python's own numbers: those of numpy and torch, and arrays of them, are converted."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def leaves(setting: Any) -> Iterator[Any]:
    """The values that a setting may take on some tensor (see `gradmatch.common.settings`).

    Raises:
        TypeError: a filter or layer of another kind.
    """
    if isinstance(setting, Mapping):
        if "value" in setting:
            part = setting.get("filter")
            if part is not None and not isinstance(part, str):
                raise TypeError(
                    f"the filter {part!r} is no text; it is a part of the names that it stands for"
                )
            yield from leaves(setting["value"])
        else:
            for entry in setting.values():
                yield from leaves(entry)
    elif isinstance(setting, (list, tuple)):
        for entry in setting:
            yield from leaves(entry)
    else:
        yield setting


def check_kind(what: str, setting: Any, default: Any) -> None:
    """Compare every value of a setting with its default: numbers for a number, and so on; None takes anything.

    Raises:
        TypeError: another kind.
        ValueError: a number that is not finite, or not whole where the default is.
    """
    for value in leaves(setting) if default is not None else ():
        if isinstance(default, (bool, str)):
            if not isinstance(value, type(default)):
                kind = "true or false" if isinstance(default, bool) else "text"
                raise TypeError(f"{what} is {value!r}; it must be {kind}, as its default {default!r}")
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{what} is {value!r}; it must be a number, as its default {default!r}")
        elif not math.isfinite(value):
            raise GradmatchError(f"{what} is {value}, it must be a finite number", "out_of_range")
        elif isinstance(default, int) and value != math.floor(value):
            raise GradmatchError(
                f"{what} is {value}, it must be a whole number, as its default {default}", "bad_setting"
            )
