"""What a rule makes of its weights, and merges that are not what their recipe gives."""

import pytest
import torch

from gradmatch import Task, diagnose, merge
from gradmatch.diagnosis.recipes import effective_weights, in_span, reach_of


def make(seed=0, scale=0.05):
    torch.manual_seed(seed)
    base = {
        "body.weight": torch.randn(40, 60),
        "body.bias": torch.randn(40),
        "head.weight": torch.randn(5, 40),
    }
    return base, {t: {n: v + scale * torch.randn_like(v) for n, v in base.items()} for t in "abc"}


def causes_of(base, tasks, merged, method="task_arithmetic", weights=None, **options):
    given = [Task(theta, weight=(weights or {}).get(t, 0.4), name=t) for t, theta in tasks.items()]
    return diagnose(base, given, merged, method=method, **options).causes


def added(base, tasks, weights):
    return {n: v + sum(w * (tasks[t][n] - v) for t, w in weights.items()) for n, v in base.items()}


@pytest.mark.parametrize(
    "method", ["ties", "dare", "dare_ties", "della", "breadcrumbs", "task_arithmetic", "averaging"]
)
def test_merges_by_their_own_rule_are_merges_of_these(method):
    base, tasks = make()
    given = [Task(theta, weight=0.4, name=t) for t, theta in tasks.items()]
    merged = dict(merge(base, given, method=method))
    assert causes_of(base, tasks, merged, method) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_merges_of_these(dtype):
    base, tasks = make(scale=0.005)
    base = {n: v.to(dtype) for n, v in base.items()}
    tasks = {t: {n: v.to(dtype) for n, v in theta.items()} for t, theta in tasks.items()}
    given = [Task(theta, weight=0.4, name=t) for t, theta in tasks.items()]
    assert causes_of(base, tasks, dict(merge(base, given, method="task_arithmetic"))) == []


def test_other_weights_than_the_recipes_are_told():
    base, tasks = make()
    (cause,) = causes_of(base, tasks, added(base, tasks, {"a": 0.4, "b": -0.4, "c": 0.4}))
    assert (cause.name, cause.subject) == ("other_recipe", "merged")
    assert "b -0.4 (recipe: 0.4)" in cause.evidence


def test_a_merge_of_other_checkpoints_of_the_same_tasks():
    base, tasks = make()
    early = {
        t: {n: base[n] + 0.5 * (v - base[n]) + 0.02 * torch.randn_like(v) for n, v in theta.items()}
        for t, theta in tasks.items()
    }
    (cause,) = causes_of(base, tasks, added(base, early, dict.fromkeys("abc", 0.4)))
    assert cause.name == "other_recipe"
    assert "outside the span" in cause.evidence


def test_tensors_that_a_policy_took_from_one_model_do_not_count():
    base, tasks = make()
    merged = added(base, tasks, dict.fromkeys("abc", 0.4))
    for head in (base["head.weight"], tasks["b"]["head.weight"]):
        assert causes_of(base, tasks, {**merged, "head.weight": head}) == []


def test_damage_in_one_layer_of_the_merge_is_placed():
    base, tasks = make()
    base |= {f"layers.{i}.weight": torch.randn(8, 8) for i in range(8)}
    tasks = {t: {n: v + 0.05 * torch.randn_like(v) for n, v in base.items()} for t in tasks}
    merged = added(base, tasks, dict.fromkeys("abc", 0.4))
    merged["layers.5.weight"] = torch.randn(8, 8)
    (cause,) = causes_of(base, tasks, merged)
    assert cause.name == "no_merge_of_these"
    assert "all of it in layers.5" in cause.evidence
    assert "layers.5 of the merged model is damaged" in cause.remedy


def test_effective_weights_are_those_of_the_formula():
    weights = {"a": 1.0, "b": 3.0}
    assert effective_weights("averaging", weights, {}) == {"a": 0.5, "b": 0.5}
    assert effective_weights("linear", weights, {}) == {"a": 0.25, "b": 0.75}
    assert effective_weights("linear", weights, {"normalize": False}) == weights
    assert effective_weights("task_arithmetic", weights, {"scale": 0.5}) == {"a": 0.5, "b": 1.5}
    assert effective_weights("task_arithmetic", weights, {"normalize": True}) == {"a": 0.25, "b": 0.75}
    assert effective_weights("task_arithmetic", weights, {"scale": {"head": 0.5, "*": 1.5}}) == weights
    assert effective_weights("negation", weights, {}) == {"a": -1.0, "b": -3.0}
    assert effective_weights("removal", weights, {}) == {"a": -1.0, "b": -3.0}
    assert effective_weights("model_stock", weights, {}) == {"a": 0.5, "b": 0.5}
    assert effective_weights("linear", {"a": 1.0, "b": -1.0}, {}) == {"a": 1.0, "b": -1.0}


def test_reach_is_what_a_rule_can_multiply_by():
    alpha = {"a": 0.3, "b": 2.0}
    assert reach_of("task_arithmetic", alpha, {}) == [0.5, 2.0]
    assert reach_of("gradient_matching", alpha, {}) == [1.0, 2.0]
    assert reach_of("dare", alpha, {"density": 0.25}) == [4.0, 8.0]
    assert reach_of("task_arithmetic", alpha, {"transforms": [{"dare": {"density": 0.5}}]}) == [2.0, 4.0]
    assert reach_of("removal", alpha, {}) is None


def test_only_one_number_a_task_makes_a_merge_that_can_be_checked():
    tasks = [Task({}, weight=0.5, name="a"), Task({}, weight=0.5, name="b")]
    assert in_span("averaging", tasks, {})
    assert in_span("task_arithmetic", tasks, {"scale": 2.0})
    assert in_span("linear", tasks, {"normalize": False})  # 0.5 + 0.5
    assert not in_span("linear", [tasks[0]], {"normalize": False})
    assert not in_span("ties", tasks, {})
    assert not in_span("task_arithmetic", tasks, {"transforms": ["dare"]})
    assert not in_span("task_arithmetic", tasks, {"scale": {"head": 0.5}})
    assert not in_span("gradient_matching", tasks, {})
    assert not in_span("averaging", [Task({}, weight={"head": 0.5}, name="a")], {})
