"""The sentiment study on images: a vision model, image sets as tasks, the same merges and measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from experiments.config import Strict
from experiments.options import check_rule
from experiments.pipeline import Stage
from experiments.records import Record
from experiments.studies import sentiment, sentiment_cells
from experiments.studies.sentiment import report as report  # the same tables

FUNCTIONS = {  # what reads texts -> what reads images
    "experiments.finetune:finetune": "experiments.vision.training:finetune",
    "experiments.evaluate:evaluate": "experiments.vision.stages:evaluate",
    "experiments.estimation:curvature": "experiments.vision.stages:curvature",
    "experiments.mismatch:task_gradient": "experiments.vision.stages:task_gradient",
    "experiments.mismatch:mismatch": "experiments.vision.stages:mismatch",
    "experiments.merging:choose": "experiments.vision.stages:choose",
    "experiments.sweep:sweep": "experiments.vision.stages:sweep",
}
CODE = ("experiments.vision.models", "experiments.vision.packages", "experiments.evaluate")
SLOWER = 0.6  # seconds of an image of nine patches in DINOv2-small, for one of a text of the sentiment study
PACKAGED = ("animals", "mnist", "photos", "digits")
PATCH = 14  # pixels of a patch of `dinov2`, a side


class Data(Strict):
    """Which images: sets of `PACKAGED`, or those of `sets`: name -> folder or hub name."""

    base: str = "animals"
    tasks: tuple[str, ...] = ("mnist", "photos", "digits")
    sets: dict[str, str] = Field(default_factory=dict)
    pixels: int = Field(default=42, gt=0)
    train: int | None = Field(default=None, gt=0)  # at most so many images of a set; None: all
    validation: int | None = Field(default=None, gt=0)
    test: int | None = Field(default=None, gt=0)
    split_seed: int = 0

    @model_validator(mode="after")
    def _sets(self) -> Data:
        if not self.tasks or len({self.base, *self.tasks}) != 1 + len(self.tasks):
            raise ValueError("`base` and `tasks` must name one base set and at least one task, all different")
        unknown = [name for name in self.domains if name not in (*PACKAGED, *self.sets)]
        if unknown:
            raise ValueError(
                f"no set {unknown[0]!r}: packages hold {', '.join(PACKAGED)}; `sets` may say where others lie"
            )
        return self

    @property
    def domains(self) -> list[str]:
        """The base's set, then the tasks'."""
        return [self.base, *self.tasks]


class Config(sentiment.Config):
    """Keys of a vision config: those of a sentiment config, but for the model, its images, and those a head is fitted to."""

    experiment: Literal["vision"]  # type: ignore[assignment]
    encoder: str = "dinov2"  # from its package, a folder, or a hub name
    data: Data = Data()  # type: ignore[assignment]
    probe: int = Field(default=1000, gt=0)

    @model_validator(mode="after")
    def _whole_patches(self) -> Config:
        if self.encoder == "dinov2" and self.data.pixels % PATCH:
            raise ValueError(f"data.pixels is {self.data.pixels}, but dinov2 takes multiples of {PATCH}")
        return self

    @model_validator(mode="after")
    def _no_gram(self) -> Config:
        for name, spec in self.merges.items():
            check_rule(f"merge {name!r}", spec.method, len(self.data.tasks), lacking=("gram",))
        return self


class Cells(sentiment_cells.Cells):
    """The stages of the sentiment study, each that reads texts replaced by the one that reads images."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        made: dict[int, Stage] = {}  # so that a stage that several read stays one
        for group in (self.trained, self.curvatures, self.gradients, self.choices, self.merged,
                      self.evaluations, self.mismatches, self.distances, self.sweeps, self.comparisons, self.on_tasks):  # fmt: skip
            for key, stage in group.items():
                group[key] = on_images(stage, made)  # type: ignore[index]
        self.data = on_images(self.data, made)

    def _prepare(self) -> Stage:
        data = self.config.data
        return Stage(
            "sentiment/data",
            "experiments.vision.sets:prepare",
            {
                "domains": data.domains,
                "sets": data.sets,
                "pixels": data.pixels,
                "limits": {"train": data.train, "validation": data.validation, "test": data.test},
                "split_seed": data.split_seed,
            },
            code=CODE,
            seconds=20,
            reads=tuple(where for name, where in data.sets.items() if name in data.domains),
        )

    def _start(self) -> dict[str, Any]:
        config = self.config
        return {"start": config.encoder, "pixels": config.data.pixels, "probe": config.probe}


def on_images(stage: Stage, made: dict[int, Stage]) -> Stage:
    """A stage of the sentiment study, and all that it reads, for images."""
    if id(stage) not in made:
        inputs = {
            name: on_images(value, made)
            if isinstance(value, Stage)
            else {key: on_images(parent, made) for key, parent in value.items()}
            for name, value in stage.inputs.items()
        }
        own = stage.function in FUNCTIONS
        made[id(stage)] = Stage(
            stage.name.replace("sentiment/", "vision/", 1),
            FUNCTIONS.get(stage.function, stage.function),
            stage.settings,
            inputs,
            (*_code(stage), *CODE) if own else stage.code,
            stage.seconds * SLOWER if own else stage.seconds,
            stage.reads,
        )
    return made[id(stage)]


def _code(stage: Stage) -> list[str]:
    """Modules of a stage on texts that decide its twin's result too: its own, whose pieces the twin calls, and what it reads."""
    own = stage.function.split(":")[0]
    return [module for module in (own, *stage.code) if module not in sentiment_cells.SOURCES]


def stages(config: Config) -> list[Stage]:
    """What has to run for the records of this config; what they need comes with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """As those of the sentiment study."""
    return sentiment.records_of(Cells(config), store)
