"""The error of what is refused: a sentence for people, and apart from it what a program can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class GradmatchError(ValueError):
    """Something that gradmatch does not do with what it was given. It is a ValueError, so `except ValueError` catches it.

    Args:
        message: what is wrong, with both values, and after the last semicolon what to do about it.
        code: a short name that stays the same from version to version, such as "shape_mismatch"; docs/refused.md lists them.
        where: the file, tensor, key or row that is meant.
        remedy: what to do, where the message does not say it; arguments are named as in Python, and the command prints
            them as its flags.

    Attributes:
        message, code, where, remedy: these parts; `str` is message and remedy together.

    >>> error = GradmatchError("w has shape [2], the base has [3]", "shape_mismatch", "w", "pass missing='base'")
    >>> str(error)
    "w has shape [2], the base has [3]; pass missing='base'"
    >>> error.code, error.where
    ('shape_mismatch', 'w')
    >>> error.remedy
    "pass missing='base'"
    """

    def __init__(self, message: str, code: str = "refused", where: object = "", remedy: str = "") -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.code, self.where = code, str(where)
        said, _, told = message.rpartition("; ")
        self.message, self.remedy = (message, remedy) if remedy or not said else (said, told)

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process is told: the whole sentence alone would be pickle's own way."""
        return type(self), (self.message, self.code, self.where, self.remedy)


@contextmanager
def within(where: object, code: str = "refused") -> Iterator[None]:
    """What is refused in here is a matter of `where`, which its message begins with, and of this code where it has none.

    >>> with within("merge.yml", "bad_recipe"):
    ...     raise GradmatchError("slerp takes two models")
    Traceback (most recent call last):
    ...
    gradmatch.estimators.errors.GradmatchError: merge.yml: slerp takes two models
    """
    try:
        yield
    except GradmatchError as error:
        place, kept = f"{where}", code if error.code == "refused" else error.code
        if error.where.startswith(place) or error.message.startswith((f"{place}:", f"{place} ")):
            raise  # it is named, or a file in it
        raise GradmatchError(f"{place}: {error.message}", kept, error.where or where, error.remedy) from error
