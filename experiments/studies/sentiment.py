"""The paper's core experiment: base, fine-tunes, joint model, merges, and the gradient mismatch of each merge.

The base is an encoder fine-tuned on one domain, the tasks are fine-tuned from it, the joint model (the target of every
merge) is fine-tuned from it on all tasks together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from experiments.config import Pair, Seeds, Strict, Study, Training, Weights
from experiments.options import check_names, check_rule
from experiments.pipeline import Stage, card, is_done, origin, result
from experiments.records import Record
from experiments.studies.sentiment_cells import Cells
from experiments.tasks.sentiment import VADER_FILES
from gradmatch.plan.plan import Request
from gradmatch.rules import RULES


class Corpus(Strict):
    """Where the texts of one domain come from: a folder, a .jsonl file, `vader` or a hub name; see `experiments.tasks.corpora`.

    Columns are of .jsonl files and the hub's data sets; `train` and `test` are its splits (or slices of them); labels from `positive_from` are positive.
    """

    path: str
    subset: str | None = None
    train: str = "train"
    test: str | None = None
    text: str = "text"
    label: str = "label"
    positive_from: float = 1


class Data(Strict):
    """Which texts: `vader` (four domains from PyPI), or a folder, whose `<domain>.jsonl` (text, label, document) are `corpora`.

    `corpora` names a source per domain instead; `train`, `validation` and `test` are at most so many per domain.
    """

    source: str = "vader"
    corpora: dict[str, Corpus] = Field(default_factory=dict)
    base: str = "movies"
    tasks: tuple[str, ...] = ("amazon", "tweets", "nyt")
    max_length: int = Field(default=64, gt=2)
    train: int | None = Field(default=None, gt=0)
    validation: int | None = Field(default=None, gt=0)
    test: int | None = Field(default=None, gt=0)
    split_seed: int = 0

    @model_validator(mode="after")
    def _distinct(self) -> Data:
        if not self.tasks or len({self.base, *self.tasks}) != 1 + len(self.tasks):
            raise ValueError(
                "`base` and `tasks` must name one base domain and at least one task, all different"
            )
        if self.corpora and "source" in self.model_fields_set:
            raise ValueError("give either `source` or `corpora`: with both, `source` would not be read")
        if not self.corpora and self.source != "vader":
            files = {domain: Corpus(path=f"{self.source}/{domain}.jsonl") for domain in self.domains}
            object.__setattr__(self, "corpora", files)  # frozen, but not before it is made
        absent = [domain for domain in self.domains if domain not in self.corpora]
        if self.corpora and absent:
            raise ValueError(f"`corpora` has no {absent[0]!r}; it has {', '.join(self.corpora)}")
        for domain in self.domains:
            path = self.corpora[domain].path if self.corpora else self.source
            if path == "vader" and domain not in VADER_FILES:
                raise ValueError(f"vader has no domain {domain!r}; it has {', '.join(VADER_FILES)}")
        return self

    @property
    def domains(self) -> list[str]:
        """The base's domain, then the tasks'."""
        return [self.base, *self.tasks]

    @property
    def local(self) -> tuple[str, ...]:
        """Paths of the corpora, for the key of the stage that reads them; the hub's names among them are no files."""
        paths = (self.corpora[domain].path for domain in self.domains if self.corpora)
        return tuple(path for path in paths if path != "vader")


class Fisher(Strict):
    """How the curvature of each model is estimated: Monte-Carlo Fisher with the measured gradient."""

    examples: int = Field(default=500, gt=1)
    samples: int = Field(default=1, gt=0)
    batch_size: int = Field(default=32, gt=0)


class Merge(Strict):
    """One merge: a rule, the weight alpha of every task, options of the rule; `choose` lists values to choose among.

    `alpha` and each option may be chosen: by the lowest negative log-likelihood on validation examples, macro average.
    """

    method: str
    alpha: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)
    choose: dict[str, tuple[float, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _choice(self) -> Merge:
        if len(self.choose) > 1 or any(not values for values in self.choose.values()):
            raise ValueError("`choose` takes one option with a list of values")
        check_names(self.method, self.options, self.choose)
        for name, values in self.choose.items():
            for value in values:
                check_merge(self.method, {**self.options, name: value})
        check_merge(self.method, self.options)
        return self


class Sweep(Strict):
    """Merges evaluated at many weights alpha: how robust each is.

    forecast: each task's loss is forecast as well, from so many of its training examples; 0: it is not.
    """

    merges: tuple[str, ...] = Field(min_length=1)
    alphas: Weights = Field(min_length=2)
    forecast: int = Field(default=0, ge=0)


def check_merge(method: str, options: Mapping[str, Any]) -> None:
    """Refuse a rule or an option that `gradmatch.merge` does not know, before anything runs. Raises ValueError."""
    own = {field.name for field in dataclasses.fields(Request)}
    known = {key: value for key, value in options.items() if key in own}
    Request(
        method, options={key: value for key, value in options.items() if key not in {*own, "alpha"}}, **known
    )


def takes(method: str, count: int) -> bool:
    """Whether a rule merges so many models: SLERP takes two."""
    fewest, most = RULES[method].models
    return fewest <= count <= most


class Config(Study):
    """Keys of a sentiment config."""

    experiment: Literal["sentiment"]
    seeds: Seeds = Field(default=(0,), min_length=1)
    encoder: str = "encoder"  # an asset, a folder, or a hub name
    data: Data = Data()
    base_training: Training
    task_training: Training
    task_steps: dict[str, Annotated[int, Field(gt=0)]] = Field(
        default_factory=dict
    )  # task -> steps, where they differ from task_training's
    joint_training: Training
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    fisher: Fisher = Fisher()
    mismatch_examples: int = Field(default=300, gt=0)
    delta0: float = Field(default=1e-6, ge=0)
    merges: dict[str, Merge]
    compare: tuple[Pair, ...] = ()  # models: paired bootstrap of the difference of macro accuracy
    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _known_models(self) -> Config:
        for task in self.task_steps:
            if task not in self.data.tasks:
                raise ValueError(
                    f"`task_steps` names {task!r}, but the tasks are {', '.join(self.data.tasks)}"
                )
        for name, spec in self.merges.items():
            check_rule(f"merge {name!r}", spec.method, len(self.data.tasks), lacking=("factors",))
        own = ["base", *self.data.tasks, "joint"]
        for model in self.merges:
            if model in own:
                raise ValueError(f"a merge may not be called {model!r}: that is one of {', '.join(own)}")
        for model in (name for pair in self.compare for name in pair):
            if model not in own and model not in self.merges:
                raise ValueError(
                    f"`compare` names {model!r}, but there are {', '.join([*own, *self.merges])}"
                )
        for model in self.sweep.merges if self.sweep else ():
            if model not in self.merges:
                raise ValueError(f"`sweep` names {model!r}, but the merges are {', '.join(self.merges)}")
        return self


def stages(config: Config) -> list[Stage]:
    """What has to run for the records of this config; what they need comes with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record per evaluated model and seed, one per comparison; stages that failed are left out."""
    return records_of(Cells(config), store)


def records_of(cells: Cells, store: Path) -> list[Record]:
    """The records of a config's stages."""
    config = cells.config
    found = list(_evaluations(cells, store))
    for (ours, theirs), stage in cells.comparisons.items():
        if is_done(stage, store):
            compared = result(stage, store, "comparison.json")
            tasks = cells.on_tasks[ours, theirs]
            if is_done(tasks, store):
                compared["tasks"] = result(tasks, store, "comparison.json")
            found.append(
                {"kind": "comparison", "ours": ours, "theirs": theirs, **compared, **origin(stage, store)}
            )
    for (seed, name), stage in cells.sweeps.items():
        if is_done(stage, store):
            points = result(stage, store, "sweep.json")
            for point in points["points"]:
                point["metrics"] = _with_tasks(point["metrics"], config.data.tasks)
            found.append({"kind": "sweep", "seed": seed, "model": name, **points, **origin(stage, store)})
    return [{"experiment": config.experiment, "name": config.name, **record} for record in found]


def _evaluations(cells: Cells, store: Path) -> Iterator[Record]:
    config = cells.config
    for (seed, name), stage in cells.evaluations.items():
        if not is_done(stage, store):
            continue
        metrics = _with_tasks(result(stage, store, "metrics.json"), config.data.tasks)
        record: Record = {
            "kind": "evaluation",
            "seed": seed,
            "model": name,
            "role": "merge"
            if name in config.merges
            else "base"
            if name == "base"
            else "joint"
            if name == "joint"
            else "task",
            "metrics": metrics,
            "domains": config.data.domains,
            **origin(stage, store),
        }
        if name in config.merges:
            merged = cells.merged[seed, name]
            spec = config.merges[name]
            record |= {
                "merge": {**spec.model_dump(exclude={"choose"}), "delta0": config.delta0},
                "folder": str(merged.folder(store) / "model"),
            }
            if (seed, name) in cells.choices:
                record["choice"] = result(cells.choices[seed, name], store, "choice.json")
        else:
            trained = cells.trained[seed, name]
            record |= {
                "training_seconds": card(trained, store)["seconds"],
                "folder": str(trained.folder(store) / "model"),
            }
            record["precision"] = result(trained, store, "training.json")["precision"]
        mismatch = cells.mismatches.get((seed, name))
        if mismatch and is_done(mismatch, store):
            record["mismatch"] = result(mismatch, store, "mismatch.json")
        distance = cells.distances.get((seed, name))
        if distance and is_done(distance, store):
            record["distance_to_joint"] = result(distance, store, "distance.json")["relative"]
        yield record


def _with_tasks(metrics: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Add the average over the tasks, without the base's own domain."""
    parts = [metrics[task] for task in tasks]
    averages = {key: fmean(part[key] for part in parts) for key in ("accuracy", "nll", "ece")}
    return {**metrics, "tasks": {**averages, "n": sum(part["n"] for part in parts)}}


def report(found: list[Record]) -> str:
    """What the experiment prints: the table, what it means in two sentences, where the merged model lies."""
    from experiments.report import sentiment_report

    return sentiment_report(found)
