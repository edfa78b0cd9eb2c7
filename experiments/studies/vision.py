"""The same experiment on images: a vision model, image sets as tasks, the same merges and measures."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from experiments.config import Count
from experiments.pipeline import Stage
from experiments.studies import classifiers
from experiments.studies.cells import records as records
from experiments.studies.cells import report as report
from experiments.studies.cells import stages as stages

PACKAGED = ("animals", "mnist", "photos", "digits")
PATCH = 14  # pixels of a patch of `dinov2`, a side


class Data(classifiers.Tasks):
    """Which images: sets of `PACKAGED`, or those of `sets`: name -> folder or hub name."""

    base: str = "animals"
    tasks: tuple[str, ...] = ("mnist", "photos", "digits")
    sets: dict[str, str] = Field(default_factory=dict)
    pixels: Count = 42

    @model_validator(mode="after")
    def _sets(self) -> Data:
        unknown = [name for name in self.domains if name not in (*PACKAGED, *self.sets)]
        if unknown:
            raise ValueError(
                f"no set {unknown[0]!r}: packages hold {', '.join(PACKAGED)}; `sets` may say where others lie"
            )
        return self


class Config(classifiers.Config):
    """Keys of a vision config: those of a sentiment config, but for the model, its images, and those a head is fitted to."""

    experiment: Literal["vision"]
    encoder: str = "dinov2"  # from its package, a folder, or a hub name
    data: Data = Data()
    probe: Count = 1000
    pace: ClassVar[float] = 0.6  # an image of nine patches in DINOv2-small

    @model_validator(mode="after")
    def _whole_patches(self) -> Config:
        if self.encoder == "dinov2" and self.data.pixels % PATCH:
            raise ValueError(f"data.pixels is {self.data.pixels}, but dinov2 takes multiples of {PATCH}")
        return self

    def prepare(self) -> Stage:
        data = self.data
        settings = {"domains": data.domains, "sets": data.sets, "pixels": data.pixels, **data.reading}
        reads = tuple(where for name, where in data.sets.items() if name in data.domains)
        return Stage("vision/data", "experiments.vision.sets:prepare", settings, seconds=20, reads=reads)

    def start(self) -> dict[str, Any]:
        return {"start": self.encoder, "pixels": self.data.pixels, "probe": self.probe}
