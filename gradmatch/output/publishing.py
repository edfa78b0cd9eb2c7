"""The places around an output folder: who may write it, what may be replaced, and how it appears whole.

OUT.partial           what is being written
OUT.partial.journal   what of it is finished
OUT.partial.lock      held by the process that writes
OUT.replaced          the merge that stood at OUT before, for the moment between two renames

Nothing is emptied or replaced that a merge did not write: a folder with a card, or a .partial with its journal. Where a
process died between two steps, the next one to write OUT puts things right (`recover`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import hold, let_go, sync
from gradmatch.output.card import CARD

if TYPE_CHECKING:
    from filelock import BaseFileLock

BEGINNING = b'{"identity": '  # of every journal


def place(out: str | os.PathLike[str]) -> Path:
    """The output folder as an absolute path, links followed.

    Raises:
        ValueError: the root, or the working directory or a folder around it, which cannot be renamed into place.
    """
    path = Path(out).expanduser().resolve()
    if path in (Path.cwd(), *Path.cwd().parents):
        raise GradmatchError(
            f"the output folder {path} is or holds the working directory and cannot be put into place by renaming; "
            "name a folder inside it",
            "bad_output",
            path,
        )
    return path


def beside(out: Path) -> tuple[Path, Path, Path]:
    """The paths of OUT.partial, OUT.partial.journal and OUT.replaced."""
    partial, journal, replaced = (".partial", ".partial.journal", ".replaced")
    return (
        out.with_name(out.name + partial),
        out.with_name(out.name + journal),
        out.with_name(out.name + replaced),
    )


def check_apart_from(out: Path, paths: Iterable[Path], reader: str) -> None:
    """Refuse an output that is, holds or lies in something that is read; `reader` says by whom.

    Raises:
        GradmatchError: both paths are named.
    """
    out = out.resolve()
    for read in sorted({path.resolve() for path in paths}):
        if out == read or out in read.parents or read in out.parents:
            raise GradmatchError(
                f"the output folder {out} and the input {read} are the same or lie in one another; "
                f"choose an output folder apart from everything that {reader}",
                "bad_output",
                out,
            )


def check_parent(out: Path) -> None:
    """Refuse an output whose folder cannot be made or written in.

    Raises:
        NotADirectoryError: it would lie in a file.
        PermissionError: nothing may be written there.
    """
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir():
        raise NotADirectoryError(
            f"{parent} is a file, so the output {out} cannot lie in it; choose another folder"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"nothing may be written in {parent}, where the output {out} would lie; choose another folder"
        )


def check_absent(out: Path, overwrite: bool) -> None:
    """Refuse to touch what is there and is no merge of ours.

    Raises:
        FileExistsError: a file; a folder that holds something and is not to be replaced, or that no merge wrote; or
            something else under the name of what is written first.
    """
    if out.is_file():
        raise FileExistsError(f"{out} is a file; the output is a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"the output folder {out} exists; pass overwrite (--overwrite) to replace it, or choose another"
            )
        if not (out / CARD).is_file():
            raise FileExistsError(
                f"{out} holds files but no {CARD}, so no merge wrote it and it is not replaced; remove it yourself or choose another"
            )
    partial, journal, replaced = beside(out)
    begun = journal.read_bytes() if journal.is_file() else b""
    ours = begun.startswith(BEGINNING)
    if begun and not ours:
        raise FileExistsError(
            f"{journal} is damaged or no journal of a merge; remove it together with {partial}, or choose another output"
        )
    if partial.exists() and not ours and (partial.is_file() or any(partial.iterdir())):
        raise FileExistsError(
            f"{partial} is where {out} would be written first, and it is no unfinished merge; move it away"
        )
    if replaced.exists() and not (replaced / CARD).is_file():
        raise FileExistsError(
            f"{replaced} is where the old {out} would wait, and it is no merge; move it away"
        )


def lock(out: Path) -> BaseFileLock:
    """Hold an output for this process.

    Raises:
        BlockingIOError: another process holds it.
    """
    path = out.with_name(f"{out.name}.partial.lock")
    held = hold(path)
    if held is None:
        raise BlockingIOError(
            f"another process is writing {out} (it holds {path}); wait for it or choose another folder"
        )
    return held


def begin(out: Path, overwrite: bool) -> BaseFileLock:
    """Hold an output that may be written, with its journal there and what an earlier process left put right.

    Where it is refused the lock falls again, and a journal that was not there before goes.

    Raises:
        NotADirectoryError, PermissionError: as `check_parent`.
        BlockingIOError: as `lock`.
        FileExistsError: as `check_absent`.
    """
    check_parent(out)
    _, journal, _ = beside(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    held = lock(out)
    try:
        journal.touch()
        try:
            recover(out)
            check_absent(out, overwrite)
        except BaseException:
            if not journal.stat().st_size:
                journal.unlink()
            raise
    except BaseException:
        let_go(held)
        raise
    return held


def recover(out: Path) -> None:
    """Put right what a process left that died while it published: the old output comes back, or goes for good."""
    partial, journal, replaced = beside(out)
    if (replaced / CARD).is_file():
        if out.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, out)
    if out.exists() and not partial.exists():
        os.truncate(journal, 0)  # published: the journal was all that was left to remove


def replace_folder(out: Path) -> None:
    """Rename a finished .partial into place; an old output disappears only after the new one is there."""
    partial, journal, replaced = beside(out)
    if out.is_dir() and any(out.iterdir()):
        os.rename(out, replaced)
    os.rename(partial, out)  # over an empty folder too
    sync(out.parent)
    journal.unlink()
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def appearing(out: Path, identity: str, overwrite: bool) -> Iterator[Path]:
    """A new folder to fill aside, renamed into place at the end; after an error nothing of it is left. It is written in one go, and never resumed.

    Raises:
        NotADirectoryError, PermissionError, BlockingIOError, FileExistsError: as `begin`.
    """
    folder, journal, _ = beside(out)
    held = begin(out, overwrite)
    try:
        journal.write_text(json.dumps({"identity": identity}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # an unfinished merge
        folder.mkdir()
        yield folder
        sync(folder)
        replace_folder(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        journal.unlink(missing_ok=True)
        raise
    finally:
        let_go(held)
