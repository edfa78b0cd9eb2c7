"""Stages cached by content: a stage's folder is named by the hash of its settings, inputs and code.

A stage is a function `f(out, **inputs, **settings)` that fills the folder `out`. It runs in a folder aside, which is renamed
when it is complete; what exists is never run again. A stage is locked while it runs, so several workers (of this command or
of another, on one file system) share a store: each takes the next stage that is ready, and the work of one that was killed
is taken up by the others. A stage that fails loses only those that need it.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import gc
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Union

from tqdm import tqdm

from experiments import provenance
from experiments.records import write_atomically

ORIGIN = ("key", "commit", "versions", "machine", "threads", "seconds", "finished", "peak_memory_mb")
Inputs = Mapping[str, Union["Stage", Mapping[str, "Stage"]]]


@dataclass(frozen=True, eq=False)
class Stage:
    """One cached step. `function` is `package.module:name`, imported only when the stage has to run.

    inputs: argument -> stage, or a mapping of stages; the function receives their folders. `code`: the modules and packages
    whose code decides the result. `seconds`: about how long it takes on two cores, for the plan. `reads`: files and folders
    outside the store, by the paths that the settings name; one that is not there (a hub's name) counts for nothing.
    """

    name: str
    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)
    code: tuple[str, ...] = ()
    seconds: float = 1.0
    reads: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the result: function, its code, settings, keys of inputs, content of local files."""
        modules = sorted({self.function.split(":")[0], *self.code})
        content = {
            "function": self.function,
            "code": [code_digest(module) for module in modules],
            "settings": self.settings,
            "inputs": map_inputs(self.inputs, lambda stage: stage.key),
        }
        local = {path: content_digest(Path(path)) for path in self.reads if Path(path).exists()}
        if local:
            content["reads"] = local
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, store: Path) -> Path:
        """Where the result lies once it is complete."""
        return store / f"{self.name}-{self.key}"

    def parents(self) -> list[Stage]:
        """The stages whose results this one reads."""
        flat: list[Stage] = []
        for value in self.inputs.values():
            flat += [value] if isinstance(value, Stage) else value.values()
        return flat


def map_inputs(inputs: Inputs, function: Any) -> dict[str, Any]:
    """The same mapping with every stage replaced by `function(stage)`."""
    return {
        name: function(value)
        if isinstance(value, Stage)
        else {key: function(stage) for key, stage in value.items()}
        for name, value in inputs.items()
    }


def content_digest(path: Path) -> str:
    """Hash of a file, or of all files under a folder with their names."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    parts = [
        [file.relative_to(path).as_posix(), _file_digest(file, file.stat().st_mtime_ns, file.stat().st_size)]
        for file in files
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@lru_cache
def _file_digest(file: Path, changed: int, size: int) -> str:
    """Hash of a file, read again where it was `changed` or has another `size`."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@lru_cache
def code_digest(module: str) -> str:
    """Hash of a module's (or a whole package's) code, blind to comments, docstrings and layout."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no code found for {module!r}, which a stage declares as its own")
    folder = spec.submodule_search_locations
    files = sorted(Path(folder[0]).rglob("*.py")) if folder else [Path(spec.origin)]
    return hashlib.sha256("".join(_bare_code(file) for file in files).encode()).hexdigest()


def _bare_code(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a string that stands alone does nothing: docstrings
            node.body = [part for part in body if not _is_bare_string(part)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_bare_string(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def in_order(targets: Iterable[Stage]) -> list[Stage]:
    """The targets and all they need, each once (by name and key) and after what it reads."""
    order: dict[tuple[str, str], Stage] = {}

    def visit(stage: Stage) -> None:
        if (stage.name, stage.key) not in order:
            for parent in stage.parents():
                visit(parent)
            order[(stage.name, stage.key)] = stage

    for target in targets:
        visit(target)
    return list(order.values())


def is_done(stage: Stage, store: Path) -> bool:
    """Whether the stage's result is there, whole."""
    return (stage.folder(store) / "stage.json").is_file()


def plan(stages: Sequence[Stage], store: Path) -> str:
    """The listing of `--dry-run`: every stage, whether it is cached, else about how long it takes."""
    lines = []
    pending = [stage for stage in stages if not is_done(stage, store)]
    for stage in stages:
        state = f"about {stage.seconds:4.0f} s" if stage in pending else "cached      "
        lines.append(f"  {state}  {stage.name}-{stage.key}")
    minutes = sum(stage.seconds for stage in pending) / 60
    lines.append(
        f"{len(stages)} stages, {len(pending)} to run, about {minutes:.1f} minutes on two cores (with packaged models)"
    )
    return "\n".join(lines)


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
    stages = in_order(targets)
    pending = [stage for stage in stages if not is_done(stage, store)]
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
    try:
        seconds = execute(stage, store)
        print(f"{title}: {seconds:.1f} s", file=sys.stderr, flush=True)
    except Exception as error:
        failure = {"error": str(error) or type(error).__name__, "traceback": traceback.format_exc()}
        write_atomically(_failure_file(stage, store), json.dumps(failure))
        print(f"{title}: failed ({type(error).__name__})", file=sys.stderr, flush=True)


def execute(stage: Stage, store: Path) -> float:
    """Run a stage aside and rename its folder when it is complete; returns the seconds it took."""
    module, name = stage.function.split(":")
    folder = stage.folder(store)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(
        aside, ignore_errors=True
    )  # left by a killed worker: we hold the lock, so nobody writes it now
    aside.mkdir(parents=True)
    start = time.perf_counter()
    try:
        function = getattr(importlib.import_module(module), name)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            function(aside, **map_inputs(stage.inputs, lambda parent: parent.folder(store)), **stage.settings)
        seconds = time.perf_counter() - start
        card = {
            "name": stage.name,
            "key": stage.key,
            "function": stage.function,
            "settings": stage.settings,
            "inputs": map_inputs(stage.inputs, lambda parent: f"{parent.name}-{parent.key}"),
            "seconds": round(seconds, 2),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "machine": provenance.machine(),
            "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1,
            "peak_memory_mb": provenance.peak_memory_mb(),
        }
        (aside / "stage.json").write_text(json.dumps(card, indent=1, sort_keys=True), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a folder without its card, emptied by hand
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    gc.collect()
    return seconds


def card(stage: Stage, store: Path) -> dict[str, Any]:
    """The card of a stage that is done: settings, seconds, commit, versions, machine."""
    loaded: dict[str, Any] = json.loads((stage.folder(store) / "stage.json").read_text(encoding="utf-8"))
    return loaded


def origin(stage: Stage, store: Path) -> dict[str, Any]:
    """Where the numbers of a stage that is done come from, for its records."""
    found = card(stage, store)
    return {key: found[key] for key in ORIGIN}


def result(stage: Stage, store: Path, file: str) -> Any:
    """What a stage that is done wrote into a JSON file."""
    return json.loads((stage.folder(store) / file).read_text(encoding="utf-8"))


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
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
