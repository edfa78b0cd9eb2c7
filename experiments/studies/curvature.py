"""Cheap curvature: what each estimate costs, how far it is from the exact GGN, and what it does to the merge (claim 9)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from experiments import config as configs
from experiments.config import Strict, Study
from experiments.pipeline import Stage, card, is_done
from experiments.records import Record, of_kind
from experiments.studies import sentiment
from experiments.studies.adding import CODE, check_source
from experiments.studies.sentiment_cells import EVALUATED, SOURCES, SQUARED, slug

Cell = tuple[int, str, str]  # seed, estimate, model


class Estimate(Strict):
    """One way to estimate curvature; see `experiments.estimates`. For ivon, `examples` / `batch_size` are its steps."""

    kind: Literal["fisher", "ggn", "empirical", "batch", "batch means", "adam", "ivon"] = "fisher"
    examples: int = Field(default=320, gt=1)
    samples: int = Field(default=1, gt=0)
    batch_size: int = Field(default=32, gt=0)


class Config(Study):
    """Keys of the config: `sentiment` is the config whose models and data are used (quick_models: its quick variant).

    Every estimate is compared with `reference` on the tasks of `reference_seeds`; `full` is the estimate whose gain over
    task arithmetic counts as all of it.
    """

    experiment: Literal["curvature"]
    sentiment: Path
    quick_models: bool = False
    seeds: tuple[int, ...] = ()  # of that config; empty: all of them
    estimates: dict[str, Estimate] = Field(min_length=1)
    full: str
    reference: Estimate
    reference_seeds: tuple[int, ...] = (0,)

    @model_validator(mode="after")
    def _known(self) -> Config:
        check_source(self.sentiment, (*self.seeds, *self.reference_seeds), self.quick_models)
        if self.full not in self.estimates:
            raise ValueError(f"`full` is {self.full!r}, but the estimates are {', '.join(self.estimates)}")
        return self


class Cells:
    """The stages of one config: estimates and references by (seed, estimate, model), merges by (seed, estimate or TA)."""

    def __init__(self, config: Config) -> None:
        self.source = configs.load(config.sentiment, quick=config.quick_models)
        self.made = sentiment.Cells(self.source)
        self.seeds = config.seeds or self.source.seeds
        tasks = self.source.data.tasks
        self.estimates: dict[Cell, Stage] = {}
        self.errors: dict[Cell, Stage] = {}
        self.merges: dict[tuple[int, str], Stage] = {}
        for seed in self.seeds:
            self._merge(seed, "TA", "task_arithmetic", self.made.sources(seed, tasks))
            for name, spec in config.estimates.items():
                for model in ("base", *tasks):
                    self.estimates[seed, name, model] = self._estimate(seed, name, model, spec)
                inputs = self.made.sources(seed, tasks) | {
                    "base_curvature": self.estimates[seed, name, "base"],
                    "curvatures": {task: self.estimates[seed, name, task] for task in tasks},
                }
                self._merge(seed, name, "gradient_matching", inputs)
        for seed in (seed for seed in config.reference_seeds if seed in self.seeds):
            for task in tasks:
                reference = self._estimate(seed, "reference", task, config.reference)
                for name in config.estimates:
                    self.errors[seed, name, task] = Stage(
                        f"curvature/seed{seed}/error-{slug(name)}-{task}",
                        "experiments.estimates:compare_estimate",
                        {},
                        {"estimate": self.estimates[seed, name, task], "reference": reference},
                        seconds=1,
                    )

    def _estimate(self, seed: int, name: str, model: str, spec: Estimate) -> Stage:
        data = self.source.data
        training = self.source.base_training if model == "base" else self.source.task_training
        return Stage(
            f"curvature/seed{seed}/{slug(name)}-{model}",
            "experiments.estimates:estimate_stage",
            {
                "domain": data.base if model == "base" else model,
                "seed": seed,
                "trained_batch_size": training.batch_size,
                **spec.model_dump(),
            },
            {"data": self.made.data, "model": self.made.trained[seed, model]},
            (*SOURCES, "estimators"),
            1 if spec.kind == "adam" else 1 + spec.examples * spec.samples / SQUARED,
        )

    def _merge(self, seed: int, name: str, method: str, inputs: dict[str, Any]) -> None:
        data = self.source.data
        settings = {"method": method, "alpha": 1.0, "options": {}, "delta0": self.source.delta0}
        self.merges[seed, name] = Stage(
            f"curvature/seed{seed}/merge-{slug(name)}",
            "experiments.cell:merge_and_measure",
            {
                **settings,
                "domains": list(data.tasks),
                "examples": self.source.mismatch_examples,
                "seed": seed,
            },
            {**inputs, "data": self.made.data, "gradients": {}},
            CODE,
            (data.test or 1000) * len(data.tasks) / EVALUATED,
        )

    def all(self) -> list[Stage]:
        """Every stage."""
        return [*self.merges.values(), *self.errors.values()]


def stages(config: Config) -> list[Stage]:
    """The merges and the errors; the estimates and the models come with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record per merge and seed (with the seconds of its estimates), one per error of a task's estimate."""
    cells = Cells(config)
    kept = ("key", "commit", "versions", "machine", "threads", "finished")
    common = {"experiment": config.experiment, "name": config.name, "full": config.full}
    found: list[Record] = []
    for (seed, name), stage in cells.merges.items():
        if is_done(stage, store):
            origin, metrics = card(stage, store), _read(stage, store, "metrics.json")
            found.append(
                common | {"kind": "merge", "seed": seed, "estimate": name, "metrics": metrics}
                | ({"spec": config.estimates[name].model_dump()} if name in config.estimates else {})
                | {"estimate_seconds": _seconds(cells, seed, name, store), "seconds": origin["seconds"]}
                | {key: origin[key] for key in kept}
            )  # fmt: skip
    for (seed, name, task), stage in cells.errors.items():
        if is_done(stage, store):
            origin = card(stage, store)
            found.append(
                common | {"kind": "error", "seed": seed, "estimate": name, "task": task, **_read(stage, store, "error.json")}
                | {"spec": config.estimates[name].model_dump(), "reference": config.reference.model_dump()}
                | {"seconds": origin["seconds"]} | {key: origin[key] for key in kept}
            )  # fmt: skip
    return found


def _seconds(cells: Cells, seed: int, name: str, store: Path) -> float:
    """Seconds of all estimates of one merge, without loading models; 0 for task arithmetic."""
    own = [stage for (s, n, _), stage in cells.estimates.items() if (s, n) == (seed, name)]
    return sum(_read(stage, store, "cost.json")["seconds"] for stage in own)


def _read(stage: Stage, store: Path, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((stage.folder(store) / file).read_text(encoding="utf-8"))
    return content


def report(found: list[Record]) -> str:
    """A row per estimate: error, cost, the merge's accuracy, and the share of the full gain that it keeps."""
    from experiments.report import format_table

    merges, wrong = of_kind(found, "merge"), of_kind(found, "error")
    rows = []
    for name in dict.fromkeys(record["estimate"] for record in merges):
        own = [record for record in wrong if record["estimate"] == name]
        values = [
            f"{fmean(record[key] for record in own):.2f}" if own else ""
            for key in ("relative_error", "log_correlation", "trace_ratio")
        ]
        mine = [record for record in merges if record["estimate"] == name]
        seconds = fmean(record["estimate_seconds"] for record in mine)
        gain = gain_kept(merges, name) if name != "TA" else None
        share = f"{100 * gain[0]:.0f} ({100 * gain[1]:.0f} to {100 * gain[2]:.0f})" if gain else ""
        accuracy = f"{100 * fmean(record['metrics']['macro']['accuracy'] for record in mine):.1f}"
        rows.append([name, *values, f"{seconds:.0f}", accuracy, share])
    header = ["estimate", "rel. error", "log corr.", "trace ratio", "seconds", "accuracy %", "gain kept %"]
    notes = [
        "gain kept: (accuracy - TA) / (accuracy of the full estimate - TA), mean over seeds, smallest and largest seed in brackets;",
        "relative error, correlation of logarithms and ratio of traces against the reference, mean over its models.",
    ]
    bias = batch_bias(wrong)
    if bias:
        ratio, low, high, size, models = bias
        notes.append(
            f"squared batch means x B / reference: trace ratio {ratio:.2f} (from {low:.2f} to {high:.2f} over {models} models), B = {size}"
        )
    return "\n".join([format_table(header, rows), "", *notes])


def gain_kept(merges: Sequence[Record], name: str) -> tuple[float, float, float] | None:
    """(accuracy - TA) / (accuracy of the full estimate - TA): of the seeds' means, then the smallest and largest of a seed.

    None where some seed lacks one of the three.
    """
    accuracy = {
        (record["seed"], record["estimate"]): record["metrics"]["macro"]["accuracy"] for record in merges
    }
    full = merges[0]["full"]
    seeds = [seed for seed, estimate in accuracy if estimate == name]
    if not all((seed, other) in accuracy for seed in seeds for other in ("TA", full)):
        return None
    parts = [
        (accuracy[seed, name] - accuracy[seed, "TA"], accuracy[seed, full] - accuracy[seed, "TA"])
        for seed in seeds
    ]
    whole = fmean(gain for _, gain in parts)
    shares = [part / gain for part, gain in parts if gain]
    if not whole or not shares:
        return None
    return fmean(part for part, _ in parts) / whole, min(shares), max(shares)


def batch_bias(wrong: Sequence[Record]) -> tuple[float, float, float, int, int] | None:
    """Trace ratio of squared batch means times B (mean, smallest, largest over models), B, number of models; 1 is unbiased."""
    own = [record for record in wrong if record["spec"]["kind"] == "batch means"]
    if not own:
        return None
    size = own[0]["spec"]["batch_size"]
    ratios = [size * record["trace_ratio"] for record in own]
    return fmean(ratios), min(ratios), max(ratios), size, len(ratios)
