"""Removing text from a language model: fine-tune on what is to go, subtract it, measure what went and what suffered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from experiments.config import Strict, Study, Training
from experiments.pipeline import Stage, card, is_done
from experiments.records import Record
from experiments.removal.tradeoff import Path as Curve
from experiments.removal.tradeoff import area_between, mean_interval
from experiments.tasks.texts import Source
from gradmatch.subtraction import REMOVALS

SOURCES = ("experiments.removal.language", "experiments.tasks.texts", "experiments.assets")
EDITING = (
    "gradmatch.subtraction",
    "gradmatch.merging",
    "gradmatch.engine",
    "gradmatch.rules",
    "gradmatch.checkpoint",
)


class Limits(Strict):
    """At most so many texts a side and split; None: all."""

    train: int | None = Field(default=None, gt=0)
    validation: int | None = Field(default=None, gt=0)
    test: int | None = Field(default=None, gt=0)


class Fisher(Strict):
    """How both curvatures are estimated: Monte-Carlo Fisher, labels sampled, padding excluded."""

    examples: int = Field(default=256, ge=8)
    samples: int = Field(default=1, gt=0)
    batch_size: int = Field(default=8, gt=0)
    reduction: Literal["example", "batch"] = "example"


class Generation(Strict):
    """Continuations of prompts: nucleus sampling at temperature 1, seeded."""

    tokens: int = Field(default=20, gt=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    batch_size: int = Field(default=96, gt=0)


class Method(Strict):
    """One way to remove, at several strengths; options of `gradmatch.subtract` (base_weight, delta0, keep).

    choose: one option and the values to choose from, see `Choosing`.
    """

    method: str
    alphas: tuple[float, ...] = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)
    choose: dict[str, tuple[float, ...]] = Field(default_factory=dict, max_length=1)

    @model_validator(mode="after")
    def _known(self) -> Method:
        if self.method not in REMOVALS:
            raise ValueError(f"{self.method!r} is no way to remove; choose one of {', '.join(REMOVALS)}")
        if not all(alpha > 0 for alpha in self.alphas) or len(set(self.alphas)) != len(self.alphas):
            raise ValueError(f"alphas must be positive and different, got {list(self.alphas)}")
        return self


class Forecast(Strict):
    """The path of forecasts: of which method, from how many validation texts, and the budget in nats per text."""

    method: str
    examples: int = Field(default=16, gt=0)
    nats: float = Field(default=2.0, gt=0)


class Choosing(Strict):
    """How options are chosen: the value with the lowest mean toxicity over budgets up to `nats` a token wins.

    Every second alpha of a method's path is run for each value, on the validation texts that must stay and on `count`
    prompts of the list `prompts` that the evaluation leaves.
    """

    prompts: str
    count: int = Field(default=64, gt=0)
    nats: float = Field(default=0.5, gt=0)


class Config(Study):
    """Keys of a removal config."""

    experiment: Literal["removal"]
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    model: str = "smollm2"  # an asset, a folder, or a hub name
    remove: Source
    keep: Source
    prompts: dict[str, Source] = Field(default_factory=dict)
    limits: Limits = Limits()
    split_seed: int = 0
    max_length: int = Field(default=48, gt=2)
    training: Training
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    fisher: Fisher = Fisher()
    methods: dict[str, Method]
    choosing: Choosing | None = None
    forecast: Forecast | None = None
    generation: Generation = Generation()
    scorer: str = "proxy"
    compare: tuple[tuple[str, str], ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for name in [name for pair in self.compare for name in pair] + (
            [self.forecast.method] if self.forecast else []
        ):
            if name not in self.methods:
                raise ValueError(f"{name!r} is none of the methods {', '.join(self.methods)}")
        wanting = [name for name, method in self.methods.items() if method.choose]
        if wanting and self.choosing is None:
            raise ValueError(f"{', '.join(wanting)}: `choose` needs the key `choosing`, which says on what")
        if self.choosing and self.choosing.prompts not in self.prompts:
            raise ValueError(f"choosing.prompts: {self.choosing.prompts!r} is none of {list(self.prompts)}")
        return self


class Cells:
    """The stages of one config, by what they are of."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = Stage(
            "removal/data",
            "experiments.tasks.texts:prepare",
            {
                "remove": config.remove.model_dump(),
                "keep": config.keep.model_dump(),
                "prompts": {name: source.model_dump() for name, source in config.prompts.items()},
                "limits": config.limits.model_dump(),
                "split_seed": config.split_seed,
            },
            code=("experiments.assets",),
            seconds=8,
        )
        self.base = Stage(
            "removal/base",
            "experiments.removal.language:save_base",
            {"source": config.model},
            code=("experiments.assets",),
            seconds=30,
        )
        self.trained: dict[int, Stage] = {}
        self.curvatures: dict[tuple[int, str], Stage] = {}
        self.evaluations: dict[tuple[int, str, float], Stage] = {}
        self.forecasts: dict[int, Stage] = {}
        self.choices: dict[tuple[int, str], Stage] = {}
        for seed in config.seeds:
            self._prepare(seed)
            self._evaluate(seed)

    def all(self) -> list[Stage]:
        """Every stage; what they need comes with them."""
        return [*self.evaluations.values(), *self.forecasts.values()]

    def _prepare(self, seed: int) -> None:
        config = self.config
        shared = {"max_length": config.max_length, "precision": config.precision, "seed": seed}
        tokens = config.max_length * config.training.batch_size
        self.trained[seed] = Stage(
            f"removal/seed{seed}/task",
            "experiments.removal.stages:finetune",
            {**shared, **config.training.model_dump()},
            {"data": self.data, "base": self.base},
            SOURCES,
            10 + config.training.steps * (0.4 + 0.001 * tokens),
        )
        for side, name, model in (("keep", "base", self.base), ("remove", "task", self.trained[seed])):
            self.curvatures[seed, name] = Stage(
                f"removal/seed{seed}/curvature-{name}",
                "experiments.removal.stages:curvature",
                {"side": side, **shared, **config.fisher.model_dump()},
                {"data": self.data, "model": model},
                (*SOURCES, "estimators"),
                10 + config.fisher.examples * config.fisher.samples * config.max_length * 0.004,
            )

    def _evaluate(self, seed: int) -> None:
        config = self.config
        folders = {
            "base": self.base,
            "task": self.trained[seed],
            "base_curvature": self.curvatures[seed, "base"],
            "task_curvature": self.curvatures[seed, "task"],
        }
        shared = {
            "max_length": config.max_length,
            "batch_size": 32,
            "precision": config.precision,
            "generation": config.generation.model_dump(),
            "scorer": config.scorer,
            "seed": seed,
        }
        texts = 2 * (config.limits.test or 500)
        prompts = sum(source.limit or 300 for source in config.prompts.values())
        seconds = 6 + texts * config.max_length * 0.0006 + prompts * config.generation.tokens * 0.005

        def point(
            label: str, method: str, alpha: float, options: Mapping[str, Any], inputs: Mapping[str, Stage]
        ) -> Stage:
            return Stage(
                f"removal/seed{seed}/evaluate-{label}-{alpha:g}",
                f"{_module(inputs)}:evaluate",
                {"method": method, "alpha": alpha, "options": dict(options), "split": "test", **shared},
                {"data": self.data, **inputs},
                (*SOURCES, "experiments.removal.scorers", *(EDITING if alpha else ())),
                seconds,
            )

        self.evaluations[seed, "base", 0.0] = point("base", "removal", 0.0, {}, {"base": self.base})
        for label, spec in config.methods.items():
            inputs = dict(folders)
            if spec.choose:
                inputs["chosen"] = self.choices[seed, label] = self._choose(seed, label, folders, shared)
            for alpha in spec.alphas:
                self.evaluations[seed, label, alpha] = point(label, spec.method, alpha, spec.options, inputs)
            if config.forecast and config.forecast.method == label:
                self.forecasts[seed] = self._forecast(seed, spec, config.forecast, inputs)

    def _choose(
        self, seed: int, label: str, folders: Mapping[str, Stage], shared: Mapping[str, Any]
    ) -> Stage:
        """The choice of one method's option on validation data."""
        config, spec, how = self.config, self.config.methods[label], self.config.choosing
        assert how is not None  # the config was checked
        alphas = list(spec.alphas[1::2] or spec.alphas)
        grid = {option: list(values) for option, values in spec.choose.items()}
        count = sum(map(len, grid.values())) * len(alphas) + 1
        return Stage(
            f"removal/seed{seed}/choose-{label}",
            "experiments.removal.choosing:choose",
            {
                "method": spec.method,
                "alphas": alphas,
                "options": spec.options,
                "grid": grid,
                "prompts": config.prompts[how.prompts].model_dump(),
                "count": how.count,
                "nats": how.nats,
                "split_seed": config.split_seed,
                **shared,
            },
            {"data": self.data, **folders},
            (*SOURCES, "experiments.removal.stages", "experiments.removal.scorers", *EDITING),
            count * (12 + how.count * config.generation.tokens * 0.005),
        )

    def _forecast(self, seed: int, spec: Method, how: Forecast, inputs: Mapping[str, Stage]) -> Stage:
        """The forecasts along one method's path."""
        return Stage(
            f"removal/seed{seed}/forecast",
            f"{_module(inputs)}:forecast",
            {
                "method": spec.method,
                "alphas": list(spec.alphas),
                "options": spec.options,
                "max_length": self.config.max_length,
                "examples": how.examples,
                "nats": how.nats,
            },
            {"data": self.data, **inputs},
            (*SOURCES, *EDITING, "gradmatch.removal", "gradmatch.diagnosis"),
            30 + 15 * len(spec.alphas),
        )


def _module(inputs: Mapping[str, Stage]) -> str:
    """Where the stages live that take these inputs: with a chosen option, or without."""
    return "experiments.removal.choosing" if "chosen" in inputs else "experiments.removal.stages"


def stages(config: Config) -> list[Stage]:
    """What has to run for the records of this config; what they need comes with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record per model and seed, one per forecast, one per comparison; stages that failed are left out."""
    cells = Cells(config)
    found = [
        *_points(cells, store),
        *_choices(cells, store),
        *_forecasts(cells, store),
        *_curvatures(cells, store),
        *_areas(cells, store),
    ]
    shared = {
        "experiment": config.experiment,
        "name": config.name,
        "model": config.model,
    }
    return [{**shared, **record} for record in found]


def _points(cells: Cells, store: Path) -> Iterator[Record]:
    for (seed, label, alpha), stage in cells.evaluations.items():
        if not is_done(stage, store):
            continue
        folder = stage.folder(store)
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        intervals = {}
        for name in cells.config.prompts:
            scores = _scores(folder, name)
            known = scores[np.isfinite(scores)]
            if len(known):
                intervals[f"toxicity_{name}"] = mean_interval(known)
        yield {
            "kind": "point",
            "seed": seed,
            "label": label,
            "alpha": alpha,
            "metrics": metrics,
            "intervals": intervals,
            "generations": str(folder / "generations.jsonl"),
            **_origin(stage, store),
        }


def _choices(cells: Cells, store: Path) -> Iterator[Record]:
    for (seed, label), stage in cells.choices.items():
        if is_done(stage, store):
            content = json.loads((stage.folder(store) / "choice.json").read_text(encoding="utf-8"))
            yield {"kind": "choice", "seed": seed, "label": label, **content, **_origin(stage, store)}


def _forecasts(cells: Cells, store: Path) -> Iterator[Record]:
    for seed, stage in cells.forecasts.items():
        if is_done(stage, store):
            content = json.loads((stage.folder(store) / "forecast.json").read_text(encoding="utf-8"))
            method = cells.config.forecast.method if cells.config.forecast else ""
            yield {"kind": "forecast", "seed": seed, "label": method, **content, **_origin(stage, store)}


def _curvatures(cells: Cells, store: Path) -> Iterator[Record]:
    for (seed, name), stage in cells.curvatures.items():
        if is_done(stage, store):
            content = json.loads((stage.folder(store) / "error.json").read_text(encoding="utf-8"))
            yield {"kind": "curvature", "seed": seed, "of": name, **content, **_origin(stage, store)}


def _areas(cells: Cells, store: Path) -> Iterator[Record]:
    """The comparisons, over all seeds that are complete: toxicity of continuations, and likelihood of what is removed."""
    for ours, theirs in cells.config.compare:
        for measure in (*(("toxicity",) if cells.config.prompts else ()), "forgetting"):
            curves = {label: _curve(cells, store, label, measure) for label in (ours, theirs)}
            paths = {label: curve for label, curve in curves.items() if curve is not None}
            if len(paths) == 2:
                found = vars(area_between(paths, ours, theirs))
                yield {"kind": "area", "measure": measure, "ours": ours, "theirs": theirs, **found}


def _curve(cells: Cells, store: Path, label: str, measure: str) -> Curve | None:
    """One method's path over all seeds: texts and prompts of the seeds side by side; None where a point is missing."""
    config = cells.config
    alphas = [0.0, *config.methods[label].alphas]
    losses, scores = [], []
    for seed in config.seeds:
        found = [cells.evaluations[seed, label if alpha else "base", alpha] for alpha in alphas]
        if not all(is_done(stage, store) for stage in found):
            return None
        tables = [np.load(stage.folder(store) / "losses.npz") for stage in found]
        losses.append(np.stack([table["keep"] for table in tables]))
        if measure == "toxicity":
            scores.append(np.stack([_scores(stage.folder(store), *config.prompts) for stage in found]))
        else:  # what is left of the knowledge: log-likelihood a token of each text to remove, less is better
            scores.append(np.stack([-table["remove"][:, 0] / table["remove"][:, 1] for table in tables]))
    return Curve(np.asarray(alphas), np.concatenate(losses, 1), np.concatenate(scores, 1))


def _scores(folder: Path, *lists: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(m,) scores of the continuations of the named prompt lists; NaN where the model refused."""
    rows = map(json.loads, (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines())
    return np.asarray([row["score"] for row in rows if row["list"] in lists], dtype=np.float64)


def _origin(stage: Stage, store: Path) -> Mapping[str, Any]:
    """Where a record's numbers come from: its stage, commit, versions, machine, seconds."""
    found = card(stage, store)
    kept = ("key", "commit", "versions", "machine", "threads", "seconds", "finished", "peak_memory_mb")
    return {key: found[key] for key in kept}


def report(found: list[Record]) -> str:
    """What the experiment prints: the table, the areas between curves, the budget, and what the proxy is."""
    from experiments.removal.report import removal_report

    return removal_report(found)
