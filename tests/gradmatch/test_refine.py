"""Refinement on classifiers small enough to know the minimum of Eq. 9, and step control where the curvature is wrong."""

import itertools

import pytest
import torch
from torch import nn

from gradmatch.measure.objective import Objective
from gradmatch.refine import exact_step, objective, objective_gradient, refine

ALPHA = {"a": 1.0, "b": 0.5}


@pytest.fixture
def world():
    """Softmax regression on two tasks in float64: module, losses, base, H0's diagonal."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    module = nn.Linear(4, 3, dtype=torch.float64)
    losses = {}
    for task in ALPHA:
        x = random(60, 4)
        labels = (x @ random(4, 3) + 0.5 * random(60, 3)).argmax(-1)
        losses[task] = Objective(module, [(x[:40], labels[:40]), (x[40:], labels[40:])], num_examples=120)
    theta0 = {"weight": random(3, 4), "bias": random(3)}
    h0 = {name: 1 + value.abs() for name, value in theta0.items()}
    return losses, theta0, h0


def minimum(losses, theta0, h0):
    """theta* by plain gradient descent on a formula of its own."""
    w, b = (theta0[name].clone().requires_grad_(True) for name in ("weight", "bias"))
    optimizer = torch.optim.LBFGS([w, b], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def value():
        prior = (h0["weight"] * (w - theta0["weight"]) ** 2).sum() + (
            h0["bias"] * (b - theta0["bias"]) ** 2
        ).sum()
        fit = 0.0
        for task, loss in losses.items():
            for batch in loss.batches:
                log_p = (batch.args[0] @ w.T + b).log_softmax(-1)
                fit = fit - 2 * ALPHA[task] * log_p[torch.arange(len(log_p)), batch.labels].sum()
        return fit + prior / 2

    def closure():
        optimizer.zero_grad()
        total = value()
        total.backward()
        return total

    optimizer.step(closure)
    return {"weight": w.detach(), "bias": b.detach()}, float(value().detach())


def diagonal(losses):
    """The exact diagonal of each task's GGN: of softmax regression, p (1 - p) x^2, times 2 for the half of the examples seen."""

    def curvature(task, theta):
        x = torch.cat([batch.args[0] for batch in losses[task].batches])
        p = (x @ theta["weight"].T + theta["bias"]).softmax(-1)
        spread = 2 * p * (1 - p)
        return {"weight": spread.T @ x.square(), "bias": spread.sum(0)}

    return curvature


def distance(theta, other):
    return sum(float((theta[name] - other[name]).square().sum()) for name in other) ** 0.5


def test_it_goes_to_the_minimum_and_the_objective_never_rises(world):
    losses, theta0, h0 = world
    target, least = minimum(losses, theta0, h0)
    start = {**theta0, "counter": torch.tensor(3)}
    found = refine(start, theta0, losses, alpha=ALPHA, h0=h0, curvature=diagonal(losses), steps=60)
    assert found.values[0] == pytest.approx(objective(theta0, theta0, losses, ALPHA, h0))
    assert all(after <= before for before, after in itertools.pairwise(found.values))
    assert 0 <= found.values[-1] - least < 1e-4 * (found.values[0] - least)
    assert distance(found.theta, target) < 2e-2 * distance(theta0, target)
    assert found.theta["counter"] == 3


def test_the_gradient_is_that_of_the_objective(world):
    losses, theta0, h0 = world
    theta = {name: value + 0.3 for name, value in theta0.items()}
    gradient = objective_gradient(theta, theta0, losses, ALPHA, h0)
    for name, index in (("weight", (1, 2)), ("bias", (0,))):
        values = []
        for sign in (1, -1):
            moved = {**theta, name: theta[name].clone()}
            moved[name][index] += sign * 1e-6
            values.append(objective(moved, theta0, losses, ALPHA, h0))
        assert float(gradient[name][index]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_a_curvature_of_the_wrong_size_changes_no_step(world, scale):
    losses, theta0, h0 = world
    unit = {name: torch.ones_like(value) for name, value in theta0.items()}
    zero = {name: 0 * value for name, value in h0.items()}
    settings = {"alpha": ALPHA, "h0": zero, "steps": 2}
    expected = refine(theta0, theta0, losses, curvature=lambda task, theta: unit, **settings)
    wrong = {name: scale * value for name, value in unit.items()}
    found = refine(theta0, theta0, losses, curvature=lambda task, theta: wrong, **settings)
    assert found.values == pytest.approx(expected.values)
    assert found.values[2] < found.values[1] < found.values[0]


def test_it_stops_where_no_length_helps(world):
    losses, theta0, h0 = world
    target, least = minimum(losses, theta0, h0)
    # With the damping positive: a direction that is one of descent.
    uphill = {name: -2 * h0[name] - 1e3 for name in h0}
    settings = {"alpha": ALPHA, "h0": h0, "damping": 1e4, "steps": 4, "halvings": 0}
    found = refine(target, theta0, losses, curvature=lambda task, theta: uphill, **settings)
    assert (found.sizes, found.values) == ([0.0], pytest.approx([least, least]))
    assert distance(found.theta, target) == 0


def test_an_exact_step_is_newtons_where_there_is_one_weight(world):
    losses, theta0, h0 = world
    gradient = {"bias": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)}
    first = {"bias": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)}
    curved = float(h0["bias"][0]) + sum(
        a * float(losses[t].ggn_products(theta0, [first])[0, 0]) for t, a in ALPHA.items()
    )
    direction = {"bias": -gradient["bias"] / curved}
    assert exact_step(theta0, direction, gradient, losses, ALPHA, h0) == pytest.approx(1)
    assert exact_step(theta0, {"bias": 0 * first["bias"]}, gradient, losses, ALPHA, h0) == 1


def test_faults(world):
    losses, theta0, h0 = world
    zero = {name: 0 * value for name, value in h0.items()}
    given = {"losses": losses, "alpha": ALPHA, "h0": h0, "curvature": diagonal(losses)}
    for change, text in (
        ({"alpha": {"a": 1.0}}, "alpha has weights for a, losses has a, b; both must name the same tasks"),
        ({"losses": {}, "alpha": {}}, "alpha has weights for no task, losses has none"),
        ({"damping": -1}, "damping is -1"),
        ({"h0": zero, "curvature": lambda *_: zero}, r"weight: H0 \+ .* H_t is not positive on 12 weights"),
    ):
        with pytest.raises(ValueError, match=text):
            refine(theta0, theta0, **{**given, **change})
