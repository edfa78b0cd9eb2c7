"""Options of rules and transforms: frozen dataclasses whose fields say what they take, and which check themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gradmatch.common.kinds import check_kind, leaves
from gradmatch.common.settings import numbers, value_at
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose, nearest

Own = TypeVar("Own", bound="Options")


def option(
    default: Any,
    within: str = "",
    *,
    choices: Sequence[str] = (),
    kind: Any = None,
    says: str = "",
    per_task: bool = False,
    flag: bool = True,
    help: str = "",
) -> Any:
    """Declare one field of an `Options`.

    Args:
        default: also tells the kind of the values: a number, a whole number, text, or true and false.
        within: the interval that numbers must lie in, as it is written on paper: "[0, 1)".
        choices: what a text may be.
        kind: a value of the right kind, where the default is None.
        says: what the number is, for the error of one out of range.
        per_task: whether a task may have a value of its own (`Task(..., options={...})`).
        flag: whether the command line can give it.
        help: what it does, for `--help`.

    Example:
        >>> @dataclass(frozen=True)
        ... class Fade(Options):
        ...     share: float = option(0.5, "[0, 1]", help="of the task vector that stays")
        >>> Fade().share
        0.5
        >>> Fade(share=2.0)
        Traceback (most recent call last):
        ...
        gradmatch.estimators.errors.GradmatchError: share is 2, it must lie in [0, 1]
    """
    told = {"within": within, "choices": tuple(choices), "kind": kind, "says": says, "per_task": per_task}
    return dataclasses.field(default=default, metadata={**told, "flag": flag, "help": help})


@dataclass(frozen=True)
class Options(Mapping[str, Any]):
    """The options of one rule or transform, by name: `options.t` and `options["t"]` are the same.

    In a request every value is a setting (a number, a list over the depth, or values by name pattern, see
    `gradmatch.common.settings`); `at` gives the options of one tensor. Subclasses are frozen dataclasses of `option` fields.
    """

    def __post_init__(self) -> None:
        """Check every value against its field.

        Raises:
            ValueError: a number out of range or not finite, or an unknown choice (the nearest is named).
            TypeError: a value of another kind than the default.
        """
        for one in dataclasses.fields(self):
            _check(one, getattr(self, one.name))

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)

    def changed(self: Own, owner: str, given: Mapping[str, Any]) -> Own:
        """These options with others in their place; errors begin with the owner's name.

        Raises:
            ValueError: a name that is no option (the nearest is named), or as the check of a value.
            TypeError: as the check of a value.
        """
        for name in given:
            if name not in self:
                raise GradmatchError(
                    f"{owner} has no option {name!r}{nearest(name, self)}; {takes(self)}",
                    "unknown_option",
                    owner,
                )
        try:
            return dataclasses.replace(self, **given)
        except TypeError as error:
            raise TypeError(f"{owner}: {error}") from None
        except ValueError as error:
            code, where = getattr(error, "code", "bad_setting"), getattr(error, "where", owner)
            raise GradmatchError(f"{owner}: {error}", code, where) from None

    def at(self: Own, tensor: str, depth: float | None, own: Sequence[Mapping[str, Any]] = ()) -> Own:
        """The options of one tensor at its depth; a tuple, one value a task, where one of the tasks has `own` ones."""
        found = {}
        for one in dataclasses.fields(self):
            shared = getattr(self, one.name)
            if one.metadata.get("per_task") and any(one.name in options for options in own):
                found[one.name] = tuple(
                    _value(one, options.get(one.name, shared), tensor, depth) for options in own
                )
            else:
                found[one.name] = _value(one, shared, tensor, depth)
        return dataclasses.replace(self, **found)

    def per_task(self) -> set[str]:
        """Names of the options that a task may have of its own."""
        return {one.name for one in dataclasses.fields(self) if one.metadata.get("per_task")}


NONE = Options()


def declared(defaults: Mapping[str, Any]) -> Options:
    """Options from a plain table of names and defaults, whose values are checked by their kind alone."""
    if isinstance(defaults, Options):
        return defaults
    fields = [(name, Any, option(value)) for name, value in defaults.items()]
    made: Options = dataclasses.make_dataclass("Options", fields, bases=(Options,), frozen=True)()
    return made


def takes(known: Mapping[str, Any] | set[str]) -> str:
    """What to say of the options there are."""
    return f"it takes {', '.join(sorted(known))}" if known else "it takes none"


def _value(one: dataclasses.Field[Any], setting: Any, tensor: str, depth: float | None) -> Any:
    """A setting's value for one tensor; whole numbers stay whole, and keep their digits."""
    if callable(setting) or (type(setting) is int and type(one.default) is int):
        return setting
    value = value_at(setting, tensor, depth, one.name)
    return int(value) if type(one.default) is int and isinstance(value, float) else value


def _check(one: dataclasses.Field[Any], setting: Any) -> None:
    """Compare a setting with its field; see `Options.__post_init__`."""
    told, name = one.metadata, one.name
    for chosen in leaves(setting) if told.get("choices") else ():
        if chosen is not None or one.default is not None:
            choose(name, chosen, told["choices"])
    kind = told.get("kind") if one.default is None else one.default
    for value in leaves(setting):
        check_kind(name, value, None if value is None and one.default is None else kind)
    within = str(told.get("within", ""))
    for number in numbers(setting) if within else ():
        if not _inside(number, within):
            says = f"{number:g}, it" if not told["says"] else f"{number}; it is {told['says']} and"
            raise GradmatchError(f"{name} is {says} must lie in {within}", "out_of_range", name)


def _inside(number: float, within: str) -> bool:
    """Whether a number lies in an interval such as "(0, 1]"."""
    low, high = (float(end) for end in within[1:-1].split(","))
    above = number >= low if within[0] == "[" else number > low
    below = number <= high if within[-1] == "]" else number < high
    return math.isfinite(number) and above and below
