"""The assumption behind Eq. 12: what closes the gap to the joint model, the penalty of Eq. 8 or the measured gradient?

And does refinement go on from the merge without raising the objective of Eq. 9?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import Field, field_validator

from experiments.config import Count, Strict, Weights, different
from experiments.pipeline import Stage, is_done, recorded, result
from experiments.records import Record, of_kind
from experiments.studies.cells import TRAINED, Cells, Sources, slug
from experiments.studies.classifiers import Config as Source
from experiments.studies.classifiers import Merge, check_values
from experiments.studies.sources import OnTexts

PLAIN = "plain"
REFINED = 8  # examples a second of a Newton step, as in `studies.cells`


class Refinement(Strict):
    """Newton steps from a merge by `method`, a run per damping."""

    method: str = "gradient_matching"
    examples: int = Field(default=128, gt=1)  # of each task
    steps: Count = 3
    dampings: Weights = Field(default=(0.0,), min_length=1)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        check_values(method, {})
        return method


class Config(OnTexts):
    """Keys of the config, beside those of the models that it uses: plain fine-tunes.

    delta0: the floors of H0 in the penalty; without any, nothing is fine-tuned with it.
    """

    experiment: Literal["assumption"]
    delta0: Weights = ()
    merges: dict[str, Merge] = Field(min_length=1)
    refine: Refinement | None = None

    @field_validator("delta0")
    @classmethod
    def _told_apart(cls, delta0: tuple[float, ...]) -> tuple[float, ...]:
        different([f"{value:g}" for value in delta0])  # as the records call them
        return delta0

    def _check(self, source: Source) -> None:
        methods = {f"merge {name!r}": spec.method for name, spec in self.merges.items()}
        self.check_rules(
            methods | ({"refine": self.refine.method} if self.refine else {}), len(source.data.tasks)
        )


class Stages:
    """The stages of one config, by (seed, how the tasks were fine-tuned, ...)."""

    def __init__(self, config: Config) -> None:
        self.config, self.source = config, config.source
        self.made = Cells(self.source)
        self.stationarity: dict[tuple[int, str, str], Stage] = {}
        self.merges: dict[tuple[int, str, str], Stage] = {}
        self.choices: dict[tuple[int, str, str], Stage] = {}
        self.refined: dict[tuple[int, float], Stage] = {}
        self.references: dict[int, Stage] = {}
        seeds = config.seeds or self.source.seeds
        for seed in seeds:
            sources = self.made.sources(seed, self.source.data.tasks)
            self._merged(seed, PLAIN, sources, self.source.delta0)
            for damping in config.refine.dampings if config.refine else ():
                self.refined[seed, damping] = self._refine(seed, damping, sources)
            self.references[seed] = self.made.evaluations[seed, "joint"]
        for seed in seeds:
            for delta0 in config.delta0:
                self._merged(seed, f"{delta0:g}", self._penalised(seed, delta0), delta0)

    def _penalised(self, seed: int, delta0: float) -> Sources:
        """The sources of a merge of fine-tunes with the penalty."""
        made, title = self.made, f"assumption/seed{seed}/delta0-{delta0:g}"
        base, h0 = made.trained[seed, "base"], made.curvatures[seed, "base"]
        tuned: dict[str, Stage] = {}
        for task in self.source.data.tasks:
            training = self.source.training_of(task)
            tuned[task] = made.stage(
                f"{title}/{task}",
                "penalised:finetune_penalised",
                {"domain": task, "delta0": delta0, "precision": self.source.precision, "seed": seed}
                | training.model_dump(exclude_none=True),
                2 + 1.2 * training.steps * training.batch_size / TRAINED,
                start=base,
                base_curvature=h0,
            )
        curvatures = {
            task: made.fisher(f"{title}/curvature-{task}", seed, task, tuned[task]) for task in tuned
        }
        return {"base": base, "base_curvature": h0, "tasks": tuned, "curvatures": curvatures}

    def _merged(self, seed: int, tuning: str, sources: Sources, delta0: float) -> None:
        title, made = f"assumption/seed{seed}/{tuning}", self.made
        for task, tuned in sources["tasks"].items():
            inputs = {"base": sources["base"], "model": tuned, "base_curvature": sources["base_curvature"]}
            inputs["curvature"] = sources["curvatures"][task]
            name, function = f"{title}/stationarity-{task}", "experiments.penalised:stationarity"
            self.stationarity[seed, tuning, task] = Stage(name, function, {"delta0": delta0}, inputs)
        for name, spec in self.config.merges.items():
            settings, inputs = {**spec.settings, "delta0": delta0}, dict(sources)
            tried = spec if spec.choose else spec.model_copy(update={"choose": {"alpha": (spec.alpha,)}})
            # Its likelihood says which fine-tuning is best.
            choice = made.choice(f"{title}/choose-{slug(name)}", tried, settings, sources)
            self.choices[seed, tuning, name] = choice
            if spec.choose:
                inputs["choice"] = choice
            name_, domains = f"{title}/merge-{slug(name)}", self.source.data.domains
            self.merges[seed, tuning, name] = made.measured(name_, seed, settings, inputs, domains)

    def _refine(self, seed: int, damping: float, sources: Sources) -> Stage:
        refine = self.config.refine
        assert refine is not None
        settings = {
            **refine.model_dump(exclude={"dampings"}),
            "damping": damping,
            "delta0": self.source.delta0,
        }
        title = f"assumption/seed{seed}/refine-{damping:g}"
        seconds = refine.steps * refine.examples * len(sources["tasks"]) / REFINED
        return self.made.stage(title, "refining:refine_stage", {**settings, "seed": seed}, seconds, **sources)

    def all(self) -> list[Stage]:
        """Every stage: the plain fine-tunes of all seeds, then one seed's penalised ones after another's."""
        first = [*self.references.values(), *self.refined.values()]
        tuned = {**self.merges, **{(*cell, "choice"): stage for cell, stage in self.choices.items()}}
        tuned |= {(*cell, "stationarity"): stage for cell, stage in self.stationarity.items()}
        ordered = sorted(tuned, key=lambda cell: (cell[1] != PLAIN, cell[0]))
        return [*first, *(tuned[cell] for cell in ordered)]


def stages(config: Config) -> list[Stage]:
    """The merges, what Eq. 8 leaves, the refinements; fine-tunes and curvatures come with them."""
    return Stages(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record per merge, per fine-tune's stationarity, per refinement; stages that failed are left out."""
    study = Stages(config)
    tasks = list(study.source.data.tasks)
    found: list[Record] = []
    for (seed, tuning, name), stage in study.merges.items():
        tried, own = (
            study.choices[seed, tuning, name],
            {"tasks": tasks, "seed": seed, "tuning": tuning, "merge": name},
        )
        if is_done(tried, store):
            own["choice"] = result(tried, store, "choice.json")
        found += recorded(stage, store, "merge", "metrics.json", under="metrics", **own)
    for seed, stage in study.references.items():
        own = {"tasks": tasks, "seed": seed, "merge": "joint"}
        found += recorded(stage, store, "reference", "metrics.json", under="metrics", **own)
    for (seed, tuning, task), stage in study.stationarity.items():
        own = {"tasks": tasks, "seed": seed, "tuning": tuning, "task": task}
        found += recorded(stage, store, "stationarity", "stationarity.json", **own)
    for (seed, damping), stage in study.refined.items():
        own = {"tasks": tasks, "seed": seed, "damping": damping}
        found += recorded(stage, store, "refinement", "refined.json", **own)
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
