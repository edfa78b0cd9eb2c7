"""A study again from its record alone: the whole or one stage, and whether the figures or the bytes agree."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import config as configs
from experiments import keys, provenance
from experiments.pipeline import CARD, ORIGIN, Stage, in_order, is_done
from experiments.records import Record, of_kind

# What of a record is of one run alone: where and when, not what came out.
OF_THE_RUN = {*ORIGIN, "folder", "config", "name", "experiment"}


def study_record(
    config: Any, made: Mapping[str, Any], stages: Sequence[Stage], targets: Sequence[Stage]
) -> Record:
    """The record that holds what a study needs to be run again. made: see `configs.made_of`."""
    last = {id(stage) for stage in targets}
    reads = sorted({path for stage in stages for path in stage.reads})
    return {
        "kind": "study",
        **made,
        "data": {path: keys.content_digest(Path(path)) if Path(path).exists() else None for path in reads},
        "stages": {f"{stage.name}-{stage.key}": id(stage) in last for stage in stages},
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }


def of_study(records: Sequence[Record], where: Path) -> Record:
    """The record of the study itself.

    Raises:
        ValueError: the file is older than such records.
    """
    found = of_kind(records, "study")
    if not found:
        raise ValueError(
            f"{where} does not hold the config of its study: run the config again, then its records do"
        )
    return found[0]


def changes(study: Record) -> list[str]:
    """What is not now as it was when a study ran: commit, versions, data; a line each."""
    lines = []
    now = {"commit": provenance.commit(), **provenance.versions()}
    for name, was in {"commit": study["commit"], **study["versions"]}.items():
        if now.get(name) != was:
            lines.append(f"{name}: {was} then, {now.get(name)} now")
    for path, was in study["data"].items():
        there = keys.content_digest(Path(path)) if Path(path).exists() else None
        if there != was:
            lines.append(f"{path}: {'not there' if there is None else 'other content'} now")
    return lines


@dataclass
class Agreement:
    """How two lots of records or files compare: how many figures, which differ, by how much."""

    count: int = 0
    differing: list[tuple[str, Any, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.differing:
            return f"{self.count} figures compared: all are the same to the last digit"
        size = max(self.differing, key=lambda one: _distance(*one[1:]))
        lines = [
            f"{self.count} figures compared: {len(self.differing)} differ, most of all {size[0]} ({size[1]} then, {size[2]} now)"
        ]
        lines += [f"  {path}: {was} then, {now} now" for path, was, now in self.differing[:10]]
        return "\n".join([*lines, "  ..."] if len(self.differing) > 10 else lines)


def _distance(was: Any, now: Any) -> float:
    if isinstance(was, (int, float)) and isinstance(now, (int, float)):
        return abs(was - now) / max(abs(was), abs(now), 1e-300)
    return float("inf")


def compare(was: Sequence[Record], now: Sequence[Record]) -> Agreement:
    """Every figure and word of two lots of records of one study, but what is of a run alone."""
    first, second = (dict(figures(records)) for records in (was, now))
    found = Agreement(len(first.keys() | second.keys()))
    for path in [*first, *(path for path in second if path not in first)]:
        pair = first.get(path, "absent"), second.get(path, "absent")
        if pair[0] != pair[1]:
            found.differing.append((path, *pair))
    return found


def figures(records: Sequence[Record]) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in records, each called by its kind and what it is of."""
    counts: dict[str, int] = {}
    for record in records:
        if record.get("kind") != "study":
            words = [
                str(record[key])
                for key in ("kind", "model", "ours", "theirs", "seed", "estimate", "task")
                if key in record
            ]
            title = " ".join(words)
            counts[title] = counts.get(title, 0) + 1
            title += f" ({counts[title]})" if counts[title] > 1 else ""
            yield from _leaves({k: v for k, v in record.items() if k not in OF_THE_RUN}, title)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, own in value.items():
            if key not in ORIGIN and "seconds" not in str(key):
                yield from _leaves(own, f"{path}.{key}")
    elif isinstance(value, list):
        for number, own in enumerate(value):
            yield from _leaves(own, f"{path}.{number}")
    else:
        yield path, value


def stages_of(study: Record) -> tuple[Any, list[Stage]]:
    """The config of a study's record, and its stages as the code has them now."""
    config = configs.from_record(study)
    return config, in_order(configs.study(config.experiment).stages(config))


def run_stage(study: Record, name: str, store: Path) -> tuple[str, bool]:
    """Run one stage again beside its result: what agrees, and whether everything does.

    Raises:
        ValueError: no such stage, one that was never run, or whose inputs are gone.
    """
    from experiments import running

    _, stages = stages_of(study)
    own = [stage for stage in stages if name in (stage.name, f"{stage.name}-{stage.key}")]
    if not own:
        raise ValueError(f"no stage {name!r}{configs.nearest(name, [stage.name for stage in stages])}")
    stage = own[0]
    if not is_done(stage, store):
        raise ValueError(
            f"{stage.folder(store)} is not there: it was not run, it was pruned, or code, libraries or data have changed since "
            "(then run the whole again)"
        )
    gone = [parent.name for parent in stage.parents() if not is_done(parent, store)]
    if gone:
        raise ValueError(f"{gone[0]}, which {name} reads, is not there any more: run the whole again")
    with tempfile.TemporaryDirectory(dir=store) as aside:
        for parent in stage.parents():
            place = parent.folder(Path(aside))
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.symlink_to(parent.folder(store).resolve())
        running.execute(stage, Path(aside))
        return _same_files(stage.folder(store), stage.folder(Path(aside)))


def _same_files(was: Path, now: Path) -> tuple[str, bool]:
    files = sorted(
        {file.relative_to(folder) for folder in (was, now) for file in folder.rglob("*") if file.is_file()}
    )
    lines, same = [], True
    for file in files:
        if file.name == CARD or "seconds" in file.name or file.name == "cost.json":
            continue
        pair = [folder / file for folder in (was, now)]
        equal = all(path.is_file() for path in pair) and pair[0].read_bytes() == pair[1].read_bytes()
        same &= equal
        lines.append(f"  {'the same bytes' if equal else 'DIFFERS       '}  {file}")
    return "\n".join(lines), same


def diff(a: Sequence[Record], b: Sequence[Record], names: tuple[str, str]) -> str:
    """What two studies were told, ran with, and found, where they differ."""
    parts = []
    studies = [next(iter(of_kind(records, "study")), {}) for records in (a, b)]
    for title, key in (("config", "content"), ("versions", "versions"), ("data", "data")):
        first, second = (dict(_leaves(study.get(key, {}), "")) for study in studies)
        lines = [
            f"  {path.lstrip('.')}: {first.get(path, 'absent')} | {second.get(path, 'absent')}"
            for path in [*first, *(path for path in second if path not in first)]
            if first.get(path) != second.get(path)
        ]
        if lines:
            parts.append("\n".join([f"{title} ({names[0]} | {names[1]})", *lines]))
    parts.append(str(compare(a, b)).replace("then", names[0]).replace("now", names[1]))
    return "\n\n".join(parts)


def remove(folder: Path) -> None:
    """A stage's folder, its card first: what is half removed is not there."""
    (folder / CARD).unlink(missing_ok=True)
    shutil.rmtree(folder)
