"""Files that appear whole or not at all, and locks between processes: one way for all of them, on any system."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from filelock import BaseFileLock


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, in the folder of `path`; what was written is synced and renamed over `path` at the end.

    A reader sees the old file or the new one. The new one has the mode of the old, or what the umask gives; links are
    followed; after an error `path` is as it was.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: no space, or no permission.

    >>> with replacing("card.json") as aside:                                # doctest: +SKIP
    ...     aside.write_text("{}")
    """
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file to write in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    # made by whoever writes, with their umask
    aside = target.with_name(f".gradmatch-{uuid.uuid4().hex[:12]}")
    try:
        yield aside
        sync(aside)
        if target.exists():
            shutil.copymode(target, aside)
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes, whole or not at all; see `replacing`."""
    with replacing(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def parse_json(text: str | bytes, where: object, pairs: Callable[[list[Any]], Any] | None = None) -> Any:
    """The content of a JSON text; `where` names it, `pairs` makes a table of its pairs.

    Raises:
        GradmatchError: no JSON, no UTF-8, or more than can be read (depth, digits).
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except GradmatchError:
        raise
    except (ValueError, RecursionError) as error:
        raise GradmatchError(f"{where} is not JSON ({error})", "not_json", where, "fetch it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        GradmatchError: not JSON, or no object.
    """
    content = parse_json(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise GradmatchError(f"{path} holds a {type(content).__name__}, not a table", "not_a_table", path)
    return content


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk; folders only where the system can."""
    try:
        fd = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except PermissionError:  # a folder, where these cannot be opened
        if path.is_dir():
            return
        raise
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_data(fd: int) -> None:
    """Wait until what was written to a descriptor is on disk (its times need not be)."""
    getattr(os, "fdatasync", os.fsync)(fd)


def claim(fd: int, size: int) -> None:
    """Make a file so long, with its space reserved where the system can do that.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.truncate(fd, size)


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME or ~/.cache.

    Raises:
        OSError: there is no home directory.
    """
    place = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(place or Path.home() / ".cache") / "gradmatch"
    except RuntimeError as error:
        raise OSError(f"no place for a cache ({error}); set XDG_CACHE_HOME") from error


def hold(path: Path) -> BaseFileLock | None:
    """The lock of this name for this process, or None where another one has it. It goes with the process, however that ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def let_go(lock: BaseFileLock) -> None:
    """Release a lock; its file goes while it is held, and whoever has opened that file meanwhile notices and tries again."""
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()
