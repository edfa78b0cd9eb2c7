"""Adding tasks (as the paper's Figure 1): does the gradient mismatch of a merge tell its test error?

Every subset of two or more tasks of a sentiment config is merged by every rule that takes so many (SLERP takes two). (With one task, task arithmetic at
alpha = 1 and gradient matching both return the fine-tune: there is nothing to compare.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from experiments import config as configs
from experiments.config import Pair, Seeds, Study
from experiments.options import check_rule
from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record, of_kind
from experiments.studies import sentiment
from experiments.studies.sentiment import Merge, takes
from experiments.studies.sentiment_cells import (
    DIFFERENTIATED,
    EVALUATED,
    MERGING,
    MISMATCH,
    SOURCES,
    choice_stage,
    slug,
)
from gradmatch.rules import RULES

CODE = (*SOURCES, *MERGING, *MISMATCH, "experiments.evaluate", "experiments.merging", "experiments.mismatch")
Cell = tuple[int, tuple[str, ...], str]  # seed, subset of tasks, merge


class Config(Study):
    """Keys of the config: `sentiment` is the config whose models, curvatures and data are used (quick_models: its quick variant)."""

    experiment: Literal["adding"]
    sentiment: Path
    quick_models: bool = False
    seeds: Seeds = ()  # of that config; empty: all of them
    merges: dict[str, Merge] = Field(min_length=2)
    compare: Pair  # of these two, which has the smaller mismatch

    @model_validator(mode="after")
    def _known(self) -> Config:
        tasks = len(check_source(self.sentiment, self.seeds, self.quick_models).data.tasks)
        for name, spec in self.merges.items():
            size = min(tasks, RULES[spec.method].models[1])  # of the largest subset that it takes
            check_rule(f"merge {name!r}", spec.method, int(size), lacking=("gram", "factors"))
        for name in self.compare:
            if name not in self.merges:
                raise ValueError(f"`compare` names {name!r}, but the merges are {', '.join(self.merges)}")
        return self


def check_source(path: Path, seeds: Sequence[int], quick: bool) -> sentiment.Config:
    """The sentiment config that a study reads. Raises ValueError where it is none, or lacks some of the seeds."""
    source = configs.load(path, quick=quick)
    if source.experiment != "sentiment":
        raise ValueError(f"{path} is no config of the sentiment experiment")
    absent = [seed for seed in seeds if seed not in source.seeds]
    if absent:
        raise ValueError(f"{path} has no seed {absent[0]}; it has {', '.join(map(str, source.seeds))}")
    return source  # type: ignore[no-any-return]


def stages(config: Config) -> list[Stage]:
    """One per seed, subset and merge; the models it reads come with it."""
    return list(cells(config)[0].values())


def cells(config: Config) -> tuple[dict[Cell, Stage], dict[Cell, Stage]]:
    """The measured merges, and the choices of those that choose an option."""
    source = configs.load(config.sentiment, quick=config.quick_models)
    made = sentiment.Cells(source)
    measured: dict[Cell, Stage] = {}
    choices: dict[Cell, Stage] = {}
    for seed in config.seeds or source.seeds:
        for size in range(2, len(source.data.tasks) + 1):
            for subset in combinations(source.data.tasks, size):
                for name, spec in config.merges.items():
                    if not takes(spec.method, size):
                        continue
                    cell = (seed, subset, name)
                    inputs: dict[str, Any] = made.sources(seed, subset)
                    settings = {**spec.model_dump(exclude={"choose"}), "delta0": source.delta0}
                    title = f"adding/seed{seed}/{'-'.join(subset)}"
                    if spec.choose:
                        choices[cell] = inputs["choice"] = choice_stage(
                            f"{title}/choose-{slug(name)}", spec, source, settings, inputs, made.data, subset
                        )
                    measured[cell] = Stage(
                        f"{title}/{slug(name)}",
                        "experiments.cell:merge_and_measure",
                        {
                            **settings,
                            "domains": list(subset),
                            "examples": source.mismatch_examples,
                            "seed": seed,
                        },
                        {
                            **inputs,
                            "data": made.data,
                            "gradients": {task: made.gradients[seed, task] for task in subset},
                        },
                        CODE,
                        size
                        * (
                            (source.data.test or 1000) / EVALUATED + source.mismatch_examples / DIFFERENTIATED
                        ),
                    )
    return measured, choices


def records(config: Config, store: Path) -> list[Record]:
    """One record per merge of a subset and seed; stages that failed are left out."""
    measured, choices = cells(config)
    found = []
    for cell, stage in measured.items():
        if not is_done(stage, store):
            continue
        seed, subset, name = cell
        record: Record = {
            "experiment": config.experiment,
            "name": config.name,
            "kind": "subset",
            "seed": seed,
            "tasks": list(subset),
            "model": name,
            "compare": list(config.compare),
            "merge": config.merges[name].model_dump(exclude={"choose"}),
            "metrics": result(stage, store, "metrics.json"),
            "mismatch": result(stage, store, "mismatch.json"),
        }
        if cell in choices:
            record["choice"] = result(choices[cell], store, "choice.json")
        found.append(record | origin(stage, store))
    return found


def report(found: list[Record]) -> str:
    """Table by size of subset and merge, rank correlations with intervals, and whose mismatch is smaller."""
    from experiments.report import format_table

    cells = of_kind(found, "subset")
    rows = []
    for size, name in dict.fromkeys((len(record["tasks"]), record["model"]) for record in cells):
        own = [record for record in cells if (len(record["tasks"]), record["model"]) == (size, name)]
        mismatch = fmean(record["mismatch"]["per_example"] for record in own)
        rows.append(
            [f"{size} tasks, {name}", f"{mismatch:.3f}", f"{fmean(map(error, own)):.1f}", f"{len(own)}"]
        )
    lines = [format_table(["merge", "mismatch/n", "test error %", "merges"], rows), ""]
    for size, (rho, low, high, count) in correlations(cells).items():
        lines.append(
            f"Spearman of mismatch/n and test error over all merges of {size} tasks: mean {rho:.2f} (seeds {low:.2f} to "
            f"{high:.2f}; {count} merges)"
        )
    for size, (rho, least, count) in within_subsets(cells).items():
        lines.append(
            f"Spearman over the merges of one subset of {size} tasks: mean {rho:.2f}, smallest {least:.2f} ({count} subsets)"
        )
    share, low, high, count = smaller_share(cells)
    ours, theirs = cells[0]["compare"]
    lines.append(
        f"{ours} has a smaller mismatch than {theirs} in {100 * share:.0f} % of {count} subsets (95 % interval {100 * low:.0f} to "
        f"{100 * high:.0f} %)"
    )
    return "\n".join(lines)


def error(record: Record) -> float:
    """Test error in per cent, each task of the subset alike."""
    return round(100 * (1 - float(record["metrics"]["macro"]["accuracy"])), 9)  # equal errors are equal ranks


def correlations(cells: Sequence[Record]) -> dict[int, tuple[float, float, float, int]]:
    """Size of subset -> Spearman's rho over the merges of a seed: mean over seeds, smallest, largest; number of merges."""
    found = {}
    for size, groups in _points(cells).items():
        by_seed: dict[Any, list[tuple[float, float]]] = {}
        for (seed, *_), points in groups.items():
            by_seed.setdefault(seed, []).extend(points)
        rhos = [_rho(points) for points in by_seed.values()]
        found[size] = (fmean(rhos), min(rhos), max(rhos), sum(map(len, by_seed.values())))
    return found


def within_subsets(cells: Sequence[Record]) -> dict[int, tuple[float, float, int]]:
    """Size of subset -> Spearman's rho over the merges of one subset and seed: mean, smallest, number of subsets.

    Tasks differ in how hard they are, which the mismatch does not know; within a subset that plays no part.
    """
    found = {}
    for size, groups in _points(cells).items():
        rhos = [rho for group in groups.values() if (rho := _rho(group)) == rho]  # not NaN
        if rhos:
            found[size] = (fmean(rhos), min(rhos), len(rhos))
    return found


def _rho(points: Sequence[tuple[float, float]]) -> float:
    from experiments.statistics import spearman

    return spearman(*zip(*points, strict=True))


def _points(cells: Sequence[Record]) -> dict[int, dict[tuple[Any, ...], list[tuple[float, float]]]]:
    """Size of subset -> (seed, tasks) -> (mismatch per example, error) of its merges."""
    groups: dict[int, dict[tuple[Any, ...], list[tuple[float, float]]]] = {}
    for record in cells:
        point = (record["mismatch"]["per_example"], error(record))
        of_size = groups.setdefault(len(record["tasks"]), {})
        of_size.setdefault((record["seed"], *record["tasks"]), []).append(point)
    return dict(sorted(groups.items()))


def smaller_share(cells: Sequence[Record]) -> tuple[float, float, float, int]:
    """Share of subsets where the first of `compare` has the smaller mismatch, Wilson's 95 % interval, their number."""
    from experiments.statistics import wilson

    ours, theirs = cells[0]["compare"]
    by_subset: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in cells:
        by_subset.setdefault((record["seed"], *record["tasks"]), {})[record["model"]] = record["mismatch"][
            "total"
        ]
    pairs = [values for values in by_subset.values() if {ours, theirs} <= set(values)]
    share = fmean(values[ours] < values[theirs] for values in pairs)
    return share, *wilson(share, len(pairs)), len(pairs)
