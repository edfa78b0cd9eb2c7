"""Stages cached by content: a stage's folder is named by the hash of its settings, inputs, code and libraries; see `keys`.

A stage is a function `f(out, **inputs, **settings)` that fills the folder `out`; what exists is never run again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Union

from experiments import keys
from experiments.records import Record

CARD = "stage.json"  # where a result says what it is of; written last
ORIGIN = ("key", "commit", "versions", "machine", "threads", "seconds", "finished", "peak_memory_mb")
Inputs = Mapping[str, Union["Stage", Mapping[str, "Stage"]]]


@dataclass(frozen=True, eq=False)
class Stage:
    """One cached step. `function` is `package.module:name`, imported only when the stage has to run.

    inputs: argument -> stage, or a mapping of stages; the function receives their folders. `seconds`: about how long it
    takes on two cores, for the plan. `reads`: files and folders outside the store (data, models), by the paths that the
    settings name; one that is not there (a hub's name) counts for nothing.
    """

    name: str
    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)
    seconds: float = 1.0
    reads: tuple[str, ...] = ()

    @cached_property
    def planned(self) -> float:
        """When the process that made the key began to read code, in seconds since the epoch; what changes later is not in it."""
        return keys.STARTED

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the result: function, code, libraries, settings, inputs' keys, local files."""
        assert self.planned  # goes to helper processes with the key
        content = {
            "function": self.function,
            "python": sys.version_info[:2],
            "code": keys.code_of(self.function, self.settings),
            "settings": self.settings,
            "inputs": map_inputs(self.inputs, lambda stage: stage.key),
            "reads": {path: keys.content_digest(Path(path)) for path in self.reads if Path(path).exists()},
        }
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


def in_order(targets: Iterable[Stage], store: Path | None = None) -> list[Stage]:
    """The targets and all they need, each once (by name and key) and after what it reads; with `store`, those that are missing."""
    order: dict[tuple[str, str], Stage] = {}

    def visit(stage: Stage) -> None:
        if (stage.name, stage.key) not in order and not (store and is_done(stage, store)):
            for parent in stage.parents():
                visit(parent)
            order[(stage.name, stage.key)] = stage

    for target in targets:
        visit(target)
    return list(order.values())


def is_done(stage: Stage, store: Path) -> bool:
    """Whether the stage's result is there, whole."""
    return (stage.folder(store) / CARD).is_file()


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


def card(stage: Stage, store: Path) -> dict[str, Any]:
    """The card of a stage that is done: settings, seconds, commit, versions, machine."""
    loaded: dict[str, Any] = json.loads((stage.folder(store) / CARD).read_text(encoding="utf-8"))
    return loaded


def origin(stage: Stage, store: Path) -> dict[str, Any]:
    """Where the numbers of a stage that is done come from, for its records."""
    found = card(stage, store)
    return {key: found[key] for key in ORIGIN}


def result(stage: Stage, store: Path, file: str) -> Any:
    """What a stage that is done wrote into a JSON file."""
    return json.loads((stage.folder(store) / file).read_text(encoding="utf-8"))


def recorded(stage: Stage, store: Path, kind: str, file: str, *, under: str = "", **own: Any) -> list[Record]:
    """The record of a stage, from a JSON file that it wrote; none where it is not done.

    under: the key that the file's content goes under. own: what it is of; that counts where the content has such a key too.
    """
    if not is_done(stage, store):
        return []
    content = result(stage, store, file)
    told = {under: content} if under else content
    return [{"kind": kind, **own, **told, **own, **origin(stage, store)}]
