"""Sanity tests of merging on task vectors: redundancy, orthogonality, analogies; on texts and on images."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field, model_validator

from experiments.config import Seeds, Strict, Study, nearest
from experiments.pipeline import Stage, is_done, origin, recorded, result
from experiments.records import Record, of_kind
from experiments.studies.cells import EVALUATED, Cells, slug
from experiments.studies.classifiers import Config as Source
from experiments.studies.sources import read_source

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

    @property
    def made(self) -> dict[str, Source]:
        """The configs whose models are used, checked."""
        kinds = ("sentiment", "vision")
        return {name: read_source(path, self.seeds, kinds=kinds) for name, path in self.sources.items()}

    @model_validator(mode="after")
    def _known(self) -> Config:
        made = self.made
        for name, spec in self.analogies.items():
            if spec.source not in made:
                raise ValueError(f"analogy {name!r}: no source {spec.source!r}{nearest(spec.source, made)}")
            source = made[spec.source]
            images = source.experiment == "vision"
            target = spec.target.removesuffix(PHOTOGRAPHS) if images else spec.target
            wanted = [("task", model, source.data.tasks) for model in (spec.a, spec.b, spec.c)]
            for what, asked, known in (*wanted, ("domain", target, source.data.domains)):
                if asked not in known:
                    raise ValueError(f"analogy {name!r}: no {what} {asked!r}{nearest(asked, known)}")
        return self


class Stages:
    """The stages of one config, by (source, seed, ...)."""

    def __init__(self, config: Config) -> None:
        self.cosines: dict[tuple[str, int], Stage] = {}
        self.curves: dict[tuple[str, int, str], Stage] = {}
        self.analogies: dict[tuple[str, int], Stage] = {}
        for name, source in config.made.items():
            made = Cells(source)
            seconds = made.tested / EVALUATED
            for seed in config.seeds or source.seeds:
                base, title = made.trained[seed, "base"], f"redundancy/{name}/seed{seed}"
                tasks = {task: made.trained[seed, task] for task in source.data.tasks}
                function, inputs = "experiments.redundancy:compare_vectors", {"base": base, "tasks": tasks}
                self.cosines[name, seed] = Stage(f"{title}/cosines", function, {}, inputs, seconds=5)
                for task, tuned in tasks.items():
                    self.curves[name, seed, task] = made.stage(
                        f"{title}/drop-{task}",
                        "redundancy:drop",
                        {"domain": task, "shares": list(config.shares), "seed": seed},
                        2 * len(config.shares) * seconds,
                        base=base,
                        model=tuned,
                    )
                for label, spec in config.analogies.items():
                    if spec.source == name:
                        self.analogies[label, seed] = made.stage(
                            f"{title}/analogy-{slug(label)}",
                            "redundancy:compare_analogy",
                            {"target": spec.target, "weights": list(config.weights)},
                            (4 + len(config.weights)) * seconds,
                            base=base,
                            **{part: tasks[getattr(spec, part)] for part in ("a", "b", "c")},
                        )


def stages(config: Config) -> list[Stage]:
    """Cosines, curves and analogies; the models they read come with them."""
    made = Stages(config)
    return [*made.cosines.values(), *made.curves.values(), *made.analogies.values()]


def records(config: Config, store: Path) -> list[Record]:
    """One record per matrix, per point of a curve, per analogy and seed; stages that failed are left out."""
    made = Stages(config)
    found: list[Record] = []
    for (source, seed), stage in made.cosines.items():
        found += recorded(stage, store, "cosines", "cosines.json", source=source, seed=seed)
    for (source, seed, task), stage in made.curves.items():
        if is_done(stage, store):
            own = {"kind": "redundancy", "source": source, "seed": seed, "task": task}
            points = result(stage, store, "curve.json")
            found += [{**own, **point, **origin(stage, store)} for point in points]
    for (label, seed), stage in made.analogies.items():
        own = {"analogy": label, "seed": seed, **config.analogies[label].model_dump()}
        found += recorded(stage, store, "analogy", "analogy.json", **own)
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
