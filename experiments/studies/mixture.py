"""Mixtures against merges (Model-GLUE's questions): levels, routers and sizes on the fine-tunes of a texts or images config; claims 20 to 22."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from experiments.config import Seeds, Strict, Study, nearest
from experiments.pipeline import Stage, is_done, origin, recorded, result
from experiments.records import Record, of_kind
from experiments.studies.cells import EVALUATED, TRAINED, Cells, slug
from experiments.studies.classifiers import Config as Source
from experiments.studies.sources import read_source
from experiments.verdicts import FEWEST_SEEDS, HOLDS, NOT_SHOWN, REFUTED, Part, Row, as_records

KEPT, SIZE = 0.98, 1.3  # claim 21
EXPERTS = "experts"  # each task by its own fine-tune, an oracle's choice


class Mixture(Strict):
    """One mixture: arguments of `gradmatch.mixture.mix`, and how its router comes about.

    prompts: training examples a task that the router is made of; steps: of its training; near: the experts moved so close to their
    mean, so that they are near-identical.
    """

    level: Literal["ffn", "block", "model"]
    routing: Literal["token", "sample"] = "sample"
    router: Literal["linear", "mlp", "spectral"] = "linear"
    top_k: int = Field(default=1, ge=1)
    dense_layers: int = Field(default=0, ge=0)
    rank: int | None = None
    gate_rank: int = 8
    prompts: int = Field(default=0, ge=0)
    steps: int = Field(default=0, ge=0)
    near: float | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `mix`."""
        return self.model_dump(exclude={"prompts", "steps", "near"}, exclude_none=True)


class Config(Study):
    """Keys of the config: `models` is the sentiment or vision config whose models are used (quick_models: of its quick variant)."""

    experiment: Literal["mixture"]
    models: Path
    quick_models: bool = False
    seeds: Seeds = ()  # of that config; empty: all of them
    mixtures: dict[str, Mixture] = Field(min_length=1)
    merges: tuple[str, ...] = Field(min_length=1)  # of that config, to compare with
    compare: tuple[tuple[str, str], ...] = ()  # mixture, and mixture or merge
    levels: tuple[tuple[str, str], ...] = ()  # claim 20: at the model level, at the ffn level
    small: tuple[str, ...] = ()  # claim 21: low-rank mixtures
    whole: tuple[str, ...] = ()  # claim 22: mixtures of domain experts that are compared with the best merge
    alike: tuple[str, ...] = ()  # claim 22: the same of near-identical ones

    @property
    def source(self) -> Source:
        """The config whose models are used, checked."""
        return read_source(self.models, self.seeds, quick=self.quick_models, kinds=("sentiment", "vision"))

    @model_validator(mode="after")
    def _known(self) -> Config:
        source = self.source
        for name in self.merges:
            if name not in source.merges:
                raise ValueError(
                    f"`merges` names {name!r}{nearest(name, source.merges)}; {self.models} has {', '.join(source.merges)}"
                )
        known = [*self.mixtures, *self.merges]
        for name in [
            *(one for pair in (*self.compare, *self.levels) for one in pair),
            *self.small,
            *self.whole,
            *self.alike,
        ]:
            if name not in known:
                raise ValueError(
                    f"no mixture or merge {name!r}{nearest(name, known)}; there are {', '.join(known)}"
                )
        return self


def pairs_of(config: Config) -> list[tuple[str, str]]:
    """All that is compared, each once."""
    best = [(name, merge) for name in (*config.whole, *config.alike) for merge in config.merges]
    return list(dict.fromkeys([*config.compare, *config.levels, *best]))


class Made:
    """The stages of a config, by what they are of."""

    def __init__(self, config: Config) -> None:
        source = self.source = config.source
        self.cells, self.config = Cells(source), config
        self.seeds, self.tasks = config.seeds or source.seeds, list(source.data.tasks)
        self.measured: dict[tuple[int, str], Stage] = {}
        for seed in self.seeds:
            for name, spec in config.mixtures.items():
                self.measured[seed, name] = self._mixed(seed, name, spec)
        self.whole = {  # metrics on the tasks of single models and merges are those of the source's own evaluations
            (seed, name): self.cells.evaluations[seed, name]
            for seed in self.seeds
            for name in ("base", *self.tasks, *config.merges)
        }
        self.comparisons = {pair: self._compare(pair) for pair in pairs_of(config)}

    def _mixed(self, seed: int, name: str, spec: Mixture) -> Stage:
        cells, tasks = self.cells, self.tasks
        settings = {
            "mixture": spec.arguments,
            "prompts": spec.prompts,
            "steps": spec.steps,
            "near": spec.near,
            "seed": seed,
        }
        rows = cells.tested * len(tasks) * 2 + 3 * 48 * spec.steps * TRAINED / EVALUATED
        inputs = {
            "data": {split: cells.data[split] for split in ("train", "test")},
            "base": cells.trained[seed, "base"],
            "tasks": {task: cells.trained[seed, task] for task in tasks},
        }
        title = f"mixture/{self.source.experiment}/seed{seed}/{slug(name)}"
        return Stage(title, "experiments.mixing:mix_and_measure", settings, inputs, 5 + rows / EVALUATED)

    def _compare(self, pair: tuple[str, str]) -> Stage:
        sides = {
            side: {
                str(seed): self.measured.get((seed, name)) or self.whole[seed, name] for seed in self.seeds
            }
            for side, name in zip(("ours", "theirs"), pair, strict=True)
        }
        name = "-".join([f"mixture/{self.source.experiment}/compare", *map(slug, pair)])
        inputs = {"data": {"test": self.cells.data["test"]}, **sides}
        return Stage(name, "experiments.comparing:compare", {"domains": self.tasks}, inputs, 1)


def stages(config: Config) -> list[Stage]:
    """One a seed and mixture, the evaluations and comparisons; the models come with them."""
    made = Made(config)
    return [*made.whole.values(), *made.measured.values(), *made.comparisons.values()]


def records(config: Config, store: Path) -> list[Record]:
    """One record a model or mixture and seed, one a comparison, and the verdicts; stages that failed are left out."""
    made, found = Made(config), []
    tasks = made.tasks
    for (seed, name), stage in made.whole.items():
        for row in recorded(stage, store, "model", "metrics.json", under="metrics", seed=seed, model=name):
            found.append({**row, "metrics": _on(row["metrics"], tasks), "whole": len(tasks)})
    for seed in made.seeds:
        own = {row["model"]: row for row in found if row["seed"] == seed}
        if set(tasks) <= set(own):
            each = {task: own[task]["metrics"][task] for task in tasks}
            found.append(
                {
                    "kind": "model",
                    "seed": seed,
                    "model": EXPERTS,
                    "metrics": _on(each, tasks),
                    **origin_of(made, seed, store),
                }
            )
    for (seed, name), stage in made.measured.items():
        spec = config.mixtures[name].model_dump()
        for row in recorded(
            stage, store, "mixture", "metrics.json", under="metrics", seed=seed, model=name, mixture=spec
        ):
            found.append({**row, **result(stage, store, "mixture.json")})
    for (ours, theirs), stage in made.comparisons.items():
        found += recorded(stage, store, "comparison", "comparison.json", ours=ours, theirs=theirs)
    return [*found, *as_records(verdicts_of(config, found))]


def origin_of(made: Made, seed: int, store: Path) -> dict[str, Any]:
    """Where an oracle's numbers come from: the evaluation of the first task's model."""
    stage = made.whole[seed, made.tasks[0]]
    return origin(stage, store) if is_done(stage, store) else {}


def _on(metrics: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Metrics of the tasks, and their mean."""
    found = {task: metrics[task] for task in tasks}
    names = ("accuracy", "nll", "ece")
    return {**found, "macro": {name: sum(found[task][name] for task in tasks) / len(tasks) for name in names}}


def verdicts_of(config: Config, found: Sequence[Record]) -> list[Row]:
    """Claims 20, 21 and 22, each part with its threshold."""
    compared = {(row["ours"], row["theirs"]): row for row in of_kind(found, "comparison")}
    mean = means(found)
    rows: list[Row] = []
    for ours, theirs in config.levels:
        claim = Part(
            20,
            f"{ours} - {theirs}",
            "model level, by sample, is at least the ffn level on domain experts",
            ">= 0, interval",
            "mixture",
        )
        rows.append(_against(claim, compared.get((ours, theirs)), at_least=True))
    for name in config.small:
        claim = Part(
            21,
            name,
            "a low-rank mixture without a router's data keeps the experts' accuracy",
            f">= {KEPT:.0%} at <= {SIZE} x",
            "mixture",
        )
        own = [row for row in of_kind(found, "mixture") if row["model"] == name]
        oracle = {
            row["seed"]: row["metrics"]["macro"]["accuracy"]
            for row in of_kind(found, "model")
            if row["model"] == EXPERTS
        }
        shares = [
            row["metrics"]["macro"]["accuracy"] / oracle[row["seed"]] for row in own if row["seed"] in oracle
        ]
        if not shares:
            rows.append(claim.missing())
            continue
        size = max(row["weights"]["output"] / row["weights"]["base"] for row in own)
        share = sum(shares) / len(shares)
        good = min(shares) >= KEPT and size <= SIZE
        verdict = (
            HOLDS
            if good and len(shares) >= FEWEST_SEEDS
            else REFUTED
            if max(shares) < KEPT or size > SIZE
            else NOT_SHOWN
        )
        rows.append(
            claim.row(
                f"{share:.1%} at {size:.2f} x",
                f"seeds {min(shares):.1%} to {max(shares):.1%}",
                len(shares),
                verdict,
            )
        )
    known = [name for name in config.merges if name in mean]
    best = max(known, key=lambda name: mean[name]["accuracy"]) if known else ""
    for names, which, beats in (
        (config.whole, "domain experts", True),
        (config.alike, "near-identical experts", False),
    ):
        for name in names:
            said = "beats" if beats else "does not beat"
            claim = Part(
                22,
                name,
                f"mixing whole models {said} the best merge of {which} ({best})",
                "interval above 0" if beats else "interval not above 0",
                "mixture",
            )
            rows.append(_against(claim, compared.get((name, best)), beats=beats))
    return rows


def _against(claim: Part, found: Record | None, *, at_least: bool = False, beats: bool = True) -> Row:
    """A comparison as a verdict: above 0 (`beats`), not above 0, or not below 0 (`at_least`)."""
    if found is None:
        return claim.missing()
    value, low, high = (100 * found[key] for key in ("difference", "low", "high"))
    enough = found["seeds"] >= FEWEST_SEEDS
    if at_least:
        verdict = REFUTED if high < 0 else HOLDS if low >= 0 and enough else NOT_SHOWN
    elif beats:
        verdict = REFUTED if high <= 0 else HOLDS if low > 0 and enough else NOT_SHOWN
    else:
        verdict = REFUTED if low > 0 else HOLDS if enough else NOT_SHOWN
    return claim.row(f"{value:+.1f} points", f"{low:+.1f} to {high:+.1f}", found["seeds"], verdict)


def means(found: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Model or mixture -> accuracy and nll over the tasks, mean over seeds; of mixtures size, and time against the base's."""
    groups: dict[str, list[Record]] = {}
    for row in found:
        if row["kind"] in ("model", "mixture"):
            groups.setdefault(row["model"], []).append(row)
    told = {}
    for name, rows in groups.items():
        told[name] = {
            key: sum(row["metrics"]["macro"][key] for row in rows) / len(rows) for key in ("accuracy", "nll")
        }
        if "weights" in rows[0]:
            told[name]["size"] = sum(row["weights"]["output"] / row["weights"]["base"] for row in rows) / len(
                rows
            )
            told[name]["active"] = sum(
                row["weights"]["active"] / row["weights"]["base"] for row in rows
            ) / len(rows)
            told[name]["time"] = sum(row["seconds"] / row["seconds_of_base"] for row in rows) / len(rows)
    return told


def report(found: list[Record]) -> str:
    """Table of models and mixtures with size and time, comparisons, and the verdicts."""
    from experiments.report import format_table
    from experiments.verdicts import COLUMNS, cells

    rows = []
    for name, told in means(found).items():
        more = [
            f"{told[key]:.2f}" if key in told else "1.00" if key != "time" else ""
            for key in ("size", "active", "time")
        ]
        rows.append([name, f"{100 * told['accuracy']:.1f}", f"{told['nll']:.3f}", *more])
    lines = [format_table(["model", "accuracy %", "nll", "size", "active", "time"], rows), ""]
    for row in of_kind(found, "comparison"):
        value, low, high = (100 * row[key] for key in ("difference", "low", "high"))
        lines.append(
            f"{row['ours']} - {row['theirs']}: {value:+.1f} points ({low:+.1f} to {high:+.1f}; {row['seeds']} seeds)"
        )
    judged = of_kind(found, "verdict")
    if judged:
        lines += ["", format_table(list(COLUMNS), [cells(row) for row in judged])]
    return "\n".join(lines)
