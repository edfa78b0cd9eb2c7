"""Names that a user may have mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from gradmatch.estimators.errors import GradmatchError


def choose(option: str, value: str, known: Iterable[str]) -> None:
    """Refuse an unknown name and offer the nearest."""
    names = list(known)
    if value not in names:
        close = difflib.get_close_matches(str(value), names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        raise GradmatchError(f"unknown {option} {value!r}; {hint}", "unknown_name", option)
