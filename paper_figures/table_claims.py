"""Table: the ten claims with their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.records import Record, of_kind, write_atomically

COLUMNS = ("claim", "part", "statement", "threshold", "measured", "interval", "seeds", "verdict")


def draw(records: Sequence[Record], folder: Path, name: str = "table_claims") -> list[Path]:
    """The table in Markdown. Raises ValueError where no record holds a verdict."""
    verdicts = of_kind(records, "verdict")
    if not verdicts:
        raise ValueError("no record of a verdict: run configs/claims.yaml first")
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(record[column]) for column in COLUMNS) + " |" for record in verdicts]
    path = folder / f"{name}.md"
    write_atomically(path, "\n".join(lines) + "\n")
    return [path]
