"""Records and training curves to Weights & Biases: off by default, offline works (WANDB_MODE=offline)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.records import Record


def log(config: Any, records: Iterable[Record]) -> int:
    """One wandb run per model and seed, in a group of the config's name: its metrics, and its training losses where it has some.

    What is logged again continues the run that has it already. Returns the number of runs.
    """
    import wandb

    count = 0
    for record in records:
        if record["kind"] != "evaluation":
            continue
        name = f"{record['model']}-seed{record['seed']}"
        settings = {**config.model_dump(), **{key: record[key] for key in ("commit", "versions", "machine")}}
        number = hashlib.sha256(f"{config.name}/{name}/{record['key']}".encode()).hexdigest()[:16]
        run = wandb.init(
            project="gradmatch",
            group=config.name,
            name=name,
            id=number,
            resume="allow",
            config=settings,
            reinit="finish_previous",
        )
        training = Path(record["folder"]).parent / "training.json"
        if training.is_file():
            for point in json.loads(training.read_text(encoding="utf-8"))["losses"]:
                run.log({"train/loss": point["loss"]}, step=point["step"])
        run.summary.update(
            {
                f"{part}/{key}": value
                for part, values in record["metrics"].items()
                for key, value in values.items()
            }
        )
        run.summary.update(
            {
                f"mismatch/{key}": record["mismatch"][key]
                for key in ("total", "preconditioned")
                if record.get("mismatch", {}).get(key) is not None
            }
        )
        run.finish()
        count += 1
    return count
