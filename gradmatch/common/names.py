"""Parts of messages: the nearest name to one that was mistyped, and what another library said, in short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """The hint " (did you mean 'x'?)" where something is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException, longest: int = 120) -> str:
    r"""What an error of another library says, without the paragraphs that follow.

    >>> first_line(ValueError("no such file\n\nSee the manual."))
    'no such file'
    """
    text = str(error.__cause__ or error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= longest else line[: longest - 3].rsplit(" ", 1)[0] + " ..."
