"""Studies on the models of another config: reading it, and what such studies have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import model_validator

from experiments import config as configs
from experiments.config import Seeds, Study
from experiments.options import check_rule
from experiments.studies.classifiers import Config


def read_source(
    path: Path, seeds: Sequence[int] = (), *, quick: bool = False, kinds: Sequence[str]
) -> Config:
    """The config whose models another study uses.

    Raises:
        ValueError: it is of another experiment than `kinds`, or lacks some of the seeds.
    """
    source: Config = configs.load(path, quick=quick)
    if {"texts": "sentiment"}.get(source.experiment, source.experiment) not in kinds:
        raise ValueError(f"{path} is no config of the {' or '.join(kinds)} experiment")
    absent = [seed for seed in seeds if seed not in source.seeds]
    if absent:
        raise ValueError(f"{path} has no seed {absent[0]}; it has {', '.join(map(str, source.seeds))}")
    return source


class OnTexts(Study):
    """Keys of a study on the models of a sentiment config (quick_models: of its quick variant)."""

    sentiment: Path
    quick_models: bool = False
    seeds: Seeds = ()  # of that config; empty: all of them

    @property
    def source(self) -> Config:
        """The sentiment config, checked."""
        return read_source(self.sentiment, self.seeds, quick=self.quick_models, kinds=("sentiment",))

    @model_validator(mode="after")
    def _has_a_source(self) -> OnTexts:
        self._check(self.source)
        return self

    def _check(self, source: Config) -> None:
        """Raise ValueError where the study asks for what the source has not."""

    def check_rules(self, methods: Mapping[str, str], tasks: int) -> None:
        """Refuse rules (by what a message calls them) that need what these studies do not estimate, or other numbers of tasks."""
        for where, method in methods.items():
            check_rule(where, method, tasks, lacking=("gram", "factors"))
