"""Cheap curvature: what each estimate costs, how far it is from the exact GGN, and what it does to the merge (claim 9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import Field

from experiments.config import Count, Seeds, Strict
from experiments.pipeline import Stage, is_done, recorded, result
from experiments.records import Record, of_kind
from experiments.statistics import bootstrap_ratio, t_interval
from experiments.studies.cells import SQUARED, Cells, Sources, slug
from experiments.studies.classifiers import Config as Source
from experiments.studies.sources import OnTexts, read_source

Cell = tuple[int, str, str]  # seed, estimate, model


class Estimate(Strict):
    """One way to estimate curvature; see `experiments.estimates`. For ivon, `examples` / `batch_size` are its steps."""

    kind: Literal["fisher", "ggn", "empirical", "batch", "batch means", "adam", "ivon"] = "fisher"
    examples: int = Field(default=320, gt=1)
    samples: Count = 1
    batch_size: Count = 32


class Config(OnTexts):
    """Keys of the config, beside those of the models that it uses.

    Every estimate is compared with `reference` on the tasks of `reference_seeds`, and squared batch means with the squares of
    the same examples one by one; `full` is the estimate whose gain over task arithmetic counts as all of it.
    """

    experiment: Literal["curvature"]
    estimates: dict[str, Estimate] = Field(min_length=1)
    full: str
    reference: Estimate
    reference_seeds: Seeds = (0,)

    def _check(self, source: Source) -> None:
        read_source(self.sentiment, self.reference_seeds, quick=self.quick_models, kinds=("sentiment",))
        if self.full not in self.estimates:
            raise ValueError(f"`full` is {self.full!r}, but the estimates are {', '.join(self.estimates)}")


class Stages:
    """The stages of one config: estimates, errors and biases by (seed, estimate, model), merges by (seed, estimate or TA)."""

    def __init__(self, config: Config) -> None:
        self.source = config.source
        self.made = Cells(self.source)
        self.seeds = config.seeds or self.source.seeds
        tasks = self.source.data.tasks
        self.estimates: dict[Cell, Stage] = {}
        self.errors: dict[Cell, Stage] = {}
        self.biases: dict[Cell, Stage] = {}
        self.merges: dict[tuple[int, str], Stage] = {}
        for seed in self.seeds:
            self._merge(seed, "TA", "task_arithmetic", self.made.sources(seed, tasks))
            for name, spec in config.estimates.items():
                own = {model: self._estimate(seed, name, model, spec) for model in ("base", *tasks)}
                self.estimates |= {(seed, name, model): stage for model, stage in own.items()}
                sources = self.made.sources(seed, tasks) | {
                    "base_curvature": own.pop("base"),
                    "curvatures": own,
                }
                self._merge(seed, name, "gradient_matching", sources)
                if spec.kind == "batch means":
                    single = Estimate(kind="empirical", examples=spec.examples)
                    for task in tasks:
                        one_by_one = self._estimate(seed, f"{name} one by one", task, single)
                        self._error("bias", self.biases, (seed, name, task), one_by_one)
        for seed in (seed for seed in config.reference_seeds if seed in self.seeds):
            for task in tasks:
                reference = self._estimate(seed, "reference", task, config.reference)
                for name in config.estimates:
                    self._error("error", self.errors, (seed, name, task), reference)

    def _error(self, kind: str, group: dict[Cell, Stage], cell: Cell, reference: Stage) -> None:
        seed, name, task = cell
        title, inputs = f"curvature/seed{seed}/{kind}-{slug(name)}-{task}", {"estimate": self.estimates[cell]}
        function = "experiments.estimates:compare_estimate"
        group[cell] = Stage(title, function, {}, {**inputs, "reference": reference})

    def _estimate(self, seed: int, name: str, model: str, spec: Estimate) -> Stage:
        source = self.source
        training = source.base_training if model == "base" else source.task_training
        settings = {"domain": source.data.base if model == "base" else model, "seed": seed}
        settings |= {"trained_batch_size": training.batch_size, **spec.model_dump()}
        seconds = 1 if spec.kind == "adam" else 1 + spec.examples * spec.samples / SQUARED
        title, tuned = f"curvature/seed{seed}/{slug(name)}-{model}", self.made.trained[seed, model]
        return self.made.stage(title, "estimates:estimate_stage", settings, seconds, model=tuned)

    def _merge(self, seed: int, name: str, method: str, sources: Sources) -> None:
        settings = {"method": method, "alpha": 1.0, "options": {}, "delta0": self.source.delta0}
        title, tasks = f"curvature/seed{seed}/merge-{slug(name)}", self.source.data.tasks
        self.merges[seed, name] = self.made.measured(title, seed, settings, sources, tasks)


def stages(config: Config) -> list[Stage]:
    """The merges, the errors and the biases; the estimates and the models come with them."""
    study = Stages(config)
    return [*study.merges.values(), *study.errors.values(), *study.biases.values()]


def records(config: Config, store: Path) -> list[Record]:
    """One record per merge and seed (with the seconds of its estimates), per estimate's share of the gain, per error and bias."""
    study = Stages(config)
    specs = {name: spec.model_dump() for name, spec in config.estimates.items()}
    found: list[Record] = []
    for (seed, name), stage in study.merges.items():
        own = {"full": config.full, "seed": seed, "estimate": name}
        own |= {"spec": specs[name]} if name in specs else {}
        for row in recorded(stage, store, "merge", "metrics.json", under="metrics", **own):
            found.append(row | {"estimate_seconds": _seconds(study, seed, name, store)})
    found += [{"kind": "gain", "full": config.full, **gain} for gain in _gains(config, study, store)]
    for kind, group in (("error", study.errors), ("bias", study.biases)):
        for (seed, name, task), stage in group.items():
            own = {"full": config.full, "seed": seed, "estimate": name, "task": task, "spec": specs[name]}
            own |= {"reference": config.reference.model_dump()} if kind == "error" else {}
            found += recorded(stage, store, kind, "error.json", **own)
    return found


def _gains(config: Config, study: Stages, store: Path) -> Iterator[Record]:
    """Per estimate, (accuracy - TA) / (accuracy of the full estimate - TA) over its seeds, with its bootstrap interval."""
    from experiments.comparing import correct_less, documents_of

    tasks = study.source.data.tasks
    documents = documents_of(study.made.data["test"].folder(store), tasks)
    for name, spec in config.estimates.items():
        wanted = ("TA", config.full, name)
        seeds = [s for s in study.seeds if all(is_done(study.merges[s, other], store) for other in wanted)]
        if not seeds:
            continue
        base, full, own = ({s: study.merges[s, other].folder(store) for s in seeds} for other in wanted)
        gained, whole = correct_less(own, base, tasks), correct_less(full, base, tasks)
        kept, low, high = bootstrap_ratio(gained, whole, documents)
        if kept == kept:  # not NaN: the full estimate gains something
            told = {"estimate": name, "spec": spec.model_dump(), "seeds": seeds}
            yield {**told, "kept": kept, "low": low, "high": high}


def _seconds(study: Stages, seed: int, name: str, store: Path) -> float:
    """Seconds of all estimates of one merge, without loading models; 0 for task arithmetic."""
    own = [stage for (s, n, _), stage in study.estimates.items() if (s, n) == (seed, name)]
    return sum(result(stage, store, "cost.json")["seconds"] for stage in own)


def report(found: list[Record]) -> str:
    """A row per estimate: error, cost, the merge's accuracy, and the share of the full gain that it keeps."""
    from experiments.report import format_table

    merges, wrong = of_kind(found, "merge"), of_kind(found, "error")
    rows = []
    for name in dict.fromkeys(record["estimate"] for record in merges):
        own = [record for record in wrong if record["estimate"] == name]
        values = [
            f"{fmean(record[key] for record in own):.2f}" if own else ""
            for key in ("relative_error", "log_correlation", "trace_ratio")
        ]
        mine = [record for record in merges if record["estimate"] == name]
        seconds = fmean(record["estimate_seconds"] for record in mine)
        gain = next((gain for gain in of_kind(found, "gain") if gain["estimate"] == name), None)
        share = (
            f"{100 * gain['kept']:.0f} ({100 * gain['low']:.0f} to {100 * gain['high']:.0f})" if gain else ""
        )
        accuracy = f"{100 * fmean(record['metrics']['macro']['accuracy'] for record in mine):.1f}"
        rows.append([name, *values, f"{seconds:.0f}", accuracy, share])
    header = ["estimate", "rel. error", "log corr.", "trace ratio", "seconds", "accuracy %", "gain kept %"]
    notes = [
        "gain kept: (accuracy - TA) / (accuracy of the full estimate - TA), over seeds and tasks, 95 % paired bootstrap interval;",
        "relative error, correlation of logarithms and ratio of traces against the reference, mean over its models.",
    ]
    bias = batch_bias(found)
    if bias:
        ratio, low, high, size, models = bias
        notes.append(
            f"squared batch means x B / squares one by one: trace ratio {ratio:.2f} (95 % interval {low:.2f} to {high:.2f}, {models} models), B = {size}"
        )
    return "\n".join([format_table(header, rows), "", *notes])


def batch_bias(found: Sequence[Record]) -> tuple[float, float, float, int, int] | None:
    """Squared batch means x B / the same examples' squares one by one, by their traces: 1 is the claimed 1/B.

    Mean over models with its 95 % interval (Student's t), B, and the number of models; None without records.
    """
    own = of_kind(found, "bias")
    if not own:
        return None
    size = own[0]["spec"]["batch_size"]
    ratios = [size * record["trace_ratio"] for record in own]
    mean, half = t_interval(ratios)
    return mean, mean - half, mean + half, size, len(ratios)
