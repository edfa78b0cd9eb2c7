"""Forecasts: exact on quadratics, weights as good as brute force, Pareto points that nothing beats."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from gradmatch.choosing.auto import auto_weights, make_directions
from gradmatch.measure.forecast import (
    Products,
    best_coefficients,
    calibrate,
    pareto_front,
    solve_box,
)
from gradmatch.measure.objective import Objective

DIM = 6


def random_products(seed, tasks=3, num_examples=100):
    """Convex quadratics over span{tau}: theta_t is the minimum of its own loss, so the slope is 0 there."""
    rng = np.random.default_rng(seed)
    names = tuple(f"t{i}" for i in range(tasks))
    made = []
    for i, name in enumerate(names):
        a, slope = rng.standard_normal((tasks + 2, tasks)), 0.1 * rng.standard_normal(tasks)
        made.append(Products(name, names, np.eye(tasks)[i], slope, a.T @ a, num_examples=num_examples))
    return made


def ridge(seed, tasks=3):
    """Linear regressions from one base: modules, data, fine-tunes trained half-way only (gradients are not zero)."""
    torch.manual_seed(seed)
    base = {"weight": torch.randn(1, DIM, dtype=torch.float64)}
    data, models = {}, {}
    for t in range(tasks):
        x = torch.randn(30, DIM, dtype=torch.float64)
        y = x @ torch.randn(DIM, 1, dtype=torch.float64)
        best = torch.linalg.lstsq(x, y).solution.T
        data[f"t{t}"] = (x, y)
        models[f"t{t}"] = {"weight": base["weight"] + 0.6 * (best - base["weight"])}
    module = nn.Linear(DIM, 1, bias=False, dtype=torch.float64)
    return base, models, {t: Objective(module, [pair], num_examples=90) for t, pair in data.items()}, data


@pytest.mark.parametrize("seed", range(3))
def test_forecast_is_exact_on_linear_regression(seed):
    base, models, objectives, data = ridge(seed)
    result = auto_weights(base, models, objectives)
    rng = np.random.default_rng(seed)
    for c in (rng.uniform(-1, 2, 3), np.zeros(3), np.ones(3)):
        theta = base["weight"] + sum(
            a * (models[t]["weight"] - base["weight"]) for a, t in zip(c, models, strict=True)
        )
        for p in result.products:
            x, y = data[p.task]
            slow = [
                0.5 * (float(v) - sum(a * b for a, b in zip(row.tolist(), w[0].tolist(), strict=True))) ** 2
                for w in (theta, models[p.task]["weight"])
                for row, v in zip(x, y, strict=True)
            ]
            rise = 3 * (sum(slow[:30]) - sum(slow[30:]))  # N = 90, 30 seen
            assert p.rise(c) == pytest.approx(rise, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_best_weights_equal_the_least_squares_solution_in_the_span(seed):
    base, models, objectives, data = ridge(seed)
    found = auto_weights(base, models, objectives, lower=-math.inf)
    u = torch.cat([models[t]["weight"] - base["weight"] for t in models]).T  # (D, T)
    x = torch.cat([data[t][0] for t in models])
    y = torch.cat([data[t][1] for t in models])
    c = torch.linalg.lstsq(x @ u, y - x @ base["weight"].T).solution[:, 0]
    assert list(found.weights.values()) == pytest.approx(c.tolist(), rel=1e-6)
    assert found.best.trusted
    theta = found.model(base)["weight"]
    torch.testing.assert_close(theta, base["weight"] + (u @ c)[None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_bounded_weights_are_no_worse_than_a_fine_grid(seed):
    products = random_products(seed, tasks=2)
    found = best_coefficients(products, lower=0.0, upper=0.8)
    assert all(0 <= c <= 0.8 for c in found.coefficients.values())
    points = itertools.product(np.linspace(0, 0.8, 81), repeat=2)
    least = min(sum(p.rise(np.array(c)) / p.num_examples for p in products) for c in points)
    assert least - 4e-3 <= found.objective <= least + 1e-12


def test_solve_box_meets_the_optimality_conditions():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a = rng.standard_normal((5, 4))
        h, b = a.T @ a + 1e-3 * np.eye(4), rng.standard_normal(4)
        c = solve_box(h, b, 0.0, 1.0)
        slope = h @ c + b
        for value, s in zip(c, slope, strict=True):
            assert s == pytest.approx(0, abs=1e-7) or (value == 0 and s > 0) or (value == 1 and s < 0)


def test_importance_moves_the_weights_towards_a_task():
    products = random_products(1)
    one = best_coefficients(products, {"t0": 1.0, "t1": 1e-9, "t2": 1e-9}, lower=-math.inf)
    even = best_coefficients(products, lower=-math.inf)
    assert one.rises["t0"] < even.rises["t0"]
    held = best_coefficients(products, free=["t1"])
    assert list(held.coefficients) == ["t1"]


@pytest.mark.parametrize("tasks", [2, 3])
def test_pareto_front_has_no_dominated_point(tasks):
    front = pareto_front(random_products(4, tasks), points=6, lower=-math.inf)
    assert len(front) == (6 if tasks == 2 else 21)
    points = [tuple(point.rises.values()) for point in front]
    for p, q in itertools.permutations(points, 2):
        assert not all(a < b - 1e-9 for a, b in zip(p, q, strict=True))


def test_groups_give_each_layer_group_its_own_weight():
    base = {"a.w": torch.zeros(2), "b.w": torch.zeros(2)}
    tasks = {"t": {"a.w": torch.ones(2), "b.w": 2 * torch.ones(2)}}
    directions, positions = make_directions(base, tasks, groups=["a"])
    assert list(directions) == ["t@a", "t@rest"]
    assert positions == {"t": {"t@a": 1.0, "t@rest": 1.0}}
    assert list(directions["t@rest"]) == ["b.w"]


@pytest.mark.parametrize("seed", range(2))
def test_preconditioned_span_forecasts_from_the_fine_tunes(seed):
    """On linear regression the forecast of any merge in the span of the terms of Eq. 12 is exact as well."""
    from gradmatch.estimators import Curvature

    base, models, objectives, _ = ridge(seed)
    known = {t: {"weight": torch.rand(1, DIM, dtype=torch.float64)} for t in models}
    curvatures = {t: Curvature.from_dict(mean, 90) for t, mean in known.items()}
    options = {"curvatures": curvatures, "base_curvature": 2.0, "span": "preconditioned", "lower": -math.inf}
    found = auto_weights(base, models, objectives, **options)
    h0, h = 2.0 + 1e-6, {t: c.total("weight") for t, c in curvatures.items()}
    h_bar = h0 + sum(h.values())
    theta = base["weight"].clone()
    for t, c in found.weights.items():
        theta += c * (h0 + h[t]) * (models[t]["weight"] - base["weight"]) / h_bar
    torch.testing.assert_close(found.model(base)["weight"], theta)
    for t, objective in objectives.items():
        measured = objective.loss({"weight": theta}) - objective.loss(models[t])
        assert found.best.rises[t] == pytest.approx(measured, rel=1e-6)


def test_calibration():
    product = random_products(0, tasks=1)[0]
    probes = [(np.array([c]), 2 * product.rise(np.array([c]))) for c in (0.0, 0.5, 2.0)]
    found = calibrate(product, probes)
    assert found.scale == pytest.approx(2)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.region == max(product.distance(c) for c, _ in probes)
    wild = [*probes, (np.array([9.0]), -1000.0 * product.num_examples)]
    assert calibrate(product, wild).region < product.distance(np.array([9.0]))


def test_forecasts_beyond_a_uniform_guess_are_not_trusted():
    curvature, options = np.array([[300.0]]), {"num_examples": 100, "limit": math.log(2)}
    p = Products("t", ("t",), np.ones(1), np.zeros(1), curvature, **options)
    assert p.trusted(np.zeros(1)) is False  # 1.5 nats an example
    assert p.trusted(np.array([0.5])) is True


def test_errors_say_what_to_do():
    products = random_products(0)
    other = Products("x", ("u",), np.ones(1), np.zeros(1), np.eye(1))
    broken = Products("x", ("u",), np.ones(1), np.zeros(1), np.array([[np.nan]]))
    base, models, objectives, _ = ridge(0)
    for call, text in (
        (lambda: best_coefficients([]), "no products"),
        (lambda: best_coefficients(products, lower=1, upper=0), "above the upper"),
        (lambda: best_coefficients([*products, other]), "'x' has directions"),
        (lambda: best_coefficients([broken]), "'x' are not finite"),
        (lambda: pareto_front(products[:1]), "two or three tasks, got 1"),
        (lambda: calibrate(products[0], []), "no probes"),
        (lambda: auto_weights(base, models), "nothing to choose weights from"),
        (lambda: auto_weights(base, models, objectives, span="ta"), "unknown span 'ta'"),
        (lambda: auto_weights(base, models, objectives, groups=["z"]), "no layer group 'z'"),
        (lambda: auto_weights(base, models, objectives, span="preconditioned"), "needs curvatures"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
