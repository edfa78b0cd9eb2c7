"""Where the trials of a search are kept, so that workers on one machine or many share them: Optuna's storages, made safe.

`journal:FILE` (or any other path) is Optuna's journal, `sqlite:///FILE` (or a path that ends in .db or .sqlite) a database in a file,
`postgresql://user:password@host/base` a server. A password belongs into $GRADMATCH_STORAGE, not into a command line.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError

GRACE = 30.0  # seconds after which a lock that nobody renews is one of a process that is gone
BEAT = 20.0  # seconds between signs of life of a trial that runs
SILENT = 6 * BEAT  # a trial on another machine without a sign of life for so long is lost
REMOTE = ("nfs", "cifs", "smb", "fuse.sshfs", "glusterfs", "lustre", "beegfs", "9p", "afs")


def open_storage(place: str | os.PathLike[str] | None) -> Any:
    """The storage behind a path or URL; None is memory.

    A journal whose last line a kill has torn is cut back to the last whole one, and a lock that was left behind is removed; both are said.

    Raises:
        ConnectionError: a server or file that cannot be reached; the message holds no password.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if place is None:
        return optuna.storages.InMemoryStorage()
    text = os.fspath(place)
    if "://" not in text and not text.startswith("journal:"):
        text = f"sqlite:///{text}" if text.endswith((".db", ".sqlite", ".sqlite3")) else f"journal:{text}"
    if text.startswith("journal:"):
        file = Path(text.removeprefix("journal:")).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        mend(file)
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(str(file)))
    if text.startswith("sqlite:///"):
        file = Path(text.removeprefix("sqlite:///")).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        if (kind := filesystem(file)).startswith(REMOTE):
            warn(
                f"{file} lies on a network disk ({kind}), where SQLite can break when several machines write; use journal:FILE or PostgreSQL"
            )
    try:
        return optuna.storages.RDBStorage(text)
    except Exception as error:  # drivers raise their own
        raise ConnectionError(
            f"cannot open the {text.split('://')[0]} storage ({type(error).__name__}); PostgreSQL needs a server within reach and a driver "
            "(pip install 'gradmatch[zoo]'); a path makes a journal file instead"
        ) from None  # what the driver says may hold the password


def mend(file: Path) -> None:
    """Put right what a killed process left of a journal: a lock, and half of a last line."""
    lock = file.with_name(file.name + ".lock")
    with contextlib.suppress(FileNotFoundError):
        if time.time() - os.lstat(lock).st_mtime > GRACE:
            lock.unlink()
            warn(f"{lock} was left by a process that is gone, and is removed")
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content) and not os.path.lexists(lock):
        os.truncate(file, whole)
        warn(f"the last line of {file} was not written whole, as a killed worker leaves it; it is cut off")


def filesystem(path: Path) -> str:
    """The kind of file system that a path lies on, as the system's table of mounts calls it; "" where there is none."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    whole = str(path.absolute())
    inside = [(where, kind) for where, kind in mounts if whole.startswith(where.rstrip("/") + "/")]
    return max(inside, key=lambda one: len(one[0]), default=("", ""))[1]


def worker() -> dict[str, Any]:
    """Who runs a trial: machine, process, and when that process began (numbers of processes come again)."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def lost(told: dict[str, Any], beat: float) -> bool:
    """Whether the worker of a trial is gone: its process on this machine, or its signs of life from another."""
    if not told:
        return time.time() - beat > SILENT
    if told.get("host") == socket.gethostname():
        began = _began(int(told["pid"]))
        return began is None or (told.get("began") is not None and began != told["began"])
    return time.time() - beat > SILENT


def _began(pid: int) -> str | None:
    """When a process began, in the system's ticks; "" where that cannot be told, None where there is no such process."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").is_file():
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@contextlib.contextmanager
def signs_of_life(storage: Any, trial: int) -> Iterator[None]:
    """Write the time beside a trial every BEAT seconds while it runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(Exception):  # the trial itself tells of a storage that is gone
                storage.set_trial_user_attr(trial, "beat", time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def open_study(
    storage: Any, name: str, about: dict[str, Any], directions: int, sampler: Any
) -> tuple[Any, bool]:
    """A study of that name, made or gone on with; and whether it was made here.

    Raises:
        GradmatchError: a study of another search; the first difference is named.
    """
    import optuna

    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["maximize"] * directions, sampler=sampler
        )
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name, sampler=sampler)
        stored = study.user_attrs.get("about")
        for _ in range(50):  # its maker may not have come so far
            if stored is not None:
                break
            time.sleep(0.2)
            stored = study.user_attrs.get("about")
        if stored is None:
            raise GradmatchError(
                f"the study {name!r} was not made by gradmatch zoo evolve; choose another name or storage",
                "other_search",
                name,
            ) from None
        for key in dict.fromkeys((*about, *stored)):
            if about.get(key) != stored.get(key):
                raise GradmatchError(
                    f"the study {name!r} in this storage is of another search: its {key} is {stored.get(key)!r:.90}, here it is {about.get(key)!r:.90}; "
                    "choose another name or storage",
                    "other_search",
                    name,
                ) from None
        return study, False
    study.set_user_attr("about", about)
    return study, True
