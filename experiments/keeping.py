"""What records and results become: a tidy table, and folders that nothing needs any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.pipeline import CARD
from experiments.records import Record, of_kind, read_records
from experiments.rerun import OF_THE_RUN, remove

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS = "weights"  # why a stage may go whose figures are there
HEAVY = (
    "model",
    "optimizer.pt",
    "curvature.safetensors",
    "gradient.safetensors",
)  # what of a stage takes gigabytes


def frame(files: Sequence[Path]) -> pd.DataFrame:
    """Records as a tidy table: a row a figure.

    Columns: experiment, name, kind, seed, whatever else a record is called by (model, ours, theirs, alpha ...), metric (a path, as
    metrics.macro.accuracy), value.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for file in files:
        for record in read_records(file):
            if record.get("kind") not in ("study", "data"):
                rows += _rows(record)
    return pd.DataFrame(rows)


def _rows(record: Record) -> list[dict[str, Any]]:
    titles = {
        key: value
        for key, value in record.items()
        if isinstance(value, str) or key in ("seed", "alpha")
        if key not in OF_THE_RUN or key in ("experiment", "name")
    }
    found: list[dict[str, Any]] = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, own in value.items():
                walk(own, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list):
            for number, own in enumerate(value):
                walk(own, f"{path}.{number}")
        elif isinstance(value, (int, float)):
            found.append({**titles, "metric": path, "value": float(value)})

    walk({k: v for k, v in record.items() if k not in (*OF_THE_RUN, "seed", "domains")}, "")
    return found


@dataclass(frozen=True)
class Unneeded:
    """A folder of the store that may go, why, and its size."""

    folder: Path
    why: str
    megabytes: float


def unneeded(results: Path, *, weights: bool) -> list[Unneeded]:
    """Folders of the store that no record names, and with `weights` the models and curvatures whose figures are there.

    What goes with `weights` is made again where something new needs it.

    Raises:
        ValueError: a file of records that does not say its stages.
    """
    named: set[str] = set()
    for file in sorted(results.glob("*.jsonl")):
        studies = of_kind(read_records(file), "study")
        if not studies:
            raise ValueError(
                f"{file} does not say which stages are its own: run its config again, or move it away"
            )
        named |= {name for study in studies for name in study["stages"]}
    found = []
    for folder in _stages(results / "stages"):
        if _name(folder) not in named:
            found.append(Unneeded(folder, "no record names it", _size(folder)))
        elif weights and any((folder / name).exists() for name in HEAVY):
            found.append(Unneeded(folder, WEIGHTS, _size(folder)))
    return found


def _stages(store: Path) -> list[Path]:
    return sorted(card.parent for card in store.rglob(CARD))


def _name(folder: Path) -> str:
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    return f"{card['name']}-{card['key']}"


def _size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _lighten(folder: Path) -> None:
    """Remove what is heavy, the card first; what was told of a training stays for the records."""
    (folder / CARD).unlink()
    for part in (folder / name for name in HEAVY):
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def prune(results: Path, *, weights: bool, dry_run: bool) -> str:
    """Remove what is `unneeded`; a line each, and the sum."""
    found = unneeded(results, weights=weights)
    lines = [
        f"  {one.megabytes:8.1f} MB  {one.why:18}  {one.folder.relative_to(results / 'stages')}"
        for one in found
    ]
    if not dry_run:
        for one in found:
            (_lighten if one.why == WEIGHTS else remove)(one.folder)
    total = sum(one.megabytes for one in found)
    lines.append(f"{len(found)} stages, {total:.1f} MB {'would go' if dry_run else 'removed'}")
    return "\n".join(lines)
