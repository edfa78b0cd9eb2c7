"""Can a merge's loss be forecast before it is evaluated, and are the closed-form weights as good as a grid search's?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from experiments.config import Weights
from experiments.pipeline import Stage, recorded
from experiments.records import Record, of_kind
from experiments.studies.cells import EVALUATED, Cells
from experiments.studies.sources import OnTexts


class Config(OnTexts):
    """Keys of the config, beside those of the models that it uses.

    `examples` of `split` are what the forecast sees of each task, `kfac` of them make the Kronecker factors, and `test`
    examples are what merges are measured on; `grid` are the weights that the search tries for each task.
    """

    experiment: Literal["forecast"]
    split: Literal["train", "validation"] = "train"
    examples: int = Field(default=256, gt=1)
    kfac: int = Field(default=128, gt=1)
    test: int = Field(default=300, gt=1)
    draws: int = Field(default=12, ge=0)
    grid: Weights = Field(default=(0.1, 0.3, 0.5, 0.8, 1.1), min_length=1)


def stages(config: Config) -> list[Stage]:
    """One per seed of the sentiment config; the models it reads come with it."""
    return list(cells(config).values())


def cells(config: Config) -> dict[int, Stage]:
    """Seed -> its stage."""
    source = config.source
    made, tasks = Cells(source), source.data.tasks
    settings = config.model_dump(include={"split", "kfac", "test", "draws"}) | {"count": config.examples}
    settings |= {"grid": list(config.grid), "delta0": source.delta0}
    seconds = len(config.grid) ** len(tasks) * config.test * len(tasks) / EVALUATED + 200
    return {
        seed: made.stage(
            f"forecast/seed{seed}",
            "diagnosis.forecasting:forecast",
            {**settings, "seed": seed},
            seconds,
            **made.sources(seed, tasks),
        )
        for seed in config.seeds or source.seeds
    }


def records(config: Config, store: Path) -> list[Record]:
    """One record per seed."""
    made = cells(config).items()
    return [row for s, stage in made for row in recorded(stage, store, "forecast", "forecast.json", seed=s)]


WHERE = {
    "seen": "on the examples that it was made from",
    "measured": "on test examples (last row: the measured rise on the forecast's examples, what a perfect forecast reaches)",
}


def report(found: list[Record]) -> str:
    """Correlations, weights and accuracies: the mean over seeds, then seed by seed."""
    rows = of_kind(found, "forecast")
    if not rows:
        return "no records"
    return "\n\n".join([_over_seeds(rows), *(_seed(record) for record in rows)])


def _over_seeds(rows: list[Record]) -> str:
    lines = []
    for target, where in WHERE.items():
        lines.append(f"Rank correlation of forecast and measured rise {where}; mean over {len(rows)} seeds")
        tables = [row["correlations"][target] for row in rows]
        mean = {
            kind: {key: fmean(table[kind][key] for table in tables) for key in tables[0][kind]}
            for kind in tables[0]
        }
        lines += _table(mean)
    lines.append("Macro accuracy on test examples, mean over seeds (and worst against the best of the grid)")
    best = [max(point["accuracy"] for point in row["grid"]) for row in rows]
    accuracies = [_accuracies(row["rows"]) for row in rows]
    points = len(rows[0]["grid"])
    lines.append(f"  {f'best of {points} merges, chosen on the same test examples':<56}{fmean(best):.3f}")
    lines.append(
        f"  {'the same, chosen on one half and scored on the other':<56}{fmean(_crossed(row) for row in rows):.3f}"
    )
    for name in (*rows[0]["weights"], *RULES):
        if all(name in accuracy for accuracy in accuracies):
            mine = [accuracy[name] for accuracy in accuracies]
            worst = min(m - b for m, b in zip(mine, best, strict=True))
            lines.append(f"  {name:<56}{fmean(mine):.3f}  ({worst:+.3f})")
    return "\n".join(lines)


def _crossed(row: Mapping[str, Any]) -> float:
    """Accuracy of the grid's best merge of one half of the test examples on the other half, both ways; mean over ties."""
    found = []
    for chosen, scored in ((0, 1), (1, 0)):
        most = max(point["halves"][chosen] for point in row["grid"]) - 1e-9
        found.append(
            fmean(point["halves"][scored] for point in row["grid"] if point["halves"][chosen] >= most)
        )
    return fmean(found)


RULES = ("AM", "FA", "GM", "GM, H0 x 0.1", "TIES", "TA 1")


def _table(values: Mapping[str, Mapping[str, float]]) -> list[str]:
    keys = list(next(iter(values.values())))
    lines = [f"  {'forecast':<24}" + "".join(f"{key:>{max(len(key), 6) + 2}}" for key in keys)]
    for kind, scores in values.items():
        numbers = (f"{scores[key]:.3f}" if key == "error" else f"{scores[key]:.2f}" for key in keys)
        lines.append(
            f"  {kind:<24}"
            + "".join(f"{n:>{max(len(k), 6) + 2}}" for n, k in zip(numbers, keys, strict=True))
        )
    return lines


def _seed(record: Mapping[str, Any]) -> str:
    lines = [f"Seed {record['seed']}"]
    for target, table in record["correlations"].items():
        lines += [f" {WHERE[target]}", *_table(table)]
    best = max(record["grid"], key=lambda point: point["accuracy"])
    accuracy = _accuracies(record["rows"])
    lines.append(
        f" weights (the grid took {record['grid_seconds']:.0f} s, the products {record['products_seconds']:.0f} s)"
    )
    lines.append(f"  {'best of the grid':<28}{best['accuracy']:.3f}  {_text(best['weights'])}")
    for name, weights in record["weights"].items():
        lines.append(f"  {name:<28}{accuracy[name]:.3f}  {_text(weights)}")
    return "\n".join(lines)


def _accuracies(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(row["merge"] for row in rows)
    return {name: fmean(row["accuracy"] for row in rows if row["merge"] == name) for name in names}


def _text(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
