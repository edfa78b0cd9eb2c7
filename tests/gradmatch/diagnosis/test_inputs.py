"""Inputs as people have them: data that runs out, does not fit or names nothing, policies, several precisions."""

import itertools

import pytest
import torch
from torch import nn

from gradmatch import Task, diagnose
from gradmatch.diagnosis import diagnosing
from gradmatch.estimators import Curvature
from gradmatch.measure.barrier import interpolate


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(32, 3))
    base = {name: value.detach().clone() for name, value in module.state_dict().items()}
    tasks = [Task({n: v + 0.01 * torch.randn_like(v) for n, v in base.items()}, name=t) for t in "ab"]
    data = {t: [(torch.randint(20, (10, 4)), torch.randint(3, (10,))) for _ in range(2)] for t in "ab"}
    return module, tasks, data


def test_iterators_are_read_once(world):
    module, tasks, data = world
    lists = diagnose(module, tasks, method="averaging", data=data)
    streams = diagnose(module, tasks, method="averaging", data={t: iter(b) for t, b in data.items()})
    assert str(streams) == str(lists)


X, Y = torch.zeros(2, 4).long(), torch.zeros(2).long()
UNUSABLE = [
    (iter(()), ValueError, r"data of 'a': no batches.*used up before"),
    ([(X + 25, Y)], ValueError, "data of 'a': the module cannot be run.*index out of range"),
    ([(torch.zeros(2, 5).long(), Y)], ValueError, "data of 'a': .*shapes"),
    ({"input": X}, TypeError, r"data of 'a' is a dict; give a list .*\[batch\]"),
    (["good", "bad"], TypeError, "data of 'a': batch 0 is a str"),
    ([(X, None)], ValueError, "data of 'a': "),
]


@pytest.mark.parametrize(("batches", "error", "message"), UNUSABLE)
def test_data_that_cannot_be_used_is_told_before_any_weight_is_read(
    world, monkeypatch, batches, error, message
):
    for name in ("scan_weights", "planned_merge"):
        monkeypatch.setattr(diagnosing, name, lambda *_: pytest.fail("weights were read first"))
    module, tasks, _ = world
    with pytest.raises(error, match=message):
        diagnose(module, tasks, method="averaging", data={"a": batches})


def test_one_task_may_stand_alone(world):
    module, tasks, _ = world
    assert diagnose(module, tasks[0], method="averaging").healthy


def test_the_mismatch_can_be_left_out(world):
    module, tasks, data = world
    quick = {"method": "averaging", "data": data, "thorough": False}
    assert diagnose(module, tasks, **quick).evidence.mismatch is not None
    assert diagnose(module, tasks, mismatch=False, **quick).evidence.mismatch is None


def test_one_iterator_for_two_tasks(world):
    module, tasks, data = world
    shared = iter(data["a"])
    with pytest.raises(ValueError, match=r"data of 'b': no batches"):
        diagnose(module, tasks, method="averaging", data={"a": shared, "b": shared})


def test_a_module_of_other_weights(world):
    module, tasks, data = world
    wrapped = nn.ModuleDict({"inner": module})
    with pytest.raises(ValueError, match=r"does not give 'inner.0.weight' and 2 others of ModuleDict"):
        diagnose(dict(module.state_dict()), tasks, method="averaging", data=data, module=wrapped)


def test_shapes_that_the_recipe_has_a_policy_for_are_no_fault():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    one, other = (
        {n: v + 0.01 * torch.randn_like(v) for n, v in module.state_dict().items()} for _ in range(2)
    )
    other |= {"3.weight": torch.randn(5, 8), "3.bias": torch.randn(5)}
    given = [Task(one, name="a"), Task(other, name="b")]
    assert [cause.name for cause in diagnose(module, given, method="averaging").causes] == ["shapes_differ"]
    assert diagnose(module, given, method="averaging", heads="keep-per-task").healthy


def test_conflicts_weighted_by_curvature_against_a_slow_loop(world):
    module, tasks, _ = world
    base = module.state_dict()
    means = [{n: torch.rand_like(v) for n, v in base.items()} for _ in tasks]
    curvatures = [Curvature.from_dict(mean, size) for mean, size in zip(means, (10, 300), strict=True)]
    given = [Task(t.model, c, name=t.name) for t, c in zip(tasks, curvatures, strict=True)]
    against = moving = 0.0
    for name, theta0 in base.items():
        taus = [(task.model[name] - theta0).double().flatten().tolist() for task in tasks]
        parts = [c.total(name).double().flatten().tolist() for c in curvatures]
        for a, b, p, q in zip(*taus, *parts, strict=True):
            moving += (p + q) * (a * b != 0)
            against += (p + q) * (a * b < 0)
    result = diagnose(module, given, method="averaging")
    assert result.evidence.weighted_conflicts == {("a", "b"): pytest.approx(against / moving, rel=1e-6)}
    assert result.to_dict()["weighted_conflicts"] == {"a | b": pytest.approx(against / moving, rel=1e-6)}
    assert "The same, counted by curvature" in result.to_html()


def test_points_between_half_precision_weights_are_not_rounded():
    start, end = {"w": torch.ones(1)}, {"w": torch.tensor([1.0078125]).bfloat16()}  # neighbours in bfloat16
    found = [float(interpolate(start, end, share)["w"]) for share in (0.25, 0.5, 0.75)]
    assert found == pytest.approx([1.001953, 1.003906, 1.005859], abs=1e-6)


@pytest.mark.parametrize("dtypes", list(itertools.product(("float32", "bfloat16"), ("bfloat16", "float16"))))
def test_models_of_several_precisions(world, dtypes):
    module, tasks, data = world
    base = {n: v.to(getattr(torch, dtypes[0])) for n, v in module.state_dict().items()}
    other = {n: v.to(getattr(torch, dtypes[1])) for n, v in tasks[1].model.items()}
    options = {"method": "averaging", "dtype": "float32", "data": data, "module": module}
    result = diagnose(base, [tasks[0], Task(other, name="b")], **options)
    assert result.healthy, str(result)
    for by_task in result.evidence.losses.values():
        assert all(torch.isfinite(losses).all() for losses in by_task.values())
