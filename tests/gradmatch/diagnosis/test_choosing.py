"""`merge(..., weights="auto")` on linear regression, where the best weights are a least-squares solution; and its errors."""

import pytest
import torch
from torch import nn

from gradmatch import Task, merge
from gradmatch.choosing.auto import auto_weights
from gradmatch.estimators import Curvature
from gradmatch.measure.objective import Objective

DIM, N = 5, 30


@pytest.fixture(scope="module")
def problem():
    """(base module, task -> theta, task -> its one batch, curvatures): regressions from one base, trained half-way."""
    torch.manual_seed(3)
    base = nn.Linear(DIM, 1, bias=False, dtype=torch.float64)
    theta0 = base.weight.detach()
    models, data, curvatures = {}, {}, {}
    for name, shift in (("one", 0.0), ("two", 0.5)):
        x = torch.randn(N, DIM, dtype=torch.float64) * torch.linspace(0.5, 2.0, DIM, dtype=torch.float64)
        y = x @ (theta0.T + 1.0 + shift + 0.2 * torch.randn(DIM, 1, dtype=torch.float64))
        best = torch.linalg.lstsq(x, y).solution.T
        models[name], data[name] = {"weight": theta0 + 0.7 * (best - theta0)}, [(x, y)]
        curvatures[name] = Curvature.from_dict({"weight": (x**2).mean(0, keepdim=True)}, N)
    return base, models, data, curvatures


def tasks_of(problem, **weights):
    _, models, _, curvatures = problem
    return [Task(theta, curvatures[name], weights.get(name, 1.0), name) for name, theta in models.items()]


def loss(problem, theta):
    """Mean squared error of all tasks, by hand."""
    return sum(float(((x @ theta.T - y) ** 2).mean()) for ((x, y),) in problem[2].values())


def test_task_arithmetic_takes_the_least_squares_weights(problem):
    base, models, data, _ = problem
    merged = merge(base, tasks_of(problem), method="task_arithmetic", weights="auto", data=data)
    theta0 = base.weight.detach()
    u = torch.stack([(theta["weight"] - theta0)[0] for theta in models.values()], 1)  # (DIM, 2)
    x = torch.cat([pairs[0][0] for pairs in data.values()])
    y = torch.cat([pairs[0][1] for pairs in data.values()])
    c = torch.linalg.lstsq(x @ u, y - x @ theta0.T).solution
    assert bool((c > 0).all() and (c < 2).all())  # inside the bounds
    torch.testing.assert_close(merged["weight"], theta0 + (u @ c).T, rtol=1e-5, atol=1e-6)
    assert list(merged.report.forecast["weights"].values()) == pytest.approx(c.flatten().tolist(), abs=1e-5)
    assert merged.report.forecast["trusted"] is True
    assert any(
        note.startswith("weights chosen by forecast in the span of the task vectors")
        for note in merged.report.notes
    )


def test_gradient_matching_takes_the_best_point_of_its_span(problem):
    base, _, data, _ = problem
    options = {"base_curvature": 7.0, "base_weight": 2.0, "delta0": 1e-3}
    found = merge(base, tasks_of(problem), weights="auto", data=data, **options)
    merged, forecast = found["weight"], found.report.forecast
    chosen, rises = forecast["weights"], forecast["rises_per_example"]
    for name, ((x, y),) in data.items():
        measured = [0.5 * float(((x @ w.T - y) ** 2).mean()) for w in (merged, problem[1][name]["weight"])]
        assert rises[name] == pytest.approx(measured[0] - measured[1], rel=1e-4)
    for name in chosen:
        for change in (-0.05, 0.05):
            near = {**chosen, name: chosen[name] + change}
            other = merge(base, tasks_of(problem, **near), hbar_weight=1.0, **options)["weight"]
            assert loss(problem, other) > loss(problem, merged)


def test_products_take_the_place_of_data(problem):
    base, models, data, _ = problem
    objectives = {name: Objective(base, pairs, N) for name, pairs in data.items()}
    products = auto_weights({"weight": base.weight.detach()}, models, objectives).products
    by_data, by_products = (
        merge(base, tasks_of(problem), method="task_arithmetic", weights="auto", **given)
        for given in ({"data": data}, {"products": products})
    )
    assert torch.equal(by_data["weight"], by_products["weight"])
    with pytest.raises(ValueError, match=r"over the directions one, two; .* need one, tau:one, tau:two, two"):
        merge(base, tasks_of(problem), base_curvature=1.0, weights="auto", products=products)
    with pytest.raises(ValueError, match="no products of task 'two'"):
        merge(base, tasks_of(problem), method="task_arithmetic", weights="auto", products=products[:1])


BAD = [
    ({"weights": "best", "data": {}}, "weights is 'best'; it can only be 'auto'"),
    ({"data": {}}, "say weights='auto' with them"),
    ({"weights": "auto"}, "needs data .* or products"),
    ({"weights": "auto", "data": {}, "products": []}, "not both"),
    ({"weights": "auto", "data": {}, "method": "ties"}, "not for 'ties'"),
    ({"weights": "auto", "data": {}, "method": "greedy_soup"}, "not for 'greedy_soup'"),
    ({"weights": "auto", "data": {}, "scale": 0.5}, "leave scale out"),
    ({"weights": "auto", "data": {}, "transforms": ["dare"]}, "leave transforms out"),
    ({"weights": "auto", "data": {}}, "none of 'one'"),
    ({"weights": "auto", "data": {"on": []}}, "names a task 'on' .*did you mean 'one'"),
    ({"weights": "auto", "products": "/nowhere.json"}, "no products file /nowhere.json"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_errors_say_what_to_do(problem, given, message):
    error = FileNotFoundError if "nowhere" in message else ValueError
    with pytest.raises(error, match=message):
        merge(problem[0], tasks_of(problem), **{"method": "task_arithmetic", **given})


def test_weights_that_are_given_are_not_chosen(problem):
    with pytest.raises(ValueError, match=r"the weight of 'two', which is given as 0\.5"):
        merge(problem[0], tasks_of(problem, two=0.5), method="task_arithmetic", weights="auto", data={})


def test_an_output_that_exists_is_found_before_anything_is_measured(problem, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    options = {"method": "task_arithmetic", "weights": "auto", "data": {}}
    with pytest.raises(FileExistsError):
        merge(problem[0], tasks_of(problem), out=tmp_path / "out", **options)
