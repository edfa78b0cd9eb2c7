"""The output folder: written aside, journalled so that an interrupted merge resumes, and renamed into place when whole.

`OUT.partial` holds preallocated shards, `journal.jsonl` and `lock`. A tensor is journalled only after its bytes are on disk;
the next run of the same merge writes what is missing and the result is byte-identical. Another merge into the same folder
starts afresh. The lock belongs to the process and falls with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.checkpoint import INDEX
from gradmatch.layout import Layout, carry_along

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.plan import Plan, Step

SYNC_BYTES = 64 << 20  # written between two syncs: what an interruption can lose


class FolderSink:
    """A sink that writes a folder which transformers' from_pretrained loads.

    Args:
        out: the folder to appear.
        plan: its tensors.
        identity: of the merge; a journal of another one is discarded.
        overwrite: replace a folder that is there.

    Raises:
        FileExistsError: `out` is there and holds something.
        BlockingIOError: another process is writing it.
        OSError: no space for the whole output; nothing is left behind.
    """

    def __init__(self, out: Path, plan: Plan, identity: str, *, overwrite: bool = False) -> None:
        self.out, self.plan, self.overwrite = out, plan, overwrite
        check_absent(out, overwrite)
        self.folder = out.with_name(out.name + ".partial")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        self._lock = _lock(self.folder / "lock", out)
        self.layout = Layout(plan)
        self.stats: dict[str, dict[str, float]] = {}
        self._fds: dict[str, int] = {}
        try:
            if not self._read_journal(identity):
                self._start(identity)
            for shard in self.layout.shards:
                self._fds[shard] = os.open(self.folder / shard, os.O_RDWR)
        except BaseException:
            self.abandon()
            raise
        self._journal = open(self.folder / "journal.jsonl", "a", encoding="utf-8")  # noqa: SIM115 closed with the sink
        self._queue: queue.Queue[tuple[str, Mapping[str, float]] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._committer = threading.Thread(target=self._commit, name="commit", daemon=True)
        self._committer.start()

    def write(self, step: Step, first: int, values: Tensor) -> None:
        """Write flat values at their place; safe from several threads.

        Raises:
            OSError: the disk refuses.
        """
        import torch

        if self._failure:
            raise self._failure
        shard, start = self.layout.place[step.name]
        offset = start + first * values.element_size()
        data = values.contiguous().view(torch.uint8).numpy().data
        while data:
            done = os.pwrite(self._fds[shard], data, offset)
            data, offset = data[done:], offset + done

    def finish(self, step: Step, stats: Mapping[str, float]) -> None:
        """A tensor is whole: journal it once it is on disk."""
        self.stats[step.name] = dict(stats)
        self._queue.put((step.name, dict(stats)))

    def close(self) -> None:
        """Sync and journal everything written so far, and release the lock; what is there can be resumed."""
        self._stop()
        self._release()
        if self._failure:
            raise self._failure

    def close_quietly(self) -> None:
        """`close` where another error is on its way already."""
        with contextlib.suppress(OSError):
            self.close()

    def publish(self, extra: Mapping[str, bytes]) -> None:
        """Add config, tokenizer, index and `extra` files, sync, and rename the folder into place."""
        self._stop()
        if self._failure:
            self._release()
            raise self._failure
        carried = carry_along(self.plan, self.folder)
        files = dict(extra)
        if len(self.layout.shards) > 1:
            files[INDEX] = self.layout.index()
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in carried:
            _sync(self.folder / name)
        (self.folder / "journal.jsonl").unlink()
        _sync(self.folder)
        replace_folder(self.folder, self.out, self.overwrite)
        (self.out / "lock").unlink(missing_ok=True)
        self._release()

    def abandon(self) -> None:
        """Close everything and remove what was begun."""
        if hasattr(self, "_committer"):
            self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _start(self, identity: str) -> None:
        """Lay out empty shards with their headers; the space is claimed now, before any work."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for shard in self.layout.shards:
            header, size = self.layout.header(shard)
            with (self.folder / shard).open("wb") as file:
                _claim(file.fileno(), size, self.out)
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
        with (self.folder / "journal.jsonl").open("w", encoding="utf-8") as file:
            file.write(json.dumps({"identity": identity}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _sync(self.folder)

    def _read_journal(self, identity: str) -> bool:
        """Take over what an interrupted run of the same merge has finished; False where there is nothing to take."""
        path = self.folder / "journal.jsonl"
        if not path.is_file():
            return False
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a last line without its end was cut
        if not lines or json.loads(lines[0]).get("identity") != identity:
            return False
        for shard in self.layout.shards:
            file = self.folder / shard
            if not file.is_file() or file.stat().st_size != self.layout.header(shard)[1]:
                return False
        for line in lines[1:]:
            entry = json.loads(line)
            self.stats[entry["tensor"]] = entry["stats"]
        whole = sum(len(line.encode()) + 1 for line in lines)
        os.truncate(path, whole)
        return True

    def _commit(self) -> None:
        """Sync data, then journal, in batches, while the workers go on."""
        waiting: list[tuple[str, Mapping[str, float]]] = []
        nbytes = {step.name: step.spec.nbytes for step in self.plan.steps}
        held = 0
        while True:
            item = self._queue.get()
            try:
                if item is not None:
                    waiting.append(item)
                    held += nbytes.get(item[0], 0)
                if waiting and (item is None or held >= SYNC_BYTES):
                    for shard in {self.layout.place[name][0] for name, _ in waiting}:
                        os.fdatasync(self._fds[shard])
                    for name, stats in waiting:
                        self._journal.write(json.dumps({"tensor": name, "stats": stats}) + "\n")
                    self._journal.flush()
                    os.fdatasync(self._journal.fileno())
                    waiting, held = [], 0
            except OSError as error:
                self._failure = error
                return
            if item is None:
                return

    def _stop(self) -> None:
        if self._committer.is_alive():
            self._queue.put(None)
            self._committer.join()
        self._journal.close()

    def _release(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
        with contextlib.suppress(OSError):
            os.close(self._lock)


def check_absent(out: Path, overwrite: bool) -> None:
    """Refuse to touch what is there.

    Raises:
        FileExistsError: a file, or a folder that holds something and is not to be replaced.
    """
    if out.is_file():
        raise FileExistsError(f"{out} is a file; the output is a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f"the output folder {out} exists; pass overwrite (--overwrite) to replace it, or choose another"
        )


def replace_folder(folder: Path, out: Path, overwrite: bool) -> None:
    """Rename a finished folder into place; an old one disappears only after the new one is there."""
    old = None
    if out.is_dir():
        if overwrite and any(out.iterdir()):
            old = out.with_name(f"{out.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(out, old)
        else:
            out.rmdir()
    os.rename(folder, out)
    _sync(out.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _lock(path: Path, out: Path) -> int:
    """Hold the folder for this process.

    Raises:
        BlockingIOError: another process holds it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise BlockingIOError(
            f"another process is writing {out} (it holds {path}); wait for it or choose another folder"
        ) from error
    return fd


def _claim(fd: int, size: int, out: Path) -> None:
    """Reserve the bytes of a shard.

    Raises:
        OSError: there is no room.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"no room for {size / 1e9:.2f} GB in {out.parent}: {error.strerror}; nothing was written",
        ) from error


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
