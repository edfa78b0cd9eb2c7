"""Results as JSON lines: one record per line, written whole, read with broken lines counted and never silently lost."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmatch.estimators.files import write_atomically as write_atomically

Record = dict[str, Any]
Value = Callable[[Record], "float | None"]


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file at `path` by one JSON object per record."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """Read a file of JSON lines. Lines that are no JSON object are skipped, and their count is said on stderr.

    Raises FileNotFoundError where there is no such file, ValueError where it holds no readable record at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no records at {path}: run `python -m experiments run CONFIG` first")
    records: list[Record] = []
    broken: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            broken.append(number)
    if broken:
        first = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        print(f"{path}: skipped {len(broken)} broken line(s), number {first}", file=sys.stderr)
    if not records:
        raise ValueError(f"{path} holds no readable record; delete it and run its config again")
    return records


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """The records whose `kind` is the given one (`evaluation`, `comparison`, `verdict`)."""
    return [record for record in records if record.get("kind") == kind]


def seeds_of(points: Sequence[Record]) -> set[int]:
    """The seeds of a removal's edited models: the unedited one is the same for all."""
    return {point["seed"] for point in points if point["alpha"]} or {point["seed"] for point in points}


def spread(same: Sequence[Record], quantity: str) -> tuple[float, float] | None:
    """(low, high) of a removal's points of one method and alpha, one a seed: their range, or the bootstrap interval of one.

    None where it was not measured.
    """
    numbers = [point["metrics"].get(quantity) for point in same]
    if len(numbers) > 1:
        known = [number for number in numbers if number is not None]
        return (min(known), max(known)) if known else None
    _, *interval = same[0]["intervals"].get(quantity, (None,))
    return (interval[0], interval[1]) if interval else None


def models_in_order(records: Iterable[Record]) -> list[str]:
    """Names of the evaluated models, in the order of their first record."""
    return list(dict.fromkeys(record["model"] for record in of_kind(records, "evaluation")))


def mean_over_seeds(records: Sequence[Record], value: Value) -> tuple[float, float] | None:
    """Mean and standard deviation over the records (one per seed; 0 for one seed) of a number in each.

    None where a record lacks the number.
    """
    numbers = [value(record) for record in records]
    if not numbers or any(number is None for number in numbers):
        return None
    found = [float(number) for number in numbers if number is not None]
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def columns(domains: Sequence[str]) -> list[tuple[str, Value, str, bool]]:
    """Of a table of evaluations: title, value of a record, format, whether larger is better."""

    def metric(part: str, key: str, scale: float = 1.0) -> Value:
        return lambda record: scale * float(record["metrics"][part][key])

    return [
        *((domain, metric(domain, "accuracy", 100), ".1f", True) for domain in domains),
        ("macro", metric("macro", "accuracy", 100), ".1f", True),
        ("per ex.", metric("per_example", "accuracy", 100), ".1f", True),
        ("NLL", metric("macro", "nll"), ".3f", False),
        ("ECE", metric("macro", "ece"), ".3f", False),
        ("mismatch / n", lambda record: record.get("mismatch", {}).get("per_example"), ".3f", False),
    ]
