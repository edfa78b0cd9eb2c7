"""What a removal study is told: texts to remove and to keep, prompts, the ways to remove, how options are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experiments.config import Count, Pair, Seeds, Strict, Study, Training
from experiments.options import check_names
from experiments.removal import scorers
from experiments.studies.classifiers import check_values
from experiments.tasks.texts import LISTS, Source, read
from gradmatch.estimators.names import nearest
from gradmatch.measure.tables import kind_of
from gradmatch.rules import removals


class Limits(Strict):
    """At most so many texts a side and split; None: all."""

    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None


class Fisher(Strict):
    """How both curvatures are estimated: Monte-Carlo Fisher, labels sampled, padding excluded."""

    examples: int = Field(default=256, ge=8)
    samples: Count = 1
    batch_size: Count = 8
    reduction: Literal["example", "batch"] = "example"


class Generation(Strict):
    """Continuations of prompts: nucleus sampling at temperature 1, seeded."""

    tokens: Count = 20
    top_p: float = Field(default=0.9, gt=0, le=1)
    batch_size: Count = 96


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
        for name, values in self.choose.items():
            if not values:
                raise ValueError(f"`choose` has no values for {name!r}")
        check_values(self.method, self.options, self.choose)
        return self


class Forecast(Strict):
    """The path of forecasts: of which method, from how many validation texts, and the budget in nats per text."""

    method: str
    examples: Count = 16
    nats: float = Field(default=2.0, gt=0)


class Choosing(Strict):
    """How options are chosen: the value with the lowest mean toxicity over budgets up to `nats` a token wins.

    Every second alpha of a method's path is run for each value, on the validation texts that must stay and on `count`
    prompts of the list `prompts` that the evaluation leaves.
    """

    prompts: str
    count: Count = 64
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
    split_seed: int = Field(default=0, ge=0)
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
        named = [name for pair in self.compare for name in pair]
        for name in [*named, *([self.forecast.method] if self.forecast else [])]:
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
    if kind_of(path) is None:
        near = nearest(source.source, LISTS)
        if near and not path.exists():
            raise ValueError(f"{where}: no list {source.source!r}{near}")
        return
    try:
        read(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
