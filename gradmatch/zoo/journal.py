"""A search as JSON lines: what it is of, every evaluation and every choice, one a line, kept from run to run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import hold, let_go

FORMAT = 1


class Journal:
    """Lines that are appended as they come; a second run over the same file finds those of the first.

    Args:
        path: the file; None: lines are kept in memory alone.
        about: what the search is of (models, score, method). A file that is about something else is not continued.

    Attributes:
        lines: of this run and of those before.

    Raises:
        GradmatchError: no journal of a search, or one of another search; the first difference is named.
        BlockingIOError: another process writes it.

    >>> journal = Journal(None, {"score": "accuracy"})
    >>> journal.add("evaluation", score=0.5)
    >>> [line["kind"] for line in journal.lines]
    ['begin', 'evaluation']
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._file: Any = None
        self._lock: Any = None
        begin = {"kind": "begin", "format": FORMAT, **json.loads(json.dumps(dict(about)))}
        if path is not None:
            place = Path(path).expanduser()
            if place.is_dir():
                raise IsADirectoryError(f"{place} is a folder; a log is a file of JSON lines")
            place.parent.mkdir(parents=True, exist_ok=True)
            self._lock = hold(place.with_name(place.name + ".lock"))
            if self._lock is None:
                raise BlockingIOError(f"another process writes {place}; wait for it, or name another log")
            self.lines = list(_read(place))
            if self.lines:
                _check(place, self.lines[0], begin)
            self._file = place.open("a", encoding="utf-8")
        if not self.lines:
            self._write(begin)

    def add(self, kind: str, **told: Any) -> None:
        """Append a line."""
        self._write({"kind": kind, **told})

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def close(self) -> None:
        """Let others write."""
        if self._file is not None:
            self._file.close()
            let_go(self._lock)
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines; what a kill left of a last one is cut off, and said.

    Raises:
        GradmatchError: a line in the middle that is no JSON.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        warn(f"the last line of {path} was not written whole, as a killed run leaves it; it is cut off")
        os.truncate(path, whole)
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            found = json.loads(line)
            assert isinstance(found["kind"], str)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise GradmatchError(
                f"{path}, line {number}: no line of a search's log; name another file",
                "unreadable_file",
                path,
            ) from error
        yield found


def _check(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a log of another search."""
    for key in dict.fromkeys((*stored, *asked)):
        if stored.get(key) == asked.get(key):
            continue
        there, here = stored.get(key), asked.get(key)
        what = key
        if isinstance(there, dict) and isinstance(here, dict):
            inner = next(name for name in dict.fromkeys((*there, *here)) if there.get(name) != here.get(name))
            what, there, here = f"{key} {inner!r}", there.get(inner), here.get(inner)
        raise GradmatchError(
            f"{path} is the log of another search: its {what} is {there!r:.80}, here it is {here!r:.80}; name another file",
            "other_search",
            path,
        )
