"""Adding tasks (as the paper's Figure 1): does the gradient mismatch of a merge tell its test error?

Every subset of two or more tasks of a sentiment config is merged by every rule that takes so many (SLERP takes two). (With one task, task arithmetic at
alpha = 1 and gradient matching both return the fine-tune: there is nothing to compare.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from experiments.config import Pair
from experiments.pipeline import Stage, is_done, recorded, result
from experiments.records import Record, of_kind
from experiments.studies.cells import Cells, slug
from experiments.studies.classifiers import Config as Source
from experiments.studies.classifiers import Merge, takes
from experiments.studies.found import mismatch_of
from experiments.studies.sources import OnTexts
from gradmatch.rules import find_rule

Cell = tuple[int, tuple[str, ...], str]  # seed, subset of tasks, merge


class Config(OnTexts):
    """Keys of the config, beside those of the models that it uses."""

    experiment: Literal["adding"]
    merges: dict[str, Merge] = Field(min_length=2)
    compare: Pair  # of these two, which has the smaller mismatch

    def _check(self, source: Source) -> None:
        tasks = len(source.data.tasks)
        for name, spec in self.merges.items():
            size = int(min(tasks, find_rule(spec.method).models[1]))  # of the largest subset that it takes
            self.check_rules({f"merge {name!r}": spec.method}, size)
        for name in self.compare:
            if name not in self.merges:
                raise ValueError(f"`compare` names {name!r}, but the merges are {', '.join(self.merges)}")


def stages(config: Config) -> list[Stage]:
    """One per seed, subset and merge; the models it reads come with it."""
    return list(cells(config)[0].values())


def cells(config: Config) -> tuple[dict[Cell, Stage], dict[Cell, Stage]]:
    """The measured merges, and the choices of those that choose an option."""
    source = config.source
    made, measured, choices = Cells(source), {}, {}
    tasks = source.data.tasks
    subsets = [subset for size in range(2, len(tasks) + 1) for subset in combinations(tasks, size)]
    for seed, subset, (name, spec) in product(config.seeds or source.seeds, subsets, config.merges.items()):
        if not takes(spec.method, len(subset)):
            continue
        sources, settings = made.sources(seed, subset), {**spec.settings, "delta0": source.delta0}
        title = f"adding/seed{seed}/{'-'.join(subset)}"
        gradients = {task: made.gradients[seed, task] for task in subset}
        if spec.choose:
            choice = made.choice(f"{title}/choose-{slug(name)}", spec, settings, sources)
            choices[seed, subset, name] = sources["choice"] = choice
        title = f"{title}/{slug(name)}"
        measured[seed, subset, name] = made.measured(title, seed, settings, sources, subset, gradients)
    return measured, choices


def records(config: Config, store: Path) -> list[Record]:
    """One record per merge of a subset and seed; stages that failed are left out."""
    measured, choices = cells(config)
    found = []
    for (seed, subset, name), stage in measured.items():
        own = {"seed": seed, "tasks": list(subset), "model": name, "compare": list(config.compare)}
        own["merge"] = config.merges[name].settings
        for row in recorded(stage, store, "subset", "metrics.json", under="metrics", **own):
            row["mismatch"] = mismatch_of(stage, store, config.source.delta0)
            choice = choices.get((seed, subset, name))
            if choice and is_done(choice, store):
                row["choice"] = result(choice, store, "choice.json")
            found.append(row)
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
    smaller = sum(values[ours] < values[theirs] for values in pairs)
    return smaller / len(pairs), *wilson(smaller, len(pairs)), len(pairs)
