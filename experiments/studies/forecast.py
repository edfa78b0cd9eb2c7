"""Can a merge's loss be forecast before it is evaluated, and are the closed-form weights as good as a grid search's?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from experiments import config as configs
from experiments.config import Study
from experiments.pipeline import Stage, card, is_done
from experiments.records import Record, of_kind
from experiments.studies import sentiment
from experiments.studies.diagnosis import model_inputs

CODE = (
    "experiments.diagnosis.forecasting",
    "gradmatch.diagnosis",
    "gradmatch.engine",
    "gradmatch.rules",
)


class Config(Study):
    """Keys of the config.

    `sentiment` is the config whose base, fine-tunes and curvatures are used; `grid` are the weights that the search tries
    for each task; `kfac` are the examples of the Kronecker factors.
    """

    experiment: Literal["forecast"]
    sentiment: Path
    examples: int = Field(default=256, gt=1)
    kfac: int = Field(default=128, gt=1)
    test: int = Field(default=300, gt=1)
    draws: int = Field(default=12, ge=0)
    grid: tuple[float, ...] = (0.1, 0.3, 0.5, 0.8, 1.1)

    @model_validator(mode="after")
    def _is_sentiment(self) -> Config:
        if configs.load(self.sentiment).experiment != "sentiment":
            raise ValueError(f"{self.sentiment} is no config of the sentiment experiment")
        return self


def stages(config: Config) -> list[Stage]:
    """One per seed of the sentiment config; the models it reads come with it."""
    return list(cells(config).values())


def cells(config: Config) -> dict[int, Stage]:
    """Seed -> its stage."""
    source = configs.load(config.sentiment)
    made = sentiment.Cells(source)
    tasks = source.data.tasks
    settings = config.model_dump(include={"examples", "kfac", "test", "draws"}) | {"grid": list(config.grid)}
    return {
        seed: Stage(
            f"forecast/seed{seed}",
            "experiments.diagnosis.forecasting:forecast",
            {**settings, "seed": seed, "delta0": source.delta0},
            model_inputs(made, seed),
            (*CODE, "estimators"),
            len(config.grid) ** len(tasks) * config.test * len(tasks) / 220 + 200,
        )
        for seed in source.seeds
    }


def records(config: Config, store: Path) -> list[Record]:
    """One record per seed."""
    found = []
    for seed, stage in cells(config).items():
        if is_done(stage, store):
            origin = {
                key: card(stage, store)[key] for key in ("key", "commit", "versions", "machine", "finished")
            }
            content: dict[str, Any] = json.loads(
                (stage.folder(store) / "forecast.json").read_text(encoding="utf-8")
            )
            common = {"experiment": config.experiment, "name": config.name, "kind": "forecast", "seed": seed}
            found.append({**common, **content, **origin})
    return found


def report(found: list[Record]) -> str:
    """Correlations, weights and accuracies, seed by seed."""
    return "\n\n".join(_seed(record) for record in of_kind(found, "forecast"))


def _seed(record: Mapping[str, Any]) -> str:
    lines = [f"Seed {record['seed']}: rank correlation of forecast and measured rise of the loss over merges"]
    keys = list(record["correlations"]["exact"])
    lines.append(f"{'curvature':<12}" + "".join(f"{key:>{len(key) + 3}}" for key in keys))
    for kind, values in record["correlations"].items():
        lines.append(f"{kind:<12}" + "".join(f"{values[key]:>{len(key) + 3}.2f}" for key in keys))
    best = max(record["grid"], key=lambda point: point["accuracy"])
    accuracy = _accuracies(record["rows"])
    lines.append(f"Weights (macro accuracy on test examples; {len(record['grid'])} grid points took {record['grid_seconds']:.0f} s, "
                 f"the products {record['products_seconds']:.0f} s)")  # fmt: skip
    lines.append(
        f"  {'best of the grid, chosen on the same test examples':<52}{best['accuracy']:.3f}  {_text(best['weights'])}"
    )
    for name, weights in record["weights"].items():
        lines.append(f"  {name:<52}{accuracy[name]:.3f}  {_text(weights)}")
    for name in ("AM", "TA 1", "GM", "GM, H0 x 0.1"):
        if name in accuracy:
            lines.append(f"  {name:<52}{accuracy[name]:.3f}")
    return "\n".join(lines)


def _accuracies(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(row["merge"] for row in rows)
    return {name: fmean(row["accuracy"] for row in rows if row["merge"] == name) for name in names}


def _text(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
