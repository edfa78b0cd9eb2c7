"""The paper's core experiment on texts: base, fine-tunes, joint model, merges, and the gradient mismatch of each merge."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from experiments.config import Strict
from experiments.pipeline import Stage
from experiments.studies import classifiers
from experiments.studies.cells import records as records
from experiments.studies.cells import report as report
from experiments.studies.cells import stages as stages
from experiments.tasks.sentiment import VADER_FILES


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


class Data(classifiers.Tasks):
    """Which texts: `vader` (four domains from PyPI), or a folder, whose `<domain>.jsonl` (text, label, document) are `corpora`.

    `corpora` names a source per domain instead.
    """

    source: str = "vader"
    corpora: dict[str, Corpus] = Field(default_factory=dict)
    base: str = "movies"
    tasks: tuple[str, ...] = ("amazon", "tweets", "nyt")
    max_length: int = Field(default=64, gt=2)

    @model_validator(mode="after")
    def _known(self) -> Data:
        if self.corpora and "source" in self.model_fields_set:
            raise ValueError("give either `source` or `corpora`: with both, `source` would not be read")
        if not self.corpora and self.source != "vader":
            files = {domain: Corpus(path=f"{self.source}/{domain}.jsonl") for domain in self.domains}
            object.__setattr__(self, "corpora", files)  # frozen, but not before it is made
        absent = [domain for domain in self.domains if domain not in self.corpora]
        if self.corpora and absent:
            raise ValueError(f"`corpora` has no {absent[0]!r}; it has {', '.join(self.corpora)}")
        for domain, corpus in self.read.items():
            if corpus.path == "vader" and domain not in VADER_FILES:
                raise ValueError(f"vader has no domain {domain!r}; it has {', '.join(VADER_FILES)}")
        return self

    @property
    def read(self) -> dict[str, Corpus]:
        """The corpus of each domain."""
        return {domain: self.corpora.get(domain, Corpus(path="vader")) for domain in self.domains}


class Config(classifiers.Config):
    """Keys of a sentiment config."""

    experiment: Literal["sentiment"]
    encoder: str = "encoder"  # an asset, a folder, or a hub name
    data: Data = Data()

    def prepare(self) -> Stage:
        corpora = {domain: own.model_dump(exclude_defaults=True) for domain, own in self.data.read.items()}
        settings = {"corpora": corpora, "encoder": self.encoder, "max_length": self.data.max_length}
        return texts_stage("sentiment/data", settings | self.data.reading)

    def start(self) -> dict[str, Any]:
        return {"start": self.encoder, "num_labels": 2}


def texts_stage(name: str, settings: dict[str, Any]) -> Stage:
    """The stage that reads and tokenises corpora; the hub's names among their paths are no files."""
    paths = [own["path"] for own in settings["corpora"].values() if own["path"] != "vader"]
    reads = (*paths, *classifiers.local_model(settings["encoder"]))
    return Stage(
        name, "experiments.tasks.corpora:prepare", settings, seconds=10 + 5 * len(paths), reads=reads
    )
