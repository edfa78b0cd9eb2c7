"""The same faults on real fine-tunes of an encoder, as far as they need no new training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.diagnosis.cases import HEALTHY, Arguments, Case
from experiments.diagnosis.confusion import diagnose_case
from experiments.diagnosis.loading import Run, examples, load_run
from gradmatch import Task, merge
from gradmatch.estimators import Curvature, estimate

FIRST = "first"  # stands for the name of a world's first task


@dataclass(frozen=True)
class Encoders(Run):
    """A sentiment run with validation batches, and a few training examples, by domain."""

    data: dict[str, list[dict[str, torch.Tensor]]]
    train: dict[str, list[dict[str, torch.Tensor]]]

    @property
    def first(self) -> str:
        """The task that faults are built into."""
        return next(iter(self.tasks))


def diagnose_encoder(
    out: Path,
    *,
    data: Path,
    base: Path,
    tasks: Mapping[str, Path],
    base_curvature: Path,
    curvatures: Mapping[str, Path],
    count: int,
    seed: int,
) -> None:
    """Build each case from the fine-tunes of a sentiment run, diagnose it, and write `out/cases.json`."""
    run = load_run(base, tasks, base_curvature, curvatures)
    encoders = Encoders(
        **vars(run),
        data={task: examples(data, task, "validation", count, seed) for task in tasks},
        train={task: examples(data, task, "train", 4, seed) for task in tasks},
    )
    rows = [
        diagnose_case(name, replace(case, subject=case.subject and encoders.first), encoders)
        | {"variant": False}
        for name, case in CASES.items()
    ]
    (out / "cases.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def merged_by(
    world: Encoders, method: str, weights: Mapping[str, float] | float = 1.0, **options: Any
) -> Arguments:
    tasks = [
        Task(theta, world.curvatures[t], weights if isinstance(weights, float) else weights[t], t)
        for t, theta in world.tasks.items()
    ]
    told = {"base_curvature": world.curvatures["base"], **options}
    merged = merge(world.base, tasks, method=method, allow_mismatch=True, missing_curvature="zero", **told)
    return {
        "base": world.base,
        "tasks": tasks,
        "merged": dict(merged),
        "method": method,
        "module": world.module,
        "data": world.data,
        "thorough": False,
        "forecast": False,
        "mismatch": False,  # a third of the time, and no cause rests on it
        **told,
    }


def changed(world: Encoders, theta: Mapping[str, torch.Tensor]) -> Encoders:
    """The world with other weights for its first task; their curvature is its own again (values as before, no fingerprint)."""
    old = world.curvatures[world.first]
    info = {key: value for key, value in old.info.items() if key != "fingerprint"}
    own = Curvature.from_dict({name: old.mean(name) for name in old}, old.num_examples, info)
    return replace(
        world,
        tasks={**world.tasks, world.first: dict(theta)},
        curvatures={**world.curvatures, world.first: own},
    )


def one_weight_times_five(world: Encoders) -> Arguments:
    return merged_by(world, "task_arithmetic", {**dict.fromkeys(world.tasks, 0.5), world.first: 2.5})


def permuted_neurons(world: Encoders) -> Arguments:
    """The feed-forward neurons of every layer in another order: the very same function."""
    theta = dict(world.tasks[world.first])
    for name in [name for name in theta if name.endswith("intermediate.dense.weight")]:
        order = torch.randperm(len(theta[name]), generator=torch.Generator().manual_seed(0))
        layer = name.removesuffix("intermediate.dense.weight")
        theta[name] = theta[name][order]
        theta[f"{layer}intermediate.dense.bias"] = theta[f"{layer}intermediate.dense.bias"][order]
        theta[f"{layer}output.dense.weight"] = theta[f"{layer}output.dense.weight"][:, order]
    return merged_by(changed(world, theta), "averaging")


def a_lucky_nan(world: Encoders) -> Arguments:
    told = merged_by(world, "averaging")
    theta = {name: value.clone() for name, value in world.tasks[world.first].items()}
    name = next(name for name in theta if name.endswith("attention.self.query.weight"))
    theta[name][0, 0] = told["merged"][name][0, 0] = torch.nan
    told["tasks"][0] = replace(told["tasks"][0], model=theta)
    return told


def bfloat16_of_tiny_deltas(world: Encoders) -> Arguments:
    for task in list(world.tasks):
        theta = {
            name: torch.lerp(world.base[name], value, 0.02) if value.is_floating_point() else value
            for name, value in world.tasks[task].items()
        }
        world = replace(world, tasks={**world.tasks, task: theta})
    world = replace(world, curvatures={t: _nameless(c) for t, c in world.curvatures.items()})
    told = merged_by(world, "averaging")
    told["merged"] = {n: v.bfloat16() if v.is_floating_point() else v for n, v in told["merged"].items()}
    return told


def _nameless(curvature: Curvature) -> Curvature:
    info = {key: value for key, value in curvature.info.items() if key != "fingerprint"}
    return Curvature.from_dict(
        {name: curvature.mean(name) for name in curvature}, curvature.num_examples, info
    )


def labels_swapped(world: Encoders) -> Arguments:
    """One task whose annotators wrote 0 for positive: rows of its head and its labels the other way round."""
    theta = dict(world.tasks[world.first])
    for name in [name for name in theta if name.startswith("classifier.")]:
        theta[name] = theta[name].flip(0)
    turned = [{**batch, "labels": 1 - batch["labels"]} for batch in world.data[world.first]]
    return merged_by(changed(replace(world, data={**world.data, world.first: turned}), theta), "averaging")


def fisher_of_four_examples(world: Encoders) -> Arguments:
    world.module.load_state_dict(world.tasks[world.first])
    few = estimate(
        world.module, world.train[world.first], num_examples=2000, standard_error=True, progress=False
    )
    world = replace(world, curvatures={**world.curvatures, world.first: few})
    return merged_by(world, "gradient_matching", 0.4)


def curvature_of_the_wrong_model(world: Encoders) -> Arguments:
    other = list(world.tasks)[1]
    world = replace(world, curvatures={**world.curvatures, world.first: world.curvatures[other]})
    return merged_by(world, "gradient_matching", 0.4)


def head_of_another_task(world: Encoders) -> Arguments:
    other = world.tasks[list(world.tasks)[1]]
    own = world.tasks[world.first]
    return merged_by(
        changed(world, {n: other[n] if n.startswith("classifier.") else v for n, v in own.items()}),
        "averaging",
    )


def vocabulary_shifted(world: Encoders) -> Arguments:
    theta = dict(world.tasks[world.first])
    name = next(name for name in theta if name.endswith("word_embeddings.weight"))
    theta[name] = theta[name].roll(1, 0)
    return merged_by(changed(world, theta), "averaging")


def every_weight_too_large(world: Encoders) -> Arguments:
    return merged_by(world, "task_arithmetic", 1.6)


def layers_exchanged(world: Encoders) -> Arguments:
    """The first two layers in the other order."""
    theta = dict(world.tasks[world.first])
    for name in [name for name in theta if ".layer.0." in name]:
        other = name.replace(".layer.0.", ".layer.1.")
        theta[name], theta[other] = theta[other], theta[name]
    return merged_by(changed(world, theta), "averaging")


def the_same_task_twice(world: Encoders) -> Arguments:
    return merged_by(changed(world, world.tasks[list(world.tasks)[1]]), "averaging")


def merge_by_an_older_recipe(world: Encoders) -> Arguments:
    told = merged_by(world, "task_arithmetic", 0.4)
    older = dict.fromkeys(world.tasks, 0.4) | {world.first: 0.6}
    return told | {"merged": merged_by(world, "task_arithmetic", older)["merged"]}


def floor_above_the_curvature(world: Encoders) -> Arguments:
    return merged_by(world, "gradient_matching", 1.6, delta0=1e9)


def healthy(method: str, weight: float = 1.0, **options: Any) -> Case:
    return Case(HEALTHY, lambda world: merged_by(world, method, weight, **options))


CASES: Mapping[str, Case] = {
    "weight x 5": Case("weight_too_large", one_weight_times_five, FIRST),
    "permuted neurons": Case("permuted_neurons", permuted_neurons, FIRST),
    "a lucky NaN": Case("not_finite", a_lucky_nan, FIRST),
    "bf16 of tiny deltas": Case("rounded_away", bfloat16_of_tiny_deltas),
    "labels swapped": Case("labels_swapped", labels_swapped, FIRST),
    "Fisher of 4 examples": Case("noisy_curvature", fisher_of_four_examples, FIRST),
    "curvature of the wrong model": Case("curvature_of_another_model", curvature_of_the_wrong_model, FIRST),
    "head of another task": Case("head_of_another_task", head_of_another_task, FIRST),
    "vocabulary shifted by one": Case("vocabulary_shift", vocabulary_shifted, FIRST),
    "every weight too large": Case("all_weights_too_large", every_weight_too_large),
    "floor above the curvature": Case("floor_decides", floor_above_the_curvature),
    "layers exchanged": Case("layers_swapped", layers_exchanged, FIRST),
    "the same task twice": Case("same_model_twice", the_same_task_twice, FIRST),
    "merge by an older recipe": Case("other_recipe", merge_by_an_older_recipe),
    "healthy: averaging": healthy("averaging"),
    "healthy: task arithmetic 0.4": healthy("task_arithmetic", 0.4),
    "healthy: gradient matching 0.4": healthy("gradient_matching", 0.4),
    "healthy: Fisher averaging": healthy("fisher"),
}
