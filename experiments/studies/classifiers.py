"""What a study on classifiers is told: a base and tasks, how each is trained, estimated and merged; texts and images alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from experiments import config as configs
from experiments.assets import ASSETS
from experiments.config import Count, Pair, Seeds, Strict, Study, Training, Weights
from experiments.options import check_names, check_rule
from experiments.pipeline import Stage
from experiments.tasks.splits import SPLITS, Size
from gradmatch.plan.plan import Request
from gradmatch.rules import find_rule


class Tasks(Strict):
    """The data of a base and of tasks. `train`, `validation` and `test`: rows of each, or a share of them (below 1).

    Exactly so many are chosen on and tested on, and at most so many trained on. split_seed: decides which.
    """

    base: str
    tasks: tuple[str, ...]
    train: Size | None = None
    validation: Size | None = None
    test: Size | None = None
    split_seed: int = Field(default=0, ge=0)

    @field_validator("tasks")
    @classmethod
    def _some(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise ValueError("name at least one task")
        return configs.different(tasks)

    @model_validator(mode="after")
    def _base_apart(self) -> Tasks:
        if self.base in self.tasks:
            raise ValueError(f"`base` and `tasks` must differ, but {self.base!r} is both")
        return self

    @property
    def domains(self) -> list[str]:
        """The base's domain, then the tasks'."""
        return [self.base, *self.tasks]

    def packaged(self, domain: str) -> bool:
        """Whether a domain is split by its documents, as packaged texts are."""
        return False

    def apart(self, domain: str) -> set[str]:
        """The splits of a domain that are given apart."""
        return set()

    def sizes(self, domain: str, split: str) -> dict[str, float | None]:
        """What decides which rows of a domain a split holds."""
        every = self.model_dump(include=set(SPLITS))
        if self.packaged(domain):
            return {split: every[split]}
        return {
            name: None if split == "train" and name in self.apart(domain) else every[name] for name in SPLITS
        }

    def rows(self, split: str, otherwise: int) -> int:
        """About how many rows a domain has of a split, for the plan of a run."""
        size = getattr(self, split)
        return otherwise if size is None or size < 1 else int(size)


class Fisher(Strict):
    """How the curvature of each model is estimated: Monte-Carlo Fisher with the measured gradient."""

    examples: int = Field(default=500, gt=1)
    samples: Count = 1
    batch_size: Count = 32


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
        check_values(self.method, self.options, self.choose)
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What a stage that merges is told."""
        return self.model_dump(exclude={"choose"})


class Sweep(Strict):
    """Merges evaluated at many weights alpha: how robust each is.

    forecast: each task's loss is forecast as well, from so many of its training examples; 0: it is not.
    """

    merges: tuple[str, ...] = Field(min_length=1)
    alphas: Weights = Field(min_length=2)
    forecast: int = Field(default=0, ge=0)


def check_values(
    method: str, options: Mapping[str, Any], tried: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Refuse what `gradmatch.merge` does not know, before anything runs: a rule, an option, a value that is tried.

    Raises:
        ValueError: any of these.
    """
    shared = {field.name for field in dataclasses.fields(Request)}
    for given in ({}, *({name: value} for name, values in (tried or {}).items() for value in values)):
        every = {key: value for key, value in {**options, **given}.items() if key != "alpha"}
        known = {key: value for key, value in every.items() if key in shared}
        Request(method, options={key: value for key, value in every.items() if key not in shared}, **known)


def takes(method: str, count: int) -> bool:
    """Whether a rule merges so many models: SLERP takes two."""
    fewest, most = find_rule(method).models
    return fewest <= count <= most


def local_model(encoder: str) -> tuple[str, ...]:
    """The folder that an encoder may lie in, for the key of a stage that reads it; assets are pinned."""
    return () if encoder in ASSETS else (encoder,)


class Config(Study):
    """Keys that the configs of texts and of images share."""

    seeds: Seeds = Field(default=(0,), min_length=1)
    encoder: str
    data: Tasks
    base_training: Training
    task_training: Training
    task_steps: dict[str, Annotated[int, Field(gt=0)]] = Field(
        default_factory=dict
    )  # task -> steps, where they differ from task_training's
    joint_training: Training
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    fisher: Fisher = Fisher()
    mismatch_examples: Count = 300
    delta0: float = Field(default=1e-6, ge=0)
    merges: dict[str, Merge]
    compare: tuple[Pair, ...] = ()  # models: paired bootstrap of the difference of macro accuracy
    sweep: Sweep | None = None
    pace: ClassVar[float] = 1.0  # seconds of an image, for one of a text: for the plan of a run

    def prepare(self) -> Stage:
        """The stage that reads the data."""
        raise NotImplementedError

    def views(self) -> dict[str, Stage]:
        """The stages that hold one split each."""
        return views_of(
            self.prepare(),
            {s: {d: self.data.sizes(d, s) for d in self.data.domains} for s in SPLITS},
            self.data.split_seed,
        )

    def start(self) -> dict[str, Any]:
        """What the base is trained from, and its new head."""
        raise NotImplementedError

    def training_of(self, task: str) -> Training:
        """How one task is fine-tuned."""
        steps = self.task_steps.get(task, self.task_training.steps)
        return self.task_training.model_copy(update={"steps": steps})

    @model_validator(mode="after")
    def _known_models(self) -> Config:
        own = ["base", *self.data.tasks, "joint"]
        for name, spec in self.merges.items():
            check_rule(f"merge {name!r}", spec.method, len(self.data.tasks), lacking=("factors",))
            if name in own:
                raise ValueError(f"a merge may not be called {name!r}: that is one of {', '.join(own)}")
        named = {
            "task_steps": (self.task_steps, self.data.tasks, "tasks"),
            "compare": ([name for pair in self.compare for name in pair], [*own, *self.merges], "models"),
            "sweep": (self.sweep.merges if self.sweep else (), self.merges, "merges"),
        }
        for key, (names, known, what) in named.items():
            for name in names:
                if name not in known:
                    raise ValueError(f"`{key}` names {name!r}, but the {what} are {', '.join(known)}")
        return self


def views_of(data: Stage, sizes: Mapping[str, Any], seed: int) -> dict[str, Stage]:
    """The stages that hold one split each of prepared data; sizes: split -> domain -> see `tasks.views.view`."""
    return {
        split: Stage(
            f"{data.name}-{split}",
            "experiments.tasks.views:view",
            {"split": split, "sizes": own, "seed": seed},
            {"data": data},
        )
        for split, own in sizes.items()
    }


def read_source(
    path: Path, seeds: Sequence[int] = (), *, quick: bool = False, kinds: Sequence[str]
) -> Config:
    """The config whose models another study uses.

    Raises:
        ValueError: it is of another experiment than `kinds`, or lacks some of the seeds.
    """
    source: Config = configs.load(path, quick=quick)
    if {"texts": "sentiment"}.get(source.experiment, source.experiment) not in kinds:
        raise ValueError(f"{path} is no config of the {' or '.join(kinds)} experiment")
    absent = [seed for seed in seeds if seed not in source.seeds]
    if absent:
        raise ValueError(f"{path} has no seed {absent[0]}; it has {', '.join(map(str, source.seeds))}")
    return source


class OnTexts(Study):
    """Keys of a study on the models of a sentiment config (quick_models: of its quick variant)."""

    sentiment: Path
    quick_models: bool = False
    seeds: Seeds = ()  # of that config; empty: all of them

    @property
    def source(self) -> Config:
        """The sentiment config, checked."""
        return read_source(self.sentiment, self.seeds, quick=self.quick_models, kinds=("sentiment",))

    @model_validator(mode="after")
    def _has_a_source(self) -> OnTexts:
        self._check(self.source)
        return self

    def _check(self, source: Config) -> None:
        """Raise ValueError where the study asks for what the source has not."""

    def check_rules(self, methods: Mapping[str, str], tasks: int) -> None:
        """Refuse rules (by what a message calls them) that need what these studies do not estimate, or other numbers of tasks."""
        for where, method in methods.items():
            check_rule(where, method, tasks, lacking=("gram", "factors"))
