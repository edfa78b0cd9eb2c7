"""Merges whose fault is known, and healthy ones, as data: a name, what the diagnosis should say, and how it is built.

A case takes a healthy `World` and returns the arguments of `gradmatch.diagnose`. To add one, write a function and a line in
CASES; the rules of the diagnosis know nothing of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.diagnosis import tiny
from experiments.diagnosis.tiny import Weights, World
from gradmatch import Task, merge
from gradmatch.estimators import Curvature

Arguments = dict[str, Any]
HEALTHY = ""


@dataclass(frozen=True)
class Case:
    """One way to make a merge.

    Attributes:
        expected: name of the true cause, or HEALTHY.
        build: World -> arguments of `diagnose`.
        subject: the task or model to blame, where the cause has one.
    """

    expected: str
    build: Callable[[Any], Arguments]
    subject: str = ""


def merged_by(
    world: World, method: str, weights: Mapping[str, float] | None = None, **options: Any
) -> Arguments:
    """A merge by a rule, with the options that `diagnose` is told as well."""
    tasks = tasks_of(world, weights)
    told = {"base_curvature": world.curvatures["base"], **options}
    model = merge(
        tiny.net_of(world.base), tasks, method=method, batchnorm="average", allow_mismatch=True, **told
    )
    return arguments(world, tasks, dict(model), method, **told)


def added_by_hand(world: World, weights: Mapping[str, float]) -> Arguments:
    """theta0 + sum_t w_t tau_t with plain tensor arithmetic, as scripts do it: nothing is checked."""
    merged = {}
    for name, theta0 in world.base.items():
        if theta0.is_floating_point():
            merged[name] = theta0 + sum(w * (world.tasks[task][name] - theta0) for task, w in weights.items())
        else:
            merged[name] = theta0
    return arguments(world, tasks_of(world, weights), merged, "task_arithmetic")


def arguments(world: World, tasks: list[Task], merged: Weights, method: str, **told: Any) -> Arguments:
    return {
        "base": tiny.net_of(world.base),
        "tasks": tasks,
        "merged": merged,
        "method": method,
        "data": world.batches(),
        **told,
    }


def tasks_of(world: World, weights: Mapping[str, float] | None = None) -> list[Task]:
    return [
        Task(theta, world.curvatures.get(name), (weights or {}).get(name, 1.0), name)
        for name, theta in world.tasks.items()
    ]


def changed(world: World, task: str, theta: Weights, *, estimate_again: bool = True) -> World:
    """The world with another model for a task (and its own curvature, as its owner would measure it)."""
    curvatures = dict(world.curvatures)
    if estimate_again:
        curvatures[task] = tiny.curvature_of(theta, world.train[task])
    return replace(world, tasks={**world.tasks, task: theta}, curvatures=curvatures)


def thirds(world: World) -> dict[str, float]:
    return dict.fromkeys(world.tasks, 1 / len(world.tasks))


def one_weight_times(factor: float) -> Callable[[World], Arguments]:
    def build(world: World) -> Arguments:
        return merged_by(
            world, "task_arithmetic", {**dict.fromkeys(world.tasks, 0.5), "reviews": 0.5 * factor}
        )

    return build


def base_of_another_seed(world: World) -> Arguments:
    other = tiny.make_world(world.seed + 1000, names=()).base
    theta = tiny.fine_tune(other, world.train["reviews"], world.seed, steps=400)
    return merged_by(changed(world, "reviews", theta), "averaging")


def permuted_neurons(world: World, share: float = 1.0) -> Arguments:
    """A share of the neurons of one task in another order."""
    generator = torch.Generator().manual_seed(world.seed)
    moving = torch.randperm(tiny.WIDTH, generator=generator)[: round(share * tiny.WIDTH)]
    order = torch.arange(tiny.WIDTH)
    order[moving] = moving.roll(1)
    return merged_by(changed(world, "chat", reordered(world.tasks["chat"], order)), "averaging")


def reordered(theta: Weights, order: torch.Tensor) -> Weights:
    """Another order of the neurons of the first layer: the very same function."""
    result = dict(theta)
    for name, value in theta.items():
        if name.startswith(("token.", "norm.")) and value.ndim:
            result[name] = value[order]
    result["hidden.weight"] = theta["hidden.weight"][:, order]
    return result


def a_lucky_nan(world: World) -> Arguments:
    theta = dict(world.tasks["news"])
    theta["hidden.weight"] = theta["hidden.weight"].clone()
    theta["hidden.weight"][3, 5] = torch.nan
    broken = changed(world, "news", theta, estimate_again=False)
    return added_by_hand(broken, thirds(broken))


def tiny_deltas_stored_in(dtype: torch.dtype, rate: float) -> Callable[[World], Arguments]:
    """Fine-tunes of a few careful steps, merged and stored in half precision."""

    def build(world: World) -> Arguments:
        for task, data in world.train.items():
            world = changed(world, task, tiny.fine_tune(world.base, data, world.seed, steps=40, rate=rate))
        told = merged_by(world, "averaging")
        told["merged"] = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in told["merged"].items()
        }
        return told

    return build


def labels_renamed(order: tuple[int, ...]) -> Callable[[World], Arguments]:
    """One task whose annotators numbered the classes otherwise."""

    def build(world: World) -> Arguments:
        renamed = torch.tensor(order)
        world = replace(world, train=dict(world.train), test=dict(world.test))
        for data in (world.train, world.test):
            data["reviews"] = (data["reviews"][0], renamed[data["reviews"][1]])
        theta = tiny.fine_tune(world.base, world.train["reviews"], world.seed, steps=300)
        return merged_by(changed(world, "reviews", theta), "averaging")

    return build


def fisher_of(examples: int) -> Callable[[World], Arguments]:
    def build(world: World) -> Arguments:
        curvatures = dict(world.curvatures)
        curvatures["chat"] = tiny.curvature_of(world.tasks["chat"], world.train["chat"], examples=examples)
        return merged_by(replace(world, curvatures=curvatures), "gradient_matching", thirds(world))

    return build


def curvature_of_the_wrong_model(world: World) -> Arguments:
    curvatures = {**world.curvatures, "news": world.curvatures["chat"]}
    return merged_by(replace(world, curvatures=curvatures), "gradient_matching", thirds(world))


def head_of_another_task(world: World) -> Arguments:
    theta = {
        name: world.tasks["chat" if name.startswith("head.") else "news"][name]
        for name in world.tasks["news"]
    }
    return merged_by(changed(world, "news", theta), "averaging")


def batchnorm_not_recalibrated(world: World) -> Arguments:
    """Statistics lost on the way: those of a fresh layer."""
    told = merged_by(world, "averaging")
    fresh = tiny.initial(world.seed)
    told["merged"] |= {name: fresh[name] for name in ("norm.running_mean", "norm.running_var")}
    return told


def vocabulary_shifted_by(places: int) -> Callable[[World], Arguments]:
    """One task's tokenizer numbers every token otherwise."""

    def build(world: World) -> Arguments:
        theta = dict(world.tasks["chat"])
        theta["embedding.weight"] = theta["embedding.weight"].roll(places, 0)
        return merged_by(changed(world, "chat", theta, estimate_again=False), "averaging")

    return build


def tasks_in_conflict(world: World) -> Arguments:
    """Two tasks on the same texts, one of which wants other classes for them (no renaming maps one to the other)."""
    generator = torch.Generator().manual_seed(world.seed + 77)
    news = world.domains["news"]
    other = replace(news, meaning=torch.randn(news.meaning.shape, generator=generator))
    world = replace(
        world,
        train={**world.train, "chat": other.sample(tiny.TRAIN, generator)},
        test={**world.test, "chat": other.sample(tiny.TEST, generator)},
    )
    theta = tiny.fine_tune(world.base, world.train["chat"], world.seed, steps=300)
    return merged_by(changed(world, "chat", theta), "averaging")


def overtrained_task(steps: int, rate: float) -> Callable[[World], Arguments]:
    """Many epochs at a large rate over a small part of the data."""

    def build(world: World) -> Arguments:
        tokens, classes = world.train["news"]
        theta = tiny.fine_tune(world.base, (tokens[:256], classes[:256]), world.seed, steps=steps, rate=rate)
        return merged_by(changed(world, "news", theta), "task_arithmetic", dict.fromkeys(world.tasks, 0.5))

    return build


def every_weight(weight: float) -> Callable[[World], Arguments]:
    def build(world: World) -> Arguments:
        return merged_by(world, "task_arithmetic", dict.fromkeys(world.tasks, weight))

    return build


def floor_above_the_curvature(world: World) -> Arguments:
    return merged_by(world, "gradient_matching", dict.fromkeys(world.tasks, 1.5), delta0=1e7)


def merge_of_other_models(world: World) -> Arguments:
    """The wrong folder: a merge of another project."""
    told = merged_by(world, "averaging")
    told["merged"] = dict(merged_by(tiny.make_world(world.seed + 2000), "averaging")["merged"])
    return told


def base_curvature_of_a_task(world: World) -> Arguments:
    curvatures = {**world.curvatures, "base": world.curvatures["reviews"]}
    return merged_by(replace(world, curvatures=curvatures), "gradient_matching", thirds(world))


def task_that_is_the_base(world: World) -> Arguments:
    """A folder that was saved before training."""
    return merged_by(changed(world, "reviews", dict(world.base)), "averaging")


def the_same_task_twice(world: World) -> Arguments:
    """One model under two names."""
    return merged_by(changed(world, "chat", dict(world.tasks["news"])), "averaging")


def task_times(factor: float) -> Callable[[World], Arguments]:
    """Every weight of one task multiplied by a number."""

    def build(world: World) -> Arguments:
        theta = {n: v * factor if v.is_floating_point() else v for n, v in world.tasks["chat"].items()}
        return merged_by(changed(world, "chat", theta, estimate_again=False), "averaging")

    return build


def transposed_hidden_layer(world: World) -> Arguments:
    theta = dict(world.tasks["reviews"])
    theta["hidden.weight"] = theta["hidden.weight"].T.contiguous()
    return merged_by(changed(world, "reviews", theta), "averaging")


def tokens_in_another_order(world: World) -> Arguments:
    theta = dict(world.tasks["chat"])
    order = torch.randperm(tiny.VOCABULARY, generator=torch.Generator().manual_seed(world.seed))
    theta["embedding.weight"] = theta["embedding.weight"][order]
    return merged_by(changed(world, "chat", theta, estimate_again=False), "averaging")


def hidden_layer_of_noise(world: World) -> Arguments:
    """One matrix of a task damaged on the way."""
    theta = dict(world.tasks["news"])
    theta["hidden.weight"] = _noise_like(theta["hidden.weight"], world.seed)
    return merged_by(changed(world, "news", theta), "averaging")


def merge_with_a_layer_of_noise(world: World) -> Arguments:
    told = merged_by(world, "averaging")
    told["merged"]["hidden.weight"] = _noise_like(told["merged"]["hidden.weight"], world.seed)
    return told


def _noise_like(value: torch.Tensor, seed: int) -> torch.Tensor:
    return value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))


def zeroed_norm(world: World) -> Arguments:
    theta = {**world.tasks["news"], "norm.weight": torch.zeros(tiny.WIDTH)}
    return merged_by(changed(world, "news", theta), "averaging")


def merge_that_overflows(world: World) -> Arguments:
    """Every weight is finite, and what they give is not."""
    told = merged_by(world, "averaging")
    for name in ("hidden.weight", "head.weight"):
        told["merged"][name] = told["merged"][name] * 1e30
    return told


def merge_of_early_checkpoints(world: World) -> Arguments:
    """The folder is older than the models that the recipe names."""
    told = merged_by(world, "averaging")
    early = world
    for task, data in world.train.items():
        early = changed(
            early, task, tiny.fine_tune(world.base, data, world.seed, steps=16), estimate_again=False
        )
    told["merged"] = merged_by(early, "averaging")["merged"]
    return told


def merge_by_an_older_recipe(world: World) -> Arguments:
    told = merged_by(world, "task_arithmetic", dict.fromkeys(world.tasks, 0.4))
    older = {"news": 0.2, "reviews": 0.6, "chat": 0.4}
    told["merged"] = merged_by(world, "task_arithmetic", older)["merged"]
    return told


def diagnosed_on_another_base(world: World) -> Arguments:
    told = merged_by(world, "averaging")
    told["base"] = tiny.net_of(tiny.make_world(world.seed + 3000, names=()).base)
    return told


def infinite_in_the_merge(world: World) -> Arguments:
    told = merged_by(world, "averaging")
    told["merged"]["head.bias"] = told["merged"]["head.bias"] / 0.0
    return told


def fine_tunes_that_forget(world: World) -> Arguments:
    """Long fine-tunes on texts in which the common tokens have come to mean something else, the same for all: so their average unlearns it too.

    What each forgets by itself, an average brings back.
    """
    generator = torch.Generator().manual_seed(world.seed + 66)
    common = (
        torch.stack([domain.frequency for domain in world.domains.values()]).amin(0) > 0.11 / tiny.VOCABULARY
    )
    bend = common[:, None] * torch.randn(tiny.VOCABULARY, tiny.CLASSES, generator=generator)
    world = replace(world, train=dict(world.train), test=dict(world.test))
    for task, domain in world.domains.items():
        bent = replace(domain, meaning=domain.meaning + bend)
        world.train[task] = bent.sample(tiny.TRAIN, generator)
        world.test[task] = bent.sample(tiny.TEST, generator)
    for task, data in world.train.items():
        world = changed(world, task, tiny.fine_tune(world.base, data, world.seed, steps=1200, rate=2e-3))
    return merged_by(world, "averaging")


def what_the_base_knew_is_undone(world: World) -> Arguments:
    """One task is what the base knew of another's tokens: that one's fine-tuning takes away more than its own gives back."""
    generator = torch.Generator().manual_seed(world.seed + 55)
    old = tiny.Domain(
        world.domains["news"].frequency, world.domains["reviews"].meaning
    )  # the general one, there
    world = replace(
        world,
        train={**world.train, "chat": old.sample(tiny.TRAIN, generator)},
        test={**world.test, "chat": old.sample(tiny.TEST, generator)},
    )
    for task, steps in (("chat", 80), ("news", 1000)):
        world = changed(world, task, tiny.fine_tune(world.base, world.train[task], world.seed, steps=steps))
    return merged_by(world, "task_arithmetic", {"news": 0.5, "reviews": 0.3, "chat": 0.2})


def curvature_in_other_units(times: float) -> Callable[[World], Arguments]:
    """One task's curvature from an optimizer whose gradients were clipped, or of a mean over tokens."""

    def build(world: World) -> Arguments:
        own = world.curvatures["news"]
        info = {**own.info, "estimator": "adam"}
        scaled = Curvature.from_dict({n: own.mean(n) * times for n in own}, own.num_examples, info)
        world = replace(world, curvatures={**world.curvatures, "news": scaled})
        return merged_by(world, "gradient_matching", thirds(world))

    return build


def healthy(method: str, weight: float | None = None, **options: Any) -> Case:
    def build(world: World) -> Arguments:
        weights = None if weight is None else dict.fromkeys(world.tasks, weight)
        return merged_by(world, method, weights, **options)

    return Case(HEALTHY, build)


def healthy_uneven(world: World) -> Arguments:
    return merged_by(world, "weighted", {"news": 0.5, "reviews": 0.3, "chat": 0.3})


CASES: dict[str, Case] = {
    "weight x 5": Case("weight_too_large", one_weight_times(5), "reviews"),
    "base of another seed": Case("other_base", base_of_another_seed, "reviews"),
    "permuted neurons": Case("permuted_neurons", permuted_neurons, "chat"),
    "a lucky NaN": Case("not_finite", a_lucky_nan, "news"),
    "bf16 of tiny deltas": Case("rounded_away", tiny_deltas_stored_in(torch.bfloat16, 1e-5), "merged"),
    "labels swapped": Case("labels_swapped", labels_renamed((1, 2, 3, 0)), "reviews"),
    "Fisher of 4 examples": Case("noisy_curvature", fisher_of(4), "chat"),
    "curvature of the wrong model": Case("curvature_of_another_model", curvature_of_the_wrong_model, "news"),
    "head of another task": Case("head_of_another_task", head_of_another_task, "news"),
    "BatchNorm not recalibrated": Case("stale_batchnorm", batchnorm_not_recalibrated, "merged"),
    "vocabulary shifted by one": Case("vocabulary_shift", vocabulary_shifted_by(1), "chat"),
    "tasks in conflict": Case("tasks_conflict", tasks_in_conflict, "chat"),
    "over-trained task": Case("overtrained_task", overtrained_task(1500, 5e-3), "news"),
    "every weight too large": Case("all_weights_too_large", every_weight(1.6), "merged"),
    "floor above the curvature": Case("floor_decides", floor_above_the_curvature, "delta0"),
    "merge of other models": Case("no_merge_of_these", merge_of_other_models, "merged"),
    "healthy: averaging": healthy("averaging"),
    "healthy: task arithmetic 0.4": healthy("task_arithmetic", 0.4),
    "healthy: gradient matching": healthy("gradient_matching", 0.4),
    "healthy: Fisher averaging": healthy("fisher", 1.0),
    "healthy: uneven weights": Case(HEALTHY, healthy_uneven),
}
# Other strengths and kinds, added after the first rules; rules that came later were set on the development seeds alone.
VARIANTS: dict[str, Case] = {
    "weight x 3": Case("weight_too_large", one_weight_times(3), "reviews"),
    "a third of the neurons permuted": Case("permuted_neurons", lambda w: permuted_neurons(w, 1 / 3), "chat"),
    "infinite value in the merge": Case("not_finite", infinite_in_the_merge, "merged"),
    "fp16 of tiny deltas": Case("rounded_away", tiny_deltas_stored_in(torch.float16, 1e-6), "merged"),
    "two labels swapped": Case("labels_swapped", labels_renamed((1, 0, 2, 3)), "reviews"),
    "Fisher of 6 examples": Case("noisy_curvature", fisher_of(6), "chat"),
    "base's curvature of a task": Case("curvature_of_another_model", base_curvature_of_a_task, "base"),
    "vocabulary shifted by five": Case("vocabulary_shift", vocabulary_shifted_by(5), "chat"),
    "over-trained less": Case("overtrained_task", overtrained_task(500, 3e-3), "news"),
    "every weight 1.2": Case("all_weights_too_large", every_weight(1.2), "merged"),
    "task that is the base": Case("task_is_base", task_that_is_the_base, "reviews"),
    "the same task twice": Case("same_model_twice", the_same_task_twice),
    "task x 0.1": Case("rescaled_model", task_times(0.1), "chat"),
    "transposed weight": Case("transposed_weight", transposed_hidden_layer, "reviews"),
    "tokens in another order": Case("vocabulary_order", tokens_in_another_order, "chat"),
    "layer of a task damaged": Case("other_base", hidden_layer_of_noise, "news"),
    "layer of the merge damaged": Case("no_merge_of_these", merge_with_a_layer_of_noise, "merged"),
    "norm zeroed": Case("zero_tensor", zeroed_norm, "news"),
    "finite weights that overflow": Case("outputs_not_finite", merge_that_overflows, "merged"),
    "merge of early checkpoints": Case("other_recipe", merge_of_early_checkpoints, "merged"),
    "merge by an older recipe": Case("other_recipe", merge_by_an_older_recipe, "merged"),
    "another base": Case("other_base", diagnosed_on_another_base, "base"),
    "every weight 0.04": Case("weights_far_from_best", every_weight(0.04), "merged"),
    "forgotten base": Case("base_forgotten", fine_tunes_that_forget, "merged"),
    "what the base knew is undone": Case("worse_than_base", what_the_base_knew_is_undone, "chat"),
    "curvature 30,000 times too small": Case("curvature_units", curvature_in_other_units(1 / 30_000), "news"),
    "curvature 70 times too small": Case("curvature_units", curvature_in_other_units(1 / 70), "news"),
    "healthy: DARE, a tenth kept": healthy("dare", 1 / 3),
    "healthy: TIES": healthy("ties", 1.0),
    "healthy: Model Stock": healthy("model_stock"),
}
