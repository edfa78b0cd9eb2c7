"""What the headline claims: that nothing was found, and in what."""

import pytest
import torch
from torch import nn

from gradmatch import Task, diagnose
from gradmatch.estimators import Curvature


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    module = nn.Linear(6, 3)
    base = {name: value.detach().clone() for name, value in module.state_dict().items()}
    tasks = [Task({n: v + 0.01 * torch.randn_like(v) for n, v in base.items()}, name=t) for t in "ab"]
    x = torch.randn(30, 6)
    data = {task.name: [(x, nn.functional.linear(x, **_linear(task.model)).argmax(1))] for task in tasks}
    return module, tasks, data


def _linear(theta):
    return {"weight": theta["weight"], "bias": theta["bias"]}


def told(world, tasks=None, **options):
    module, given, _ = world
    result = diagnose(module, tasks or given, method="averaging", thorough=False, **options)
    return result, result.to_dict()


def test_weights_alone_are_no_clean_bill(world):
    result, report = told(world)
    assert result.healthy
    assert report["verdict"] == (
        "Nothing wrong was found in the weights; what the merge does to the losses was not looked at."
    )
    assert report["looked_at"] == ["the weights of the base, 2 tasks and the merge"]
    assert report["not_looked_at"] == [
        "curvature (none given)",
        "the losses of a, b (no data), and with them what anything costs",
    ]
    assert str(result).startswith(report["verdict"])
    assert '<h1 class="part">Nothing wrong was found in the weights;' in result.to_html()


def test_losses_of_some_tasks(world):
    _, _, data = world
    result, report = told(world, data={"b": data["b"]})
    assert report["verdict"] == "Nothing wrong was found with this merge, as far as the losses of b tell."
    assert "the losses of b" in report["looked_at"]
    assert report["not_looked_at"][-1].startswith("the losses of a (no data)")
    assert 'class="part"' in result.to_html()


def test_all_losses_and_curvatures(world):
    _, tasks, data = world
    curvatures = {
        t.name: Curvature.from_dict({n: torch.ones_like(v) for n, v in t.model.items()}, 30) for t in tasks
    }
    given = [Task(t.model, curvatures[t.name], name=t.name) for t in tasks]
    result, report = told(world, given, data=data, base_curvature=curvatures["a"], forecast=False)
    assert report["verdict"] == "Nothing wrong was found with this merge."
    assert report["looked_at"][1:] == ["the curvature of the base, a, b", "the losses of a, b"]
    assert report["not_looked_at"] == []
    assert '<h1 class="ok">' in result.to_html()


def test_a_refused_merge_is_a_cause(world):
    module, tasks, data = world
    result = diagnose(module, tasks, method="gradient_matching", data=data)
    report = result.to_dict()
    assert [cause.name for cause in result.causes] == ["merge_refused"]
    assert "the merge itself was refused: " in result.causes[0].evidence
    assert "the merge" in report["not_looked_at"]
    assert report["not_looked_at"][-1].startswith("the losses of a, b (they cannot be measured)")
    assert report["verdict"] == "One cause found: merge refused (merged)."
    assert "<b>merge refused</b> (merged)" in result.to_html()


def test_many_tasks_are_listed_in_short(world):
    module, tasks, _ = world
    many = [Task(tasks[0].model, name=f"t{i}") for i in range(9)]
    assert (
        "the losses of t0, t1, t2, t3, t4, t5 and 3 more (no data)"
        in diagnose(module, many).to_dict()["not_looked_at"][-1]
    )
