"""Running stages: whole or not at all, by several workers at once.

A stage runs in a folder aside, which is renamed when it is complete. It is locked while it runs, so several workers (of this
command or of another, on one file system) share a store: each takes the next stage that is ready, and the work of one that
was killed is taken up by the others. A stage that fails loses only those that need it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from tqdm import tqdm

from experiments import keys, provenance
from experiments.files import write_json
from experiments.pipeline import CARD, Stage, in_order, is_done, map_inputs
from gradmatch.estimators.files import hold, let_go, write_atomically


@dataclass
class Outcome:
    """What a run did: names of the stages that ran; error and traceback of each that failed; those that could not start."""

    ran: list[str]
    failed: dict[str, dict[str, str]]
    skipped: list[str]

    def message(self) -> str:
        """What failed, an error a line, and what that costs; empty where nothing did."""
        lines = [f"stage {name} failed: {failure['error']}" for name, failure in self.failed.items()]
        if self.skipped:
            names = ", ".join(self.skipped[:5]) + (", ..." if len(self.skipped) > 5 else "")
            lines.append(f"{len(self.skipped)} stage(s) that need it were not run: {names}")
        return "\n".join(lines)


def run(targets: Iterable[Stage], store: Path, workers: int = 1) -> Outcome:
    """Run what is missing of the targets and of all they need, with `workers` processes (this one included)."""
    stages = pending = in_order(targets, store)  # what a result was made of may be pruned
    if not pending:
        return Outcome([], {}, [])
    for stage in pending:
        _failure_file(stage, store).unlink(missing_ok=True)  # a new run tries again
    context = multiprocessing.get_context("spawn")
    threads = max(1, provenance.cores() // workers)
    helpers = [
        context.Process(target=_helper, args=(stages, store, threads), daemon=True)
        for _ in range(workers - 1)
    ]
    for helper in helpers:
        helper.start()
    try:
        work(stages, store, threads if workers > 1 else None)
    finally:
        for helper in helpers:
            helper.join(timeout=30)
            helper.kill()
    failed = {
        stage.name: json.loads(_failure_file(stage, store).read_text())
        for stage in pending
        if _has_failed(stage, store)
    }
    done = [stage.name for stage in pending if is_done(stage, store)]
    return Outcome(done, failed, [stage.name for stage in pending if stage.name not in {*done, *failed}])


def work(stages: Sequence[Stage], store: Path, threads: int | None = None) -> None:
    """Take the next stage that is ready and that nobody else runs, until none is left that could become ready."""
    if threads is not None:
        _limit_threads(threads)
    while True:
        progressed = waiting = False
        lost: set[str] = set()
        for number, stage in enumerate(stages, start=1):
            if is_done(stage, store):
                continue
            if _has_failed(stage, store) or any(parent.key in lost for parent in stage.parents()):
                lost.add(stage.key)
            elif not all(is_done(parent, store) for parent in stage.parents()):
                waiting = True
            else:
                with _lock(stage, store) as mine:
                    waiting |= not mine
                    if mine and not is_done(stage, store) and not _has_failed(stage, store):
                        _attempt(stage, store, f"[{number}/{len(stages)}] {stage.name}")
                        progressed = True
        if not progressed:
            if not waiting:
                return
            time.sleep(0.1)


def _helper(stages: Sequence[Stage], store: Path, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # not its own, shared by processes: it would be reported as leaked
    with contextlib.suppress(KeyboardInterrupt):  # the first process says it
        work(stages, store, threads)
    # All is on disk: taking down an interpreter full of models takes seconds for which the run would wait.
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent() -> None:
    """A run that is killed has no chance to end its helpers: they watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a helper has one
    parent.join()
    os._exit(1)


def _limit_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for libraries that are not loaded yet
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _attempt(stage: Stage, store: Path, title: str) -> None:
    """Run a stage; an error is written beside its folder and shown, and is not raised."""
    print(f"{title} ...", file=sys.stderr, flush=True)
    gc.freeze()  # libraries are a million objects: without it, each collection looks through all of them
    try:
        seconds = execute(stage, store)
        print(f"{title}: {seconds:.1f} s", file=sys.stderr, flush=True)
    except Exception as error:
        failure = {"error": str(error) or type(error).__name__, "traceback": traceback.format_exc()}
        write_atomically(_failure_file(stage, store), json.dumps(failure))
        print(f"{title}: failed ({type(error).__name__})", file=sys.stderr, flush=True)
    gc.collect()  # models lie in cycles


def execute(stage: Stage, store: Path) -> float:
    """Run a stage aside and rename its folder when it is complete; returns the seconds it took."""
    module, name = stage.function.split(":")
    folder = stage.folder(store)  # of the key as it was planned
    changed = keys.changed_since(stage.planned, stage.function, stage.settings)
    if changed:
        raise RuntimeError(
            f"the code of {', '.join(changed)} changed while the run was under way: start it again"
        )
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)  # a killed worker's: we hold the lock, so nobody writes it now
    aside.mkdir(parents=True)
    start = time.perf_counter()
    try:
        function = getattr(importlib.import_module(module), name)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            function(aside, **map_inputs(stage.inputs, lambda parent: parent.folder(store)), **stage.settings)
        seconds = time.perf_counter() - start
        card = {
            **{name: getattr(stage, name) for name in ("name", "key", "function", "settings")},
            "libraries": keys.code_of(stage.function, stage.settings)["libraries"],
            "inputs": map_inputs(stage.inputs, lambda parent: f"{parent.name}-{parent.key}"),
            "seconds": round(seconds, 2),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "machine": provenance.machine(),
            "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1,
            "peak_memory_mb": provenance.peak_memory_mb(),
        }
        write_json(aside / CARD, card)
        shutil.rmtree(folder, ignore_errors=True)  # a folder without its card, emptied by hand
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return seconds


def _failure_file(stage: Stage, store: Path) -> Path:
    folder = stage.folder(store)
    return folder.with_name(folder.name + ".failed")


def _has_failed(stage: Stage, store: Path) -> bool:
    return _failure_file(stage, store).is_file()


@contextlib.contextmanager
def _lock(stage: Stage, store: Path) -> Iterator[bool]:
    """Yield whether the stage is ours to run. The lock goes with its process, however that ends."""
    path = store / ".locks" / stage.key
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = hold(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            let_go(lock)
