"""Sanity tests of merging on task vectors: redundancy, orthogonality, analogies; on texts and on images."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from experiments import config as configs
from experiments.config import Seeds, Strict, Study
from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record, of_kind
from experiments.studies.sentiment_cells import EVALUATED, MERGING, SOURCES

CODE = ("gradmatch.measure.redundancy", "gradmatch.measure.similarity")
SCORING = {  # whether images -> what decides an accuracy
    False: (*SOURCES, "experiments.evaluate"),
    True: ("experiments.vision.models", "experiments.vision.packages", "experiments.vision.stages"),
}
PHOTOGRAPHS = " on photographs"


class Analogy(Strict):
    """c + weight (b - a), scored on `target`: a domain of the source, or for images also '<set> on photographs'."""

    source: str
    a: str
    b: str
    c: str
    target: str


class Config(Study):
    """Keys of the config: `sources` are the sentiment and vision configs whose models are used, by what they are called."""

    experiment: Literal["redundancy"]
    sources: dict[str, Path] = Field(min_length=1)
    seeds: Seeds = ()  # of those configs; empty: all of them
    shares: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
    analogies: dict[str, Analogy] = Field(default_factory=dict)
    weights: tuple[float, ...] = (0.3, 0.6, 1.0)

    @model_validator(mode="after")
    def _known(self) -> Config:
        made = {name: configs.load(path) for name, path in self.sources.items()}
        for name, source in made.items():
            if source.experiment not in ("sentiment", "vision"):
                raise ValueError(f"{self.sources[name]} is no config of the sentiment or vision experiment")
            absent = [seed for seed in self.seeds if seed not in source.seeds]
            if absent:
                seeds = ", ".join(map(str, source.seeds))
                raise ValueError(f"{self.sources[name]} has no seed {absent[0]}; it has {seeds}")
        for name, spec in self.analogies.items():
            if spec.source not in made:
                raise ValueError(
                    f"analogy {name!r}: no source {spec.source!r}{configs.nearest(spec.source, self.sources)}"
                )
            data = made[spec.source].data
            for model in (spec.a, spec.b, spec.c):
                if model not in data.tasks:
                    raise ValueError(
                        f"analogy {name!r}: no task {model!r}{configs.nearest(model, data.tasks)}"
                    )
            images = made[spec.source].experiment == "vision"
            if (spec.target.removesuffix(PHOTOGRAPHS) if images else spec.target) not in data.domains:
                raise ValueError(
                    f"analogy {name!r}: no domain {spec.target!r}{configs.nearest(spec.target, data.domains)}"
                )
        return self


class Cells:
    """The stages of one config, by (source, seed, ...)."""

    def __init__(self, config: Config) -> None:
        self.cosines: dict[tuple[str, int], Stage] = {}
        self.curves: dict[tuple[str, int, str], Stage] = {}
        self.analogies: dict[tuple[str, int], Stage] = {}
        for name, path in config.sources.items():
            source = configs.load(path)
            made = configs.study(source.experiment).Cells(source)
            images = source.experiment == "vision"
            for seed in config.seeds or source.seeds:
                base = made.trained[seed, "base"]
                tasks = {task: made.trained[seed, task] for task in source.data.tasks}
                seconds = (source.data.test or 1000) / EVALUATED
                title = f"redundancy/{name}/seed{seed}"
                self.cosines[name, seed] = Stage(
                    f"{title}/cosines",
                    "experiments.redundancy:compare_vectors",
                    {},
                    {"base": base, "tasks": tasks},
                    CODE,
                    5,
                )
                for task, tuned in tasks.items():
                    self.curves[name, seed, task] = Stage(
                        f"{title}/drop-{task}",
                        "experiments.redundancy:drop",
                        {"domain": task, "images": images, "shares": list(config.shares), "seed": seed},
                        {"base": base, "model": tuned, "data": made.data},
                        (*CODE, *SCORING[images]),
                        2 * len(config.shares) * seconds,
                    )
                for label, spec in config.analogies.items():
                    if spec.source == name:
                        models: dict[str, Any] = {
                            "a": tasks[spec.a],
                            "b": tasks[spec.b],
                            "c": tasks[spec.c],
                        }
                        self.analogies[label, seed] = Stage(
                            f"{title}/analogy-{''.join(c if c.isalnum() else '_' for c in label)}",
                            "experiments.redundancy:compare_analogy",
                            {"target": spec.target, "images": images, "weights": list(config.weights)},
                            {"base": base, **models, "data": made.data},
                            (*CODE, *SCORING[images], *MERGING, "gradmatch.subtraction"),
                            (4 + len(config.weights)) * seconds,
                        )

    def all(self) -> list[Stage]:
        """Every stage."""
        return [*self.cosines.values(), *self.curves.values(), *self.analogies.values()]


def stages(config: Config) -> list[Stage]:
    """Cosines, curves and analogies; the models they read come with them."""
    return Cells(config).all()


def records(config: Config, store: Path) -> list[Record]:
    """One record per matrix, per point of a curve, per analogy and seed; stages that failed are left out."""
    cells = Cells(config)
    found: list[Record] = []

    def add(kind: str, stage: Stage, content: dict[str, Any], **own: Any) -> None:
        common = {"experiment": config.experiment, "name": config.name, "kind": kind}
        found.append({**common, **own, **content, **origin(stage, store)})

    for (source, seed), stage in cells.cosines.items():
        if is_done(stage, store):
            add("cosines", stage, result(stage, store, "cosines.json"), source=source, seed=seed)
    for (source, seed, task), stage in cells.curves.items():
        if is_done(stage, store):
            for point in result(stage, store, "curve.json"):
                add("redundancy", stage, point, source=source, seed=seed, task=task)
    for (label, seed), stage in cells.analogies.items():
        if is_done(stage, store):
            spec = config.analogies[label].model_dump()
            add("analogy", stage, {**result(stage, store, "analogy.json"), **spec}, analogy=label, seed=seed)
    return found


def report(found: list[Record]) -> str:
    """Cosines, accuracy against the dropped share, and analogies; means over seeds."""
    from experiments.report import format_table

    parts = []
    matrices = of_kind(found, "cosines")
    for source in dict.fromkeys(record["source"] for record in matrices):
        own = [record for record in matrices if record["source"] == source]
        tasks = own[0]["tasks"]
        pairs = [(i, j) for i in range(len(tasks)) for j in range(i)]
        values = [fmean(record["cosines"][i][j] for record in own) for i, j in pairs]
        named = ", ".join(
            f"{tasks[j]}-{tasks[i]} {value:.2f}" for (i, j), value in zip(pairs, values, strict=True)
        )
        parts.append(f"{source}: cosines of task vectors ({len(own)} seeds): {named}")
    points = of_kind(found, "redundancy")
    shares = sorted({record["dropped"] for record in points})
    rows = []
    for source, task in dict.fromkeys((record["source"], record["task"]) for record in points):
        for kind in ("rescaled", "plain"):
            own = [record for record in points if (record["source"], record["task"]) == (source, task)]
            means = [100 * fmean(r[kind] for r in own if r["dropped"] == share) for share in shares]
            rows.append([f"{source}, {task}, {kind}", *(f"{mean:.1f}" for mean in means)])
    if rows:
        header = ["test accuracy in % at dropped share", *(f"{share:g}" for share in shares)]
        parts.append(format_table(header, rows))
    parts += [
        _analogy(found, label) for label in dict.fromkeys(r["analogy"] for r in of_kind(found, "analogy"))
    ]
    return "\n\n".join(parts)


def _analogy(found: list[Record], label: str) -> str:
    own = [record for record in of_kind(found, "analogy") if record["analogy"] == label]
    spec = own[0]
    alone = {name: 100 * fmean(record["alone"][name] for record in own) for name in own[0]["alone"]}
    points = [
        f"{point['weight']:g}: {100 * fmean(record['points'][i]['accuracy'] for record in own):.1f}"
        for i, point in enumerate(own[0]["points"])
    ]
    return (
        f"{label}: {spec['c']} + w ({spec['b']} - {spec['a']}) on {spec['target']} ({len(own)} seeds), test accuracy in %: "
        f"base {alone['base']:.1f}, {spec['c']} {alone['c']:.1f}, {spec['b']} {alone['b']:.1f}, {spec['a']} {alone['a']:.1f}; "
        f"w = " + ", ".join(points)
    )
