"""Alignment: exactness on real models, barriers between networks from scratch (claim 23), disjoint classes (claim 24)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import Field

from experiments.config import Study
from experiments.pipeline import Stage, recorded
from experiments.records import Record, of_kind
from experiments.statistics import t_interval

FUNCTION, WEIGHTS = 1e-5, 1e-4  # of exactness
SHARE, NATS = 0.3, 0.05  # claim 23
CLAIM_24 = [
    ("weights", "unaligned"),
    ("activations", "unaligned"),
    ("zipped, first layer", "unaligned"),
    ("zipped, first layer", "weights"),
    ("zipped, first layer", "activations"),
]
NETWORKS = {"mlp": (10, 40.0), "resnet": (6, 120.0), "vit": (12, 300.0)}  # epochs, seconds
MODELS = {"minilm": 30.0, "dinov2": 40.0, "smollm2": 120.0, "resnet": 2.0}  # seconds a trial

Network = Literal["mlp", "resnet", "vit"]
Model = Literal["minilm", "dinov2", "smollm2", "resnet"]


class Config(Study):
    """Keys of an alignment config."""

    experiment: Literal["rebasin"]
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    networks: list[Network] = Field(default=["mlp", "resnet", "vit"])
    disjoint: list[Network] = Field(default=["mlp"])
    trials: dict[Model, int] = Field(default={"minilm": 9, "resnet": 18, "dinov2": 2, "smollm2": 1})
    points: int = Field(default=11, gt=1)


def stages(config: Config) -> list[Stage]:
    """Exactness by model; barriers and disjoint classes by network and seed."""
    found = [
        Stage(
            f"rebasin/exactness-{model}",
            "experiments.rebasin:exactness",
            {"model": model, "trials": count},
            seconds=MODELS[model] * count,
        )
        for model, count in config.trials.items()
    ]
    for seed in config.seeds:
        for kind in config.networks:
            epochs, seconds = NETWORKS[kind]
            settings = {"kind": kind, "seed": seed, "epochs": epochs, "points": config.points}
            found.append(
                Stage(
                    f"rebasin/barriers-{kind}-{seed}",
                    "experiments.rebasin:barriers",
                    settings,
                    seconds=seconds,
                )
            )
        for kind in config.disjoint:
            settings = {"kind": kind, "seed": seed, "epochs": NETWORKS[kind][0]}
            found.append(
                Stage(
                    f"rebasin/disjoint-{kind}-{seed}", "experiments.rebasin:disjoint", settings, seconds=20.0
                )
            )
    return found


def records(config: Config, store: Path) -> list[Record]:
    """One record a stage; stages that failed are left out."""
    found: list[Record] = []
    for stage in stages(config):
        kind = stage.function.partition(":")[2]
        own = {key: value for key, value in stage.settings.items() if key in ("model", "kind", "seed")}
        own["network"] = own.pop("kind", "")
        found += recorded(stage, store, kind, "result.json", **{k: v for k, v in own.items() if v != ""})
    return found


def report(found: list[Record]) -> str:
    """Tables, with the verdicts on the claims; the unaligned average stands beside every aligned one."""
    lines = ["exactness: scrambled by a random member, aligned back"]
    good = total = 0
    for record in of_kind(found, "exactness"):
        trials = record["trials"]
        kept = [
            t["function"] <= FUNCTION and t["weights"] <= WEIGHTS and t["merge"] <= WEIGHTS for t in trials
        ]
        good, total = good + sum(kept), total + len(kept)
        worst = {key: max(t[key] for t in trials) for key in ("function", "weights", "merge")}
        seconds = fmean(t["seconds"] for t in trials)
        lines.append(
            f"  {record['model']}: {sum(kept)} of {len(kept)}; function {worst['function']:.1e}, weights {worst['weights']:.1e}, "
            f"merge {worst['merge']:.1e}; {seconds:.1f} s a matching"
        )
    lines.append(f"  in all {good} of {total}")
    heights: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in of_kind(found, "barriers"):
        for name, known in record["barriers"].items():
            heights[record["network"]][name].append(known["height"])
    lines.append("barrier of the straight line, nats per test example, mean (by seed)")
    for network, by_method in heights.items():
        for name, values in by_method.items():
            lines.append(f"  {network} {name}: {fmean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})")
        share = fmean(by_method["weights"]) / max(fmean(by_method["unaligned"]), 1e-30)
        learned = fmean(by_method["learned"])
        held = "holds" if share <= SHARE and learned <= NATS else "DOES NOT HOLD"
        lines.append(
            f"  claim 23, {network}: {held}: weights {100 * share:.0f} % of unaligned (<= 30), learned {learned:.3f} (<= .05)"
        )
    fisher = [record["fisher"] for record in of_kind(found, "barriers")]
    if fisher:
        lines.append(
            f"Fisher of the aligned view against the aligned Fisher: largest difference {max(fisher):.1e} of the largest entry"
        )
    gains: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in of_kind(found, "disjoint"):
        for name, value in record["accuracy"].items():
            gains[record["network"]][name].append(100 * value)
    for network, by_name in gains.items():
        lines.append(f"disjoint classes, {network}: accuracy over ten classes, %")
        lines += [
            f"  {name}: {fmean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"
            for name, values in by_name.items()
        ]
        for name, beside in CLAIM_24:
            gap = [a - b for a, b in zip(by_name[name], by_name[beside], strict=True)]
            mean, half = t_interval(gap)
            held = "holds" if mean - half > 0 else "DOES NOT HOLD"
            lines.append(
                f"  claim 24, {name} - {beside}: {mean:+.1f} points ({mean - half:+.1f} to {mean + half:+.1f}): {held}"
            )
    return "\n".join(lines)
