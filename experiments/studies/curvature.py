"""Cheap curvature: what each estimate costs, how far it is from the exact GGN, and what it does to the merge (claim 9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from experiments import config as configs
from experiments.config import Seeds, Strict, Study
from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record, of_kind
from experiments.statistics import bootstrap_ratio, correct_less, documents_of, t_interval
from experiments.studies import sentiment
from experiments.studies.adding import CODE, check_source
from experiments.studies.sentiment_cells import EVALUATED, SOURCES, SQUARED, slug

Cell = tuple[int, str, str]  # seed, estimate, model


class Estimate(Strict):
    """One way to estimate curvature; see `experiments.estimates`. For ivon, `examples` / `batch_size` are its steps."""

    kind: Literal["fisher", "ggn", "empirical", "batch", "batch means", "adam", "ivon"] = "fisher"
    examples: int = Field(default=320, gt=1)
    samples: int = Field(default=1, gt=0)
    batch_size: int = Field(default=32, gt=0)


class Config(Study):
    """Keys of the config: `sentiment` is the config whose models and data are used (quick_models: its quick variant).

    Every estimate is compared with `reference` on the tasks of `reference_seeds`, and squared batch means with the squares of
    the same examples one by one; `full` is the estimate whose gain over task arithmetic counts as all of it.
    """

    experiment: Literal["curvature"]
    sentiment: Path
    quick_models: bool = False
    seeds: Seeds = ()  # of that config; empty: all of them
    estimates: dict[str, Estimate] = Field(min_length=1)
    full: str
    reference: Estimate
    reference_seeds: Seeds = (0,)

    @model_validator(mode="after")
    def _known(self) -> Config:
        check_source(self.sentiment, (*self.seeds, *self.reference_seeds), self.quick_models)
        if self.full not in self.estimates:
            raise ValueError(f"`full` is {self.full!r}, but the estimates are {', '.join(self.estimates)}")
        return self


class Cells:
    """The stages of one config: estimates, errors and biases by (seed, estimate, model), merges by (seed, estimate or TA)."""

    def __init__(self, config: Config) -> None:
        self.source = configs.load(config.sentiment, quick=config.quick_models)
        self.made = sentiment.Cells(self.source)
        self.seeds = config.seeds or self.source.seeds
        tasks = self.source.data.tasks
        self.estimates: dict[Cell, Stage] = {}
        self.errors: dict[Cell, Stage] = {}
        self.biases: dict[Cell, Stage] = {}
        self.merges: dict[tuple[int, str], Stage] = {}
        for seed in self.seeds:
            self._merge(seed, "TA", "task_arithmetic", self.made.sources(seed, tasks))
            for name, spec in config.estimates.items():
                for model in ("base", *tasks):
                    self.estimates[seed, name, model] = self._estimate(seed, name, model, spec)
                inputs = self.made.sources(seed, tasks) | {
                    "base_curvature": self.estimates[seed, name, "base"],
                    "curvatures": {task: self.estimates[seed, name, task] for task in tasks},
                }
                self._merge(seed, name, "gradient_matching", inputs)
                if spec.kind == "batch means":
                    single = Estimate(kind="empirical", examples=spec.examples)
                    for task in tasks:
                        one_by_one = self._estimate(seed, f"{name} one by one", task, single)
                        self.biases[seed, name, task] = self._error(
                            f"curvature/seed{seed}/bias-{slug(name)}-{task}",
                            self.estimates[seed, name, task],
                            one_by_one,
                        )
        for seed in (seed for seed in config.reference_seeds if seed in self.seeds):
            for task in tasks:
                reference = self._estimate(seed, "reference", task, config.reference)
                for name in config.estimates:
                    self.errors[seed, name, task] = self._error(
                        f"curvature/seed{seed}/error-{slug(name)}-{task}",
                        self.estimates[seed, name, task],
                        reference,
                    )

    def _error(self, title: str, estimate: Stage, reference: Stage) -> Stage:
        inputs = {"estimate": estimate, "reference": reference}
        return Stage(title, "experiments.estimates:compare_estimate", {}, inputs, seconds=1)

    def _estimate(self, seed: int, name: str, model: str, spec: Estimate) -> Stage:
        data = self.source.data
        training = self.source.base_training if model == "base" else self.source.task_training
        return Stage(
            f"curvature/seed{seed}/{slug(name)}-{model}",
            "experiments.estimates:estimate_stage",
            {
                "domain": data.base if model == "base" else model,
                "seed": seed,
                "trained_batch_size": training.batch_size,
                **spec.model_dump(),
            },
            {"data": self.made.data, "model": self.made.trained[seed, model]},
            (*SOURCES, "gradmatch.estimators"),
            1 if spec.kind == "adam" else 1 + spec.examples * spec.samples / SQUARED,
        )

    def _merge(self, seed: int, name: str, method: str, inputs: dict[str, Any]) -> None:
        data = self.source.data
        settings = {"method": method, "alpha": 1.0, "options": {}, "delta0": self.source.delta0}
        self.merges[seed, name] = Stage(
            f"curvature/seed{seed}/merge-{slug(name)}",
            "experiments.cell:merge_and_measure",
            {
                **settings,
                "domains": list(data.tasks),
                "examples": self.source.mismatch_examples,
                "seed": seed,
            },
            {**inputs, "data": self.made.data, "gradients": {}},
            CODE,
            (data.test or 1000) * len(data.tasks) / EVALUATED,
        )

    def all(self) -> list[Stage]:
        """Every stage."""
        return [*self.merges.values(), *self.errors.values(), *self.biases.values()]


def stages(config: Config) -> list[Stage]:
    """The merges and the errors; the estimates and the models come with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record per merge and seed (with the seconds of its estimates), per estimate's share of the gain, per error and bias."""
    cells = Cells(config)
    common = {"experiment": config.experiment, "name": config.name, "full": config.full}
    found: list[Record] = []
    for (seed, name), stage in cells.merges.items():
        if is_done(stage, store):
            found.append(
                common | {"kind": "merge", "seed": seed, "estimate": name, "metrics": result(stage, store, "metrics.json")}
                | ({"spec": config.estimates[name].model_dump()} if name in config.estimates else {})
                | {"estimate_seconds": _seconds(cells, seed, name, store)} | origin(stage, store)
            )  # fmt: skip
    found += [common | {"kind": "gain", **gain} for gain in _gains(config, cells, store)]
    for kind, stages_ in (("error", cells.errors), ("bias", cells.biases)):
        for (seed, name, task), stage in stages_.items():
            if is_done(stage, store):
                found.append(
                    common | {"kind": kind, "seed": seed, "estimate": name, "task": task, **result(stage, store, "error.json")}
                    | {"spec": config.estimates[name].model_dump()}
                    | ({"reference": config.reference.model_dump()} if kind == "error" else {}) | origin(stage, store)
                )  # fmt: skip
    return found


def _gains(config: Config, cells: Cells, store: Path) -> Iterator[dict[str, Any]]:
    """Per estimate, (accuracy - TA) / (accuracy of the full estimate - TA) over its seeds, with its bootstrap interval."""
    tasks = cells.source.data.tasks
    documents = documents_of(cells.made.data.folder(store), tasks)
    for name, spec in config.estimates.items():
        wanted = ("TA", config.full, name)
        seeds = [
            seed for seed in cells.seeds if all(is_done(cells.merges[seed, other], store) for other in wanted)
        ]
        if not seeds:
            continue
        base, full, own = (
            {seed: cells.merges[seed, other].folder(store) for seed in seeds} for other in wanted
        )
        gained, whole = correct_less(own, base, tasks), correct_less(full, base, tasks)
        kept, low, high = bootstrap_ratio(gained, whole, documents)
        if kept == kept:  # not NaN: the full estimate gains something
            yield {
                "estimate": name,
                "spec": spec.model_dump(),
                "seeds": seeds,
                "kept": kept,
                "low": low,
                "high": high,
            }


def _seconds(cells: Cells, seed: int, name: str, store: Path) -> float:
    """Seconds of all estimates of one merge, without loading models; 0 for task arithmetic."""
    own = [stage for (s, n, _), stage in cells.estimates.items() if (s, n) == (seed, name)]
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
