"""The output folder: written aside, journalled so that an interrupted merge resumes, and renamed into place when whole.

`OUT.partial` holds preallocated shards; the journal beside it names the tensors whose bytes are on disk. The next run of the
same merge writes what is missing and the result is byte-identical. Another merge into the same folder starts afresh.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.estimators.files import claim, let_go, sync, sync_data, write_atomically
from gradmatch.output.carried import carry_along
from gradmatch.output.identity import check_apart
from gradmatch.output.layout import Layout
from gradmatch.output.publishing import begin, beside, check_absent, check_parent, place, replace_folder

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.plan.step import Plan, Step

SYNC_BYTES = 64 << 20  # written between two syncs: what an interruption can lose
SYNC_SECONDS = 2.0  # the same for rules that take longer than the disk


class FolderSink:
    """A sink that writes a folder which transformers' from_pretrained loads.

    Args:
        out: the folder to appear.
        plan: its tensors.
        identity: of the merge; a journal of another one is discarded.
        overwrite: replace a merge that is there.

    Attributes:
        out: the folder, links followed.
        folder: where it is written first.
        stats: of every tensor that an interrupted run has finished.

    Raises:
        ValueError: `out` lies on an input.
        FileExistsError: `out` is there and holds something, or what stands there is no merge.
        NotADirectoryError, PermissionError: `out` would lie in a file, or where nothing may be written.
        BlockingIOError: another process is writing it.
        OSError: no space for the whole output; nothing is left behind.
    """

    def __init__(self, out: Path, plan: Plan, identity: str, *, overwrite: bool = False) -> None:
        self.out, self.plan = place(out), plan
        check_apart(self.out, plan.inputs)  # before anything is created
        self.folder, self._journal_path, _ = beside(self.out)
        self._lock = begin(self.out, overwrite)
        try:
            self._journal = self._journal_path.open("r+b")
        except BaseException:
            let_go(self._lock)
            raise
        base = plan.inputs.base
        self.layout = Layout(
            {step.name: step.spec for step in plan.steps},
            plan.request.shard_bytes,
            base.aliases if base.config is None else {},
        )
        self.stats: dict[str, dict[str, float]] = {}
        self._fds: dict[str, int] = {}
        try:
            self.folder.mkdir(exist_ok=True)
            if self._read_journal(identity):
                # What `complete` adds is written anew, and aside files of a kill go.
                self._empty(keep=self.layout.shards)
            else:
                self._start(identity)
            for shard in self.layout.shards:
                self._fds[shard] = os.open(self.folder / shard, os.O_RDWR)
        except BaseException:
            self.abandon()
            raise
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

    def complete(self, extra: Mapping[str, bytes]) -> None:
        """Add config, tokenizer, index and `extra` files to the folder, and sync; it can be read from now on."""
        self._stop()
        if self._failure:
            raise self._failure
        for fd in self._fds.values():
            sync_data(fd)  # also what was written after its tensor had been journalled
        carried = carry_along(self.plan, self.folder)
        files = dict(extra)
        if len(self.layout.shards) > 1:
            files[self.layout.index_name] = self.layout.index()
        for name, content in files.items():
            path = self.folder / name
            write_atomically(path, content)
        for name in carried:
            sync(self.folder / name)
        sync(self.folder)

    def publish(self) -> None:
        """Rename the completed folder into place."""
        replace_folder(self.out)
        self._release()

    def abandon(self) -> None:
        """Close everything and remove what was begun."""
        if hasattr(self, "_committer"):
            self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._journal_path.unlink(missing_ok=True)
        self._release()

    def _start(self, identity: str) -> None:
        """Lay out empty shards with their headers; the space is claimed now, before any work."""
        self._empty()
        self._journal.truncate(0)
        self._journal.seek(0)
        self._record({"identity": identity})
        for shard in self.layout.shards:
            header, size = self.layout.header(shard)
            with (self.folder / shard).open("wb") as file:
                _claim(file.fileno(), size, self.out)
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
        sync(self.folder)
        self._record({"laid out": True})  # only now can it be resumed

    def _empty(self, keep: Collection[str] = ()) -> None:
        """Remove everything in the unfinished folder but the files of these names."""
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _read_journal(self, identity: str) -> bool:
        """Take over what an interrupted run of the same merge has finished; False where there is nothing to take."""
        whole, entries = 0, []
        for line in self._journal.read().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    break  # cut
                entries.append(json.loads(line))
            except ValueError:
                break  # damaged, as a loss of power can leave it: what follows does not count
            whole += len(line)
        if entries[:2] != [{"identity": identity}, {"laid out": True}]:
            return False
        for shard in self.layout.shards:
            file = self.folder / shard
            if not file.is_file() or file.stat().st_size != self.layout.header(shard)[1]:
                return False
        self.stats |= {entry["tensor"]: entry["stats"] for entry in entries[2:]}
        self._journal.truncate(whole)
        self._journal.seek(whole)
        return True

    def _record(self, *entries: Mapping[str, object]) -> None:
        """Add lines to the journal, and sync it."""
        self._journal.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        self._journal.flush()
        sync_data(self._journal.fileno())

    def _commit(self) -> None:
        """Sync data, then journal, in batches, while the workers go on."""
        waiting: list[tuple[str, Mapping[str, float]]] = []
        nbytes = {step.name: step.spec.nbytes for step in self.plan.steps}
        held, synced = 0, time.monotonic()
        while True:
            item = self._queue.get()
            try:
                if item is not None:
                    waiting.append(item)
                    held += nbytes.get(item[0], 0)
                late = time.monotonic() - synced >= SYNC_SECONDS
                if waiting and (item is None or held >= SYNC_BYTES or late):
                    for shard in {self.layout.place[name][0] for name, _ in waiting}:
                        sync_data(self._fds[shard])
                    self._record(*({"tensor": name, "stats": stats} for name, stats in waiting))
                    waiting, held, synced = [], 0, time.monotonic()
            except OSError as error:
                self._failure = error
                return
            if item is None:
                return

    def _stop(self) -> None:
        if self._committer.is_alive():
            self._queue.put(None)
            self._committer.join()

    def _release(self) -> None:
        """Close the files, then the lock falls."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
        with contextlib.suppress(OSError):
            self._journal.close()
        let_go(self._lock)


def check_output(out: str | os.PathLike[str], plan: Plan, overwrite: bool) -> None:
    """All that `FolderSink` refuses before it begins, for a dry run; errors as there."""
    check_apart(place(out), plan.inputs)
    check_parent(place(out))
    check_absent(place(out), overwrite)


def _claim(fd: int, size: int, out: Path) -> None:
    """Reserve the bytes of a shard."""
    try:
        claim(fd, size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"no room for {size / 1e9:.2f} GB in {out.parent}: {error.strerror}; nothing was written",
        ) from error
