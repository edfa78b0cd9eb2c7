"""Parts of messages: names that were mistyped, and what another library said, in short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from gradmatch.estimators.errors import GradmatchError


def nearest(name: object, known: Iterable[str]) -> str:
    """The hint " (did you mean 'x'?)" where something is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choose(option: str, value: object, known: Iterable[str]) -> None:
    """Refuse a value that is none of the known names.

    Raises:
        GradmatchError: the nearest is named, and all of them.

    >>> choose("reduction", "bacth", ("example", "batch"))
    Traceback (most recent call last):
    ...
    gradmatch.estimators.errors.GradmatchError: reduction is 'bacth' (did you mean 'batch'?); choose one of example, batch
    """
    names = list(known)
    if value not in names:
        listed = ", ".join(name or repr(name) for name in names)
        raise GradmatchError(
            f"{option} is {value!r}{nearest(value, names)}; choose one of {listed}", "unknown_name", option
        )


def first_line(error: BaseException, longest: int = 120) -> str:
    r"""What an error of another library says, without the paragraphs that follow.

    >>> first_line(ValueError("no such file\n\nSee the manual."))
    'no such file'
    """
    text = str(error.__cause__ or error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= longest else line[: longest - 3].rsplit(" ", 1)[0] + " ..."
