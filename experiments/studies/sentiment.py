"""The paper's core experiment on texts with classes (sentiment, or one's own): base, fine-tunes, joint model, merges, and the gradient mismatch of each merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from experiments import config as configs
from experiments.pipeline import Stage
from experiments.records import Record
from experiments.studies import classifiers
from experiments.studies.cells import stages as stages
from experiments.studies.found import preview as preview
from experiments.studies.found import records as records
from experiments.studies.found import report as report
from experiments.tasks.classes import ClassName
from experiments.tasks.corpora import Corpus, read_all
from experiments.tasks.sentiment import VADER_FILES


class Data(classifiers.Tasks):
    """Which texts: `vader` (four domains from PyPI), or a folder, whose `<domain>.jsonl` (text, label, document) are `corpora`.

    `corpora` names a source per domain instead (a path alone is short for `{path: PATH}`). labels: the classes, in their order in the head; empty: those of the data, as
    the source numbers them, numbers by size, words by the alphabet. max_length: tokens; longer texts are cut. tokenizer: a folder or hub name; empty: the encoder's.
    """

    source: str = "vader"
    corpora: dict[str, Corpus] = Field(default_factory=dict)
    base: str = "movies"
    tasks: tuple[str, ...] = ("amazon", "tweets", "nyt")
    max_length: int = Field(default=64, gt=2)
    labels: Annotated[tuple[ClassName, ...], AfterValidator(configs.different)] = ()
    tokenizer: str = ""

    @field_validator("corpora", mode="before")
    @classmethod
    def _paths(cls, corpora: Any) -> Any:
        return configs.under("path", corpora)

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

    def packaged(self, domain: str) -> bool:
        """Whether a domain is split by its documents."""
        return self.read[domain].packaged

    def apart(self, domain: str) -> set[str]:
        """The splits of a domain that are given."""
        return {split for split in ("validation", "test") if getattr(self.read[domain], split)}


class Config(classifiers.Config):
    """Keys of a study on texts with classes: `sentiment` and `texts` are one experiment."""

    experiment: Literal["sentiment", "texts"]
    encoder: str = "encoder"  # an asset, a folder, or a hub name
    data: Data = Data()

    def prepare(self) -> Stage:
        corpora = {domain: own.model_dump(exclude_defaults=True) for domain, own in self.data.read.items()}
        data = self.data
        words = data.tokenizer or self.encoder
        return texts_stage(
            f"{self.experiment}/data", corpora, words, data.max_length, data.split_seed, data.labels
        )

    def rows(self) -> list[Record]:
        from experiments.tasks.views import counts, rows_of

        examples, classes, notes = read_all(self.data.read, self.data.labels)
        rows = {}
        for domain, own in examples.items():
            packaged, seed = self.data.packaged(domain), self.data.split_seed
            table = rows_of(domain, own, packaged=packaged, seed=seed)
            rows[domain] = counts(
                domain, table, classes, self.data.split_sizes(domain), seed, packaged=packaged
            )
        return [{"kind": "data", "rows": rows, "classes": dict.fromkeys(rows, classes), "notes": notes}]

    def start(self) -> dict[str, Any]:
        return {"start": self.encoder, **({"tokenizer": self.data.tokenizer} if self.data.tokenizer else {})}


def texts_stage(
    name: str,
    corpora: Mapping[str, Mapping[str, Any]],
    encoder: str,
    max_length: int,
    split_seed: int = 0,
    labels: Sequence[str] = (),
) -> Stage:
    """The stage that reads and tokenises corpora; the hub's names among their paths are no files."""
    settings = {"corpora": corpora, "tokenizer": encoder, "max_length": max_length}
    settings |= {"split_seed": split_seed, "labels": list(labels)}
    files = [file for own in corpora.values() for file in Corpus.model_validate(own).files]
    reads = (*files, *classifiers.local_model(encoder))
    return Stage(
        name, "experiments.tasks.corpora:prepare", settings, seconds=10 + 5 * len(files), reads=reads
    )
