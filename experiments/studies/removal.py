"""Removing text from a language model: fine-tune on what is to go, subtract it, measure what went and what suffered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from experiments.config import Pair, Seeds, Strict, Study, Training
from experiments.options import check_names
from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record
from experiments.removal import scorers
from experiments.removal.tradeoff import Path as Curve
from experiments.removal.tradeoff import area_between, mean_interval
from experiments.studies.removal_cells import BASE_SEED, Cells
from experiments.studies.sentiment import check_merge
from experiments.tasks.corpora import json_lines
from experiments.tasks.texts import LISTS, Source, read
from gradmatch.rules import removals

FILES = (".txt", ".jsonl", ".csv", ".tsv")  # what `experiments.tasks.texts` reads as files


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
        if self.method not in removals():
            raise ValueError(f"{self.method!r} is no way to remove; choose one of {', '.join(removals())}")
        if not all(alpha > 0 for alpha in self.alphas) or len(set(self.alphas)) != len(self.alphas):
            raise ValueError(f"alphas must be positive and different, got {list(self.alphas)}")
        check_names(self.method, self.options, self.choose, also=())  # the strengths are `alphas`
        check_merge(self.method, self.options)
        for name, values in self.choose.items():
            if not values:
                raise ValueError(f"`choose` has no values for {name!r}")
            for value in values:
                check_merge(self.method, {**self.options, name: value})
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
    seeds: Seeds = Field(default=(0,), min_length=1)
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
    methods: dict[str, Method] = Field(min_length=1)
    choosing: Choosing | None = None
    forecast: Forecast | None = None
    generation: Generation = Generation()
    scorer: str = "proxy"
    compare: tuple[Pair, ...] = ()

    @property
    def sources(self) -> dict[str, Source]:
        """Every source of texts, by the path to its key."""
        prompts = {f"prompts.{name}": source for name, source in self.prompts.items()}
        return {"remove": self.remove, "keep": self.keep, **prompts}

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, scorer: str) -> str:
        scorers.find(scorer)
        return scorer

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
        for where, source in self.sources.items():
            check_source(where, source)
        return self


def check_source(where: str, source: Source) -> None:
    """Read a file of texts as the stage will, before anything runs; a name that is nearly a list's is taken for a slip.

    Raises:
        ValueError: what is wrong with the file, after the path to its key.
    """
    path = Path(source.source)
    if source.source in LISTS:
        return
    if path.suffix not in FILES:
        near = get_close_matches(source.source, LISTS, n=1)
        if near and not path.exists():
            raise ValueError(f"{where}: no list {source.source!r}; did you mean {near[0]!r}?")
        return
    try:
        if path.suffix == ".jsonl" and path.is_file():
            list(json_lines(path))
        read(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


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
    unedited = {(BASE_SEED, "base", 0.0): cells.unedited}
    for (seed, label, alpha), stage in (unedited | cells.evaluations).items():
        if not is_done(stage, store):
            continue
        folder = stage.folder(store)
        metrics = result(stage, store, "metrics.json")
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
            **origin(stage, store),
        }


def _choices(cells: Cells, store: Path) -> Iterator[Record]:
    for (seed, label), stage in cells.choices.items():
        if is_done(stage, store):
            content = result(stage, store, "choice.json")
            yield {"kind": "choice", "seed": seed, "label": label, **content, **origin(stage, store)}


def _forecasts(cells: Cells, store: Path) -> Iterator[Record]:
    for seed, stage in cells.forecasts.items():
        if is_done(stage, store):
            content = result(stage, store, "forecast.json")
            method = cells.config.forecast.method if cells.config.forecast else ""
            yield {"kind": "forecast", "seed": seed, "label": method, **content, **origin(stage, store)}


def _curvatures(cells: Cells, store: Path) -> Iterator[Record]:
    tasks = {(seed, "task"): stage for seed, stage in cells.curvatures.items()}
    for (seed, name), stage in ({(BASE_SEED, "base"): cells.base_curvature} | tasks).items():
        if is_done(stage, store):
            content = result(stage, store, "error.json")
            own = {"kind": "curvature", "seed": seed, "of": name}  # the card has a seed too: the estimator's
            yield {**content, **own, **origin(stage, store)}


def _areas(cells: Cells, store: Path) -> Iterator[Record]:
    """The comparisons over all seeds: toxicity of continuations, and likelihood of what is removed.

    One whose path lacks a point, of any seed, is left out.
    """
    seeds = cells.config.seeds
    for ours, theirs in cells.config.compare:
        for measure in (*(("toxicity",) if cells.config.prompts else ()), "forgetting"):
            curves = {
                label: [_curve(cells, store, seed, label, measure) for seed in seeds]
                for label in (ours, theirs)
            }
            paths = {label: [curve for curve in own if curve is not None] for label, own in curves.items()}
            if all(len(own) == len(seeds) for own in paths.values()):
                found = vars(area_between(paths, ours, theirs)) | {"seeds": list(seeds)}
                yield {"kind": "area", "measure": measure, "ours": ours, "theirs": theirs, **found}


def _curve(cells: Cells, store: Path, seed: int, label: str, measure: str) -> Curve | None:
    """One method's path with one seed; None where it lacks a point."""
    config = cells.config
    alphas = [0.0, *config.methods[label].alphas]
    found = [cells.unedited, *(cells.evaluations[seed, label, alpha] for alpha in alphas[1:])]
    if not all(is_done(stage, store) for stage in found):
        return None
    tables = [np.load(stage.folder(store) / "losses.npz") for stage in found]
    if measure == "toxicity":
        scores = [_scores(stage.folder(store), *config.prompts) for stage in found]
    else:  # what is left of the knowledge: log-likelihood a token of each text to remove, less is better
        scores = [-table["remove"][:, 0] / table["remove"][:, 1] for table in tables]
    return Curve(np.asarray(alphas), np.stack([table["keep"] for table in tables]), np.stack(scores))


def _scores(folder: Path, *lists: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(m,) scores of the continuations of the named prompt lists; NaN where the model refused."""
    rows = map(json.loads, (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines())
    return np.asarray([row["score"] for row in rows if row["list"] in lists], dtype=np.float64)


def report(found: list[Record]) -> str:
    """What the experiment prints: the table, the areas between curves, the budget, and what the proxy is."""
    from experiments.removal.report import removal_report

    return removal_report(found)
