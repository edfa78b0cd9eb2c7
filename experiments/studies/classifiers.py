"""What a study on classifiers is told: a base and tasks, how each is trained, estimated and merged; texts and images alike."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from experiments import config as configs
from experiments.assets import ASSETS
from experiments.config import Count, Pair, Seeds, Strict, Study, Training, Weights
from experiments.keys import NAMED
from experiments.options import check_names, check_rule
from experiments.pipeline import Stage
from experiments.records import Record
from experiments.tasks.splits import SPLITS, Size
from gradmatch.plan.request import Request
from gradmatch.rules import find_rule


class Tasks(Strict):
    """The data of a base and of tasks. `train`, `validation` and `test`: rows of each, or a share of them (below 1).

    Exactly so many are chosen on and tested on, and at most so many trained on. split_seed: decides which.
    """

    base: str
    tasks: tuple[str, ...]
    train: Size | None = None  # rows, or below 1 a share of them
    validation: Size | None = None  # rows, or below 1 a share of them
    test: Size | None = None  # rows, or below 1 a share of them
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

    def split_sizes(self, domain: str) -> dict[str, dict[str, float | None]]:
        """The same of every split."""
        return {split: self.sizes(domain, split) for split in SPLITS}

    def rows(self, split: str, otherwise: int) -> int:
        """About how many rows a domain has of a split, for the plan of a run."""
        size = getattr(self, split)
        return otherwise if size is None or size < 1 else int(size)


class Fisher(Strict):
    """How the curvature of each model is estimated, with the measured gradient where the estimator gives it.

    method: of `gradmatch.estimators.ESTIMATORS`, or `package.module:NAME`. options: of `gradmatch.estimators.estimate`, as
    {labels: sampled}.
    """

    method: str = "fisher"
    examples: int = Field(default=500, gt=1)
    samples: Count = 1
    batch_size: Count = 32
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> Fisher:
        assert self.gives is not None  # the estimator is there
        for name in self.options:
            if name not in ESTIMATING:
                raise ValueError(f"`options` has no {name!r}{configs.nearest(name, ESTIMATING)}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What a stage that estimates is told."""
        kind = "fisher and gradient" if self.method == "fisher" else self.method
        own = self.model_dump(include={"examples", "samples", "batch_size"})
        return {"kind": kind, **own, **({"options": self.options} if self.options else {})}

    @property
    def gives(self) -> set[str]:
        """What rules may need of it, beside diagonals."""
        if self.method == Fisher.model_fields["method"].default:
            return {"gradient"}  # without loading torch, so that a dry run is quick
        from gradmatch.estimators.protocol import find_estimator, gives_of

        own = set(gives_of(find_estimator(self.method)))
        return own | ({"factors"} if self.method in FACTORED else set())


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
        both = [
            name
            for name in self.choose
            if name in self.options or (name == "alpha" and "alpha" in self.model_fields_set)
        ]
        if both:
            raise ValueError(f"{both[0]!r} is given and chosen: leave one of them out")
        check_names(self.method, self.options, self.choose)
        check_values(self.method, self.options, self.choose)
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What a stage that merges is told."""
        return self.model_dump(exclude={"choose"})

    def told(self, delta0: float) -> dict[str, Any]:
        """The same with the floor, for rules that have one."""
        floor = bool(find_rule(self.method).needs - {"gram"})
        return {**self.settings, **({"delta0": delta0} if floor else {})}


class Sweep(Strict):
    """Merges evaluated at many weights alpha: how robust each is.

    forecast: each task's loss is forecast as well, from so many of its training examples; 0: it is not.
    """

    merges: tuple[str, ...] = Field(min_length=1)
    alphas: Weights = Field(min_length=2)
    forecast: int = Field(default=0, ge=0)


ESTIMATING = ("labels", "reduction", "likelihood", "kfac_form", "chunk", "standard_error", "tolerance")
FACTORED = ("kfac",)  # estimators that give Kronecker factors


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
    """Keys that the configs of texts and of images share.

    base_training: none, and the base is the encoder as it is. task_training: none, where `models` has every task. joint_training:
    none, and there is no joint model. models: folders or hub names of models that are there already (`base`, tasks, `joint`), which
    are then not trained; a task's may be an adapter. evaluation: `package.module:function`, given each evaluated model and its
    folder; the numbers that it returns, by name, are columns of the table.
    """

    seeds: Seeds = Field(default=(0,), min_length=1)
    encoder: str
    data: Tasks
    base_training: Training | None = None
    task_training: Training | None = None
    task_steps: dict[str, Annotated[int, Field(gt=0)]] = Field(
        default_factory=dict
    )  # task -> steps, where they differ from task_training's
    joint_training: Training | None = None
    models: dict[str, str] = Field(default_factory=dict)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    fisher: Fisher = Fisher()
    mismatch_examples: Count = 300
    delta0: float = Field(default=1e-6, ge=0)
    merges: dict[str, Merge]
    compare: tuple[Pair, ...] = ()  # models: paired bootstrap of the difference of macro accuracy
    sweep: Sweep | None = None
    evaluation: str = ""
    pace: ClassVar[float] = 1.0  # seconds of an image, for one of a text: for the plan of a run

    @field_validator("evaluation")
    @classmethod
    def _a_function(cls, evaluation: str) -> str:
        if evaluation and not NAMED.fullmatch(evaluation):
            raise ValueError(f"{evaluation!r} names no function: write package.module:function")
        top = evaluation.partition(":")[0].partition(".")[0]
        if top and top not in sys.modules and find_spec(top) is None:
            raise ValueError(f"there is no module {top!r} here or on PYTHONPATH")
        return evaluation

    def prepare(self) -> Stage:
        """The stage that reads the data."""
        raise NotImplementedError

    def views(self) -> dict[str, Stage]:
        """The stages that hold one split each."""
        sizes = {s: {d: self.data.sizes(d, s) for d in self.data.domains} for s in SPLITS}
        return views_of(self.prepare(), sizes, self.data.split_seed)

    def rows(self) -> list[Record]:
        """Rows by split and class, read now; none where that takes as long as the study's own stage."""
        return []

    def start(self) -> dict[str, Any]:
        """What the base is trained from, and its new head."""
        raise NotImplementedError

    def training_of(self, task: str) -> Training:
        """How one task is fine-tuned."""
        assert self.task_training is not None  # `_known_models`
        steps = self.task_steps.get(task, self.task_training.steps)
        return self.task_training.model_copy(update={"steps": steps})

    @property
    def has_joint(self) -> bool:
        """Whether there is a joint model."""
        return self.joint_training is not None or "joint" in self.models

    @model_validator(mode="after")
    def _known_models(self) -> Config:
        own = ["base", *self.data.tasks, *(["joint"] if self.has_joint else [])]
        for name, spec in self.merges.items():
            lacking = {"factors", "gradient"} - self.fisher.gives
            check_rule(f"merge {name!r}", spec.method, len(self.data.tasks), lacking=sorted(lacking))
            if name in (*own, "joint"):
                raise ValueError(f"a merge may not be called {name!r}: that is one of {', '.join(own)}")
        named: dict[str, tuple[Iterable[str], Iterable[str], str]] = {
            "task_steps": (self.task_steps, self.data.tasks, "tasks"),
            "models": (self.models, ["base", *self.data.tasks, "joint"], "models"),
            "compare": ([name for pair in self.compare for name in pair], [*own, *self.merges], "models"),
            "sweep": (self.sweep.merges if self.sweep else (), self.merges, "merges"),
        }
        for key, (names, known, what) in named.items():
            for name in names:
                if name not in known:
                    raise ValueError(f"`{key}` names {name!r}, but the {what} are {', '.join(known)}")
        untrained = [task for task in self.data.tasks if task not in self.models]
        if self.task_training is None and untrained:
            raise ValueError(f"`task_training` is missing, and `models` has no {untrained[0]!r}")
        for key, used in (
            ("base_training", "base" in self.models),
            ("task_training", not untrained),
            ("joint_training", "joint" in self.models),
        ):
            if used and getattr(self, key) is not None:
                raise ValueError(
                    f"`{key}` trains nothing: `models` has these models already; leave one of them out"
                )
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
