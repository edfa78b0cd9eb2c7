"""The assumption behind Eq. 12: what closes the gap to the joint model, the penalty of Eq. 8 or the measured gradient?

And does refinement go on from the merge without raising the objective of Eq. 9?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experiments import config as configs
from experiments.config import Seeds, Strict, Study, Weights, different
from experiments.options import check_rule
from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record, of_kind
from experiments.studies import sentiment
from experiments.studies.adding import CODE, check_source
from experiments.studies.sentiment import Merge, check_merge
from experiments.studies.sentiment_cells import (
    EVALUATED,
    SOURCES,
    SQUARED,
    TRAINED,
    choice_stage,
    slug,
)

PLAIN = "plain"


class Refinement(Strict):
    """Newton steps from a merge by `method`, a run per damping."""

    method: str = "gradient_matching"
    examples: int = Field(default=128, gt=1)  # of each task
    steps: int = Field(default=3, gt=0)
    dampings: Weights = Field(default=(0.0,), min_length=1)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        check_merge(method, {})
        return method


class Config(Study):
    """Keys of the config: `sentiment` is the config of the plain fine-tunes (quick_models: its quick variant).

    delta0: the floors of H0 in the penalty; without any, nothing is fine-tuned with it.
    """

    experiment: Literal["assumption"]
    sentiment: Path
    quick_models: bool = False
    seeds: Seeds = ()  # of that config; empty: all of them
    delta0: Weights = ()
    merges: dict[str, Merge] = Field(min_length=1)
    refine: Refinement | None = None

    @field_validator("delta0")
    @classmethod
    def _told_apart(cls, delta0: tuple[float, ...]) -> tuple[float, ...]:
        different([f"{value:g}" for value in delta0])  # as the records call them
        return delta0

    @model_validator(mode="after")
    def _known(self) -> Config:
        tasks = len(check_source(self.sentiment, self.seeds, self.quick_models).data.tasks)
        methods = {f"merge {name!r}": spec.method for name, spec in self.merges.items()}
        if self.refine:
            methods["refine"] = self.refine.method
        for name, method in methods.items():
            check_rule(name, method, tasks, lacking=("gram", "factors"))
        return self


class Cells:
    """The stages of one config, by (seed, how the tasks were fine-tuned, ...)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.source = configs.load(config.sentiment, quick=config.quick_models)
        self.made = sentiment.Cells(self.source)
        self.seeds = config.seeds or self.source.seeds
        self.stationarity: dict[tuple[int, str, str], Stage] = {}
        self.merges: dict[tuple[int, str, str], Stage] = {}
        self.choices: dict[tuple[int, str, str], Stage] = {}
        self.refined: dict[tuple[int, float], Stage] = {}
        self.references: dict[tuple[int, str], Stage] = {}
        tasks = self.source.data.tasks
        for seed in self.seeds:
            sources = self.made.sources(seed, tasks)
            self._merged(seed, PLAIN, sources, self.source.delta0)
            for damping in config.refine.dampings if config.refine else ():
                self.refined[seed, damping] = self._refine(seed, damping, sources)
            self.references[seed, "joint"] = self.made.evaluations[seed, "joint"]
        for seed in self.seeds:
            for delta0 in config.delta0:
                self._merged(seed, f"{delta0:g}", self._penalised(seed, delta0), delta0)

    def _penalised(self, seed: int, delta0: float) -> dict[str, Any]:
        """The sources of a merge of fine-tunes with the penalty."""
        source, title = self.source, f"assumption/seed{seed}/delta0-{delta0:g}"
        base, h0 = self.made.trained[seed, "base"], self.made.curvatures[seed, "base"]
        sources: dict[str, Any] = {"base": base, "base_curvature": h0, "tasks": {}, "curvatures": {}}
        for task in source.data.tasks:
            training = source.task_training
            steps = source.task_steps.get(task, training.steps)
            tuned = Stage(
                f"{title}/{task}",
                "experiments.penalised:finetune_penalised",
                {
                    "domain": task,
                    "delta0": delta0,
                    "precision": source.precision,
                    "seed": seed,
                    **training.model_dump(),
                    "steps": steps,
                },
                {"data": self.made.data, "start": base, "base_curvature": h0},
                (*SOURCES, "experiments.finetune"),
                2 + 1.2 * steps * training.batch_size / TRAINED,
            )
            sources["tasks"][task] = tuned
            sources["curvatures"][task] = Stage(
                f"{title}/curvature-{task}",
                "experiments.estimation:curvature",
                {"domain": task, "seed": seed, **source.fisher.model_dump()},
                {"data": self.made.data, "model": tuned},
                (*SOURCES, "gradmatch.estimators"),
                source.fisher.examples / SQUARED,
            )
        return sources

    def _merged(self, seed: int, tuning: str, sources: dict[str, Any], delta0: float) -> None:
        data, tasks = self.source.data, self.source.data.tasks
        title = f"assumption/seed{seed}/{tuning}"
        for task in tasks:
            self.stationarity[seed, tuning, task] = Stage(
                f"{title}/stationarity-{task}",
                "experiments.penalised:stationarity",
                {"delta0": delta0},
                {
                    "base": sources["base"],
                    "model": sources["tasks"][task],
                    "base_curvature": sources["base_curvature"],
                    "curvature": sources["curvatures"][task],
                },
                (*SOURCES, "gradmatch.estimators.curvature"),
                1,
            )
        for name, spec in self.config.merges.items():
            settings = {**spec.model_dump(exclude={"choose"}), "delta0": delta0}
            inputs = dict(sources)
            tried = spec if spec.choose else spec.model_copy(update={"choose": {"alpha": (spec.alpha,)}})
            self.choices[seed, tuning, name] = choice_stage(  # its likelihood says which fine-tuning is best
                f"{title}/choose-{slug(name)}",
                tried,
                self.source,
                settings,
                sources,
                self.made.data,
                tasks,
            )
            if spec.choose:
                inputs["choice"] = self.choices[seed, tuning, name]
            self.merges[seed, tuning, name] = Stage(
                f"{title}/merge-{slug(name)}",
                "experiments.cell:merge_and_measure",
                {
                    **settings,
                    "domains": data.domains,
                    "examples": self.source.mismatch_examples,
                    "seed": seed,
                },
                {**inputs, "data": self.made.data, "gradients": {}},
                CODE,
                (data.test or 1000) * len(data.domains) / EVALUATED,
            )

    def _refine(self, seed: int, damping: float, sources: dict[str, Any]) -> Stage:
        refine = self.config.refine
        assert refine is not None
        return Stage(
            f"assumption/seed{seed}/refine-{damping:g}",
            "experiments.refining:refine_stage",
            {
                **refine.model_dump(exclude={"dampings"}),
                "damping": damping,
                "delta0": self.source.delta0,
                "seed": seed,
            },
            {**sources, "data": self.made.data},
            (*CODE, "gradmatch.refine", "gradmatch.estimators"),
            refine.steps * refine.examples * len(sources["tasks"]) / 8,
        )

    def all(self) -> list[Stage]:
        """Every stage: the plain fine-tunes of all seeds, then one seed's penalised ones after another's."""
        ordered = [
            ((False, seed), stage)
            for group in (self.references, self.refined)
            for (seed, _), stage in group.items()  # type: ignore[attr-defined]
        ]
        ordered += [
            ((tuning != PLAIN, seed), stage)
            for group in (self.merges, self.choices, self.stationarity)
            for (seed, tuning, _), stage in group.items()
        ]
        return [stage for _, stage in sorted(ordered, key=lambda item: item[0])]


def stages(config: Config) -> list[Stage]:
    """The merges, what Eq. 8 leaves, the refinements; fine-tunes and curvatures come with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record per merge, per fine-tune's stationarity, per refinement; stages that failed are left out."""
    cells = Cells(config)
    tasks = list(cells.source.data.tasks)
    found: list[Record] = []

    def add(kind: str, stage: Stage, file: str, **own: Any) -> None:
        if is_done(stage, store):
            content = result(stage, store, file)
            common = {"experiment": config.experiment, "name": config.name, "kind": kind, "tasks": tasks}
            content = {"metrics": content} if file == "metrics.json" else content
            found.append({**common, **own, **content, **origin(stage, store)})

    for (seed, tuning, name), stage in cells.merges.items():
        tried, choice = cells.choices[seed, tuning, name], {}
        if is_done(tried, store):
            choice = {"choice": result(tried, store, "choice.json")}
        add("merge", stage, "metrics.json", seed=seed, tuning=tuning, merge=name, **choice)
    for (seed, name), stage in cells.references.items():
        add("reference", stage, "metrics.json", seed=seed, merge=name)
    for (seed, tuning, task), stage in cells.stationarity.items():
        add("stationarity", stage, "stationarity.json", seed=seed, tuning=tuning, task=task)
    for (seed, damping), stage in cells.refined.items():
        add("refinement", stage, "refined.json", seed=seed, damping=damping)
    return found


def report(found: list[Record]) -> str:
    """A row per way of fine-tuning: what Eq. 8 leaves, and each merge on the tasks; then the refinements."""
    from experiments.report import format_table

    merges, left = of_kind(found, "merge"), of_kind(found, "stationarity")
    names = list(dict.fromkeys(record["merge"] for record in merges))
    rows = []
    for tuning in dict.fromkeys(record["tuning"] for record in merges):
        own = [record for record in left if record["tuning"] == tuning]
        row = [tuning if tuning == PLAIN else f"delta0 = {tuning}"]
        row.append(f"{fmean(record['relative'] for record in own):.2f}" if own else "")
        for name in names:
            cells = [record for record in merges if (record["tuning"], record["merge"]) == (tuning, name)]
            row.append(_mean(cells, accuracy) if cells else "")
        rows.append(row)
    best = [best_tunings(merges, name) for name in names]
    if all(best):
        rows.append(["chosen on validation data", "", *(_mean(cells, accuracy) for cells in best)])
    joint = of_kind(found, "reference")
    header = ["fine-tuning", "|g + H0 tau| / |g|", *(f"{name}: accuracy %, NLL" for name in names)]
    lines = [
        format_table(header, rows),
        "",
        "Means of the tasks over seeds; 0 in the second column is Eq. 8's condition.",
    ]
    for name, cells in zip(names, best, strict=True):
        if cells:
            lines.append(f"{name}: by validation loss, a seed each, {', '.join(c['tuning'] for c in cells)}.")
    if joint:
        lines.append(f"The joint model, trained without a penalty: {_mean(joint, accuracy)}.")
    for damping in dict.fromkeys(record["damping"] for record in of_kind(found, "refinement")):
        lines.append(
            _refinement([r for r in of_kind(found, "refinement") if r["damping"] == damping], damping)
        )
    return "\n".join(lines)


def best_tunings(merges: Sequence[Record], name: str) -> list[Record]:
    """One merge by each seed's best way of fine-tuning: the lowest negative log-likelihood on validation examples.

    None of them where a seed lacks a way that another has, or its validation loss.
    """
    own = [record for record in merges if record["merge"] == name and "choice" in record]
    seeds, tunings = (dict.fromkeys(record[key] for record in merges) for key in ("seed", "tuning"))
    if len(own) < len(seeds) * len(tunings):
        return []
    return [min((record for record in own if record["seed"] == seed), key=validation_loss) for seed in seeds]


def validation_loss(record: Record) -> float:
    """Macro average of the chosen option, nats."""
    return min(float(tried["nll"]) for tried in record["choice"]["tried"])


def accuracy(record: Record) -> tuple[float, float]:
    """Accuracy in per cent and NLL of a record, mean of the tasks."""
    metrics = [record["metrics"][task] for task in record["tasks"]]
    return 100 * fmean(part["accuracy"] for part in metrics), fmean(part["nll"] for part in metrics)


def _mean(cells: Sequence[Record], value: Callable[[Record], tuple[float, float]]) -> str:
    first, second = (fmean(numbers) for numbers in zip(*map(value, cells), strict=True))
    return f"{first:.1f}, {second:.3f}"


def _refinement(runs: Sequence[Record], damping: float) -> str:
    rises = sum(
        after > before
        for run in runs
        for before, after in zip(run["values"], run["values"][1:], strict=False)
    )
    falls = fmean(run["values"][-1] / run["values"][0] for run in runs)
    before, after = (
        100 * fmean(run[key]["macro"]["accuracy"] for run in runs) for key in ("before", "after")
    )
    losses = [fmean(run[key]["macro"]["nll"] for run in runs) for key in ("before", "after")]
    return (
        f"Refinement, damping {damping:g}: {rises} rises of the objective in {sum(len(run['sizes']) for run in runs)} steps of "
        f"{len(runs)} runs; it falls to {falls:.3f} of its first value; test accuracy {before:.1f} -> {after:.1f} %, "
        f"NLL {losses[0]:.3f} -> {losses[1]:.3f}"
    )
