"""Proof of removal where retraining without the data is the truth: ridge, logistic regression, two networks.

In each, some training examples carry wrong labels. The base was trained on everything, the task is fine-tuned from the base
on the wrong ones, and what each way to remove them leaves is compared with a model that never saw them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from experiments.config import Count, Seeds, Strict, Study, Training, different
from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record, of_kind
from experiments.statistics import t_interval
from experiments.studies.cells import SQUARED, TRAINED
from experiments.studies.classifiers import local_model, views_of
from experiments.studies.sentiment import texts_stage
from experiments.tasks.sentiment import VADER_FILES
from experiments.tasks.splits import SPLITS

VALIDATED = 50  # validation texts of the encoder's domains: nothing is chosen on them
METRICS = ("distance", "kl", "removed", "accuracy", "gap")


class Network(Strict):
    """The small network on digits: steps of training and of fine-tuning, its learning rate."""

    steps: Count = 600
    tuning_steps: Count = 20
    learning_rate: float = Field(default=1e-3, gt=0)


class Encoder(Strict):
    """An encoder on sentiment; the texts of one domain, labels turned round, are what is to go."""

    encoder: str = "encoder"  # an asset, a folder, or a hub name
    source: str = "vader"  # or a folder with one `<domain>.jsonl` of text, label, document
    keep: tuple[str, ...] = Field(default=("movies", "amazon"), min_length=1)
    remove: str = "tweets"
    wrong: Count = 600  # texts with wrong labels, of the domain's training texts
    max_length: int = Field(default=48, gt=2)
    test: Count = 300
    training: Training
    tuning: Training
    examples: int = Field(default=300, gt=1)

    @model_validator(mode="after")
    def _known(self) -> Encoder:
        domains = different((*self.keep, self.remove))
        unknown = [domain for domain in domains if domain not in VADER_FILES]
        if self.source == "vader" and unknown:
            raise ValueError(f"vader has no domain {unknown[0]!r}; it has {', '.join(VADER_FILES)}")
        return self


class Config(Study):
    """Keys of a proof's config."""

    experiment: Literal["removal-proof"]
    seeds: Seeds = Field(default=(0, 1, 2), min_length=1)
    alphas: Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(different)] = Field(
        default=(0.25, 0.5, 1.0), min_length=1
    )
    network: Network = Network()
    encoder: Encoder | None = None


def stages(config: Config) -> list[Stage]:
    """What has to run for the records of this config; what they need comes with them."""
    return list(cells(config).values())


def cells(config: Config) -> dict[tuple[str, int], Stage]:
    """(problem, seed) -> the stage that measures it."""
    made: dict[tuple[str, int], Stage] = {}
    alphas = list(config.alphas)
    toys: dict[str, dict[str, Any]] = {"ridge": {}, "logistic": {"alphas": alphas}}
    toys["network"] = {"alphas": alphas, **config.network.model_dump()}
    for seed in config.seeds:
        for problem, settings in toys.items():
            name, function = f"proof/seed{seed}/{problem}", f"experiments.removal.proof:{problem}"
            made[problem, seed] = Stage(name, function, {"seed": seed, **settings}, seconds=5)
        if config.encoder:
            made["encoder", seed] = _encoder(config.encoder, seed, alphas)
    return made


def _encoder(spec: Encoder, seed: int, alphas: list[float]) -> Stage:
    """The stages of the encoder: data, base, retrained, task, fine-tuned on the rest, two curvatures, what each edit did."""
    keep, everything, title = list(spec.keep), [*spec.keep, spec.remove], f"proof/seed{seed}"
    encoder = local_model(spec.encoder)
    own = spec.source != "vader"
    corpora = {name: {"path": f"{spec.source}/{name}.jsonl" if own else "vader"} for name in everything}
    sizes = {name: {"validation": VALIDATED, "test": spec.test} for name in everything}
    clean = views_of(
        texts_stage("proof/data", corpora, spec.encoder, spec.max_length), dict.fromkeys(SPLITS, sizes), 0
    )
    wrong, function = {"domain": spec.remove, "count": spec.wrong}, "experiments.removal.encoder:poison"
    data = Stage("proof/poisoned", function, wrong, {"data": clean}, seconds=2)

    def trained(name: str, domains: Sequence[str], training: Training, **start: Stage) -> Stage:
        new = {} if start else {"start": spec.encoder}
        settings = {
            "domains": list(domains),
            "precision": "auto",
            "seed": seed,
            **training.model_dump(exclude_none=True),
            **new,
        }
        seconds = 2 + training.steps * training.batch_size / TRAINED
        function, inputs = "experiments.finetune:finetune", {"data": data, **start}
        return Stage(f"{title}/{name}", function, settings, inputs, seconds, () if start else encoder)

    def curvature(name: str, domains: Sequence[str]) -> Stage:
        settings = {"domains": list(domains), "seed": seed, "examples": spec.examples}
        function, inputs = "experiments.removal.encoder:curvature", {"data": data, "model": models[name]}
        return Stage(f"{title}/curvature-{name}", function, settings, inputs, spec.examples / SQUARED)

    base = trained("base", everything, spec.training)
    models = {
        "base": base,
        "retrained": trained("retrained", keep, spec.training),
        "task": trained("task", [spec.remove], spec.tuning, start=base),
        "rest": trained("rest", keep, spec.tuning, start=base),
    }
    curvatures = {
        "base_curvature": curvature("base", everything),
        "task_curvature": curvature("task", [spec.remove]),
    }
    settings = {"keep": keep, "remove": spec.remove, "alphas": alphas}
    function, inputs = "experiments.removal.encoder:compare", {"data": data, **models, **curvatures}
    return Stage(f"{title}/encoder", function, settings, inputs, (4 * len(alphas) + 3) * 5)


def records(config: Config, store: Path) -> list[Record]:
    """One record an edit, problem and seed; stages that failed are left out."""
    return [
        {"kind": "proof", "problem": problem, "seed": seed, **row, **origin(stage, store)}
        for (problem, seed), stage in cells(config).items()
        if is_done(stage, store)
        for row in result(stage, store, "rows.json")
    ]


def report(found: list[Record]) -> str:
    """A table a problem: mean over seeds and half the width of its 95 % interval (Student's t), then claim 8 (a) and (b)."""
    rows = of_kind(found, "proof")
    parts = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == problem]
        metrics = [name for name in METRICS if name in mine[0]]
        lines = [f"{problem} ({len({row['seed'] for row in mine})} seeds)"]
        lines.append(f"{'edit':24} {'alpha':>5}" + "".join(f" {name:>19}" for name in metrics))
        for edit, alpha in dict.fromkeys((row["edit"], row["alpha"]) for row in mine):
            same = [row for row in mine if (row["edit"], row["alpha"]) == (edit, alpha)]
            cells_ = [_cell([row[name] for row in same]) for name in metrics]
            lines.append(f"{edit:24} {alpha or '':>5}" + "".join(f" {cell:>19}" for cell in cells_))
        parts.append("\n".join(lines))
        parts += _verdicts(problem, mine)
    return "\n\n".join(parts)


def _verdicts(problem: str, rows: Sequence[Record]) -> Iterator[str]:
    """Differences between gradient matching and negation at alpha = 1, paired by seed."""
    for ours in ("GM, full H", "GM"):
        for metric in ("distance", "kl"):
            pairs = [
                (row[metric], other[metric])
                for row in rows
                for other in rows
                if metric in row
                and row["seed"] == other["seed"]
                and (row["edit"], row["alpha"]) == (ours, 1.0)
                and (other["edit"], other["alpha"]) == ("TA", 1.0)
            ]
            if pairs:
                mean, half = t_interval([a - b for a, b in pairs])
                judged = (
                    "nearer" if mean + half < 0 else "farther" if mean - half > 0 else "no difference shown"
                )
                yield f"{problem}: {metric} of {ours} less that of TA, at alpha = 1: {mean:+.4g} +- {half:.2g} ({judged})"


def _cell(values: Sequence[Any]) -> str:
    mean, half = t_interval([float(value) for value in values])
    return f"{mean:.3g} +- {half:.2g}"
