"""The same experiment on images: a vision model, image sets as tasks, the same merges and measures."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from experiments import config as configs
from experiments.config import Count, Strict
from experiments.pipeline import Stage
from experiments.records import Record
from experiments.studies import classifiers
from experiments.studies.cells import stages as stages
from experiments.studies.found import preview as preview
from experiments.studies.found import records as records
from experiments.studies.found import report as report

PACKAGED = ("animals", "mnist", "photos", "digits")
PATCH = 14  # pixels of a patch of `dinov2`, a side


class ImageSet(Strict):
    """Where the images of a set lie: a folder with a folder a class (or with one of each split), a parquet file, a hub name.

    train, validation, test: its splits; validation and test may be files. Without them, images are split by `data.validation`
    and `data.test`. image, label: the columns.
    """

    path: str
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    image: str = "image"
    label: str = "label"


class Data(classifiers.Tasks):
    """Which images: sets of `PACKAGED`, or those of `sets`: name -> where they lie; or a folder of IDX or npz files."""

    base: str = "animals"
    tasks: tuple[str, ...] = ("mnist", "photos", "digits")
    sets: dict[str, ImageSet] = Field(default_factory=dict)
    pixels: Count = 42

    @field_validator("sets", mode="before")
    @classmethod
    def _paths(cls, sets: Any) -> Any:
        """A path alone is short for a set with nothing else to say."""
        return configs.under("path", sets)

    @model_validator(mode="after")
    def _sets(self) -> Data:
        unknown = [name for name in self.domains if name not in (*PACKAGED, *self.sets)]
        if unknown:
            raise ValueError(
                f"no set {unknown[0]!r}: packages hold {', '.join(PACKAGED)}; `sets` may say where others lie"
            )
        return self

    def apart(self, domain: str) -> set[str]:
        """The splits of a set that are given."""
        own = self.sets.get(domain)
        return {split for split in ("validation", "test") if own and getattr(own, split)}


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
        used = {name: own for name, own in data.sets.items() if name in data.domains}
        sets = {name: own.model_dump() for name, own in used.items()}
        settings = {
            "domains": data.domains,
            "sets": sets,
            "pixels": data.pixels,
            "split_seed": data.split_seed,
        }
        reads = tuple(
            where for own in used.values() for where in (own.path, own.validation, own.test) if where
        )
        return Stage("vision/data", "experiments.vision.sets:prepare", settings, seconds=20, reads=reads)

    def rows(self) -> list[Record]:
        from experiments.assets import AssetError
        from experiments.tasks.views import counts
        from experiments.vision.sets import once

        rows, classes, notes = {}, {}, []
        for name in self.data.domains:
            spec = self.data.sets.get(name)
            try:
                found, groups = once(
                    name, spec and spec.model_dump(), self.data.pixels, self.data.split_seed, notes
                )
            except AssetError:  # told when it is needed: a dry run works without a network
                return []
            table = {
                "labels": [found.names[label] for label in found.labels],
                "groups": groups,
                "split": found.split,
            }
            classes[name] = found.names
            rows[name] = counts(name, table, found.names, self.data.split_sizes(name), self.data.split_seed)
        return [{"kind": "data", "rows": rows, "classes": classes, "notes": notes}]

    def start(self) -> dict[str, Any]:
        return {"start": self.encoder, "pixels": self.data.pixels, "probe": self.probe}
