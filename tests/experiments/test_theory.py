"""Convex problems: closed forms against autograd, and the claims on a few seeds."""

import json

import pytest
import torch
from torch.func import grad, hessian

from experiments import theory
from experiments.convex import Objective, Softmax, Squares, ridge_world, sampled_fisher, softmax_world


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["squares", "softmax"])
def test_derivatives_are_those_of_the_value(kind):
    x = torch.randn(7, 4, dtype=torch.float64)
    loss = (
        Squares(x, torch.randn(7, dtype=torch.float64))
        if kind == "squares"
        else Softmax(x, torch.randint(3, (7,)))
    )
    theta = torch.randn(4 if kind == "squares" else 12, dtype=torch.float64)
    close(loss.gradient(theta), grad(loss.value)(theta))
    close(loss.hessian(theta), hessian(loss.value)(theta))


def test_minima_have_no_gradient():
    for world in (ridge_world(0), softmax_world(0, diagonal=False), softmax_world(1, diagonal=True)):
        alpha = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
        loss = Objective(world.losses, alpha, world.theta0, world.h0)
        assert grad(loss.value)(world.target(alpha)).abs().max() < 1e-9
        for theta, own in zip(world.thetas, world.losses, strict=True):
            step = own.gradient(theta) + world.h0 @ (theta - world.theta0)  # Eq. 8
            assert step.abs().max() < 1e-9


def test_refinement_halves_a_step_that_would_rise():
    world = softmax_world(3, diagonal=False)
    loss = Objective(world.losses, torch.ones(3, dtype=torch.float64), world.theta0, world.h0)
    far = world.theta0 + 30 * torch.randn_like(world.theta0)
    assert loss.value(loss.refined(far)) <= loss.value(far)


def test_sampled_fisher_is_near_the_exact_diagonal():
    world = softmax_world(0, diagonal=False, rows=4000)
    exact = world.losses[0].hessian(world.thetas[0]).diagonal()
    sampled = sampled_fisher(world.data[1], world.thetas[0], 3, seed=0).total("weight").double().flatten()
    assert (sampled - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("claim", ["exactness", "identities", "special_cases", "closer"])
def test_claims_hold_on_two_seeds(tmp_path, claim):
    getattr(theory, claim)(tmp_path, seeds=[100, 101])
    assert json.loads((tmp_path / "claim.json").read_text())["holds"]


def test_a_claim_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(
        theory, "gradient_matching_full", lambda world, alpha, hessians, h0: world.arithmetic(alpha)
    )
    theory.exactness(tmp_path, seeds=[0, 1])
    assert not json.loads((tmp_path / "claim.json").read_text())["holds"]


def test_refinement_shrinks_the_distance_at_each_step(tmp_path):
    theory.refinement(tmp_path, seeds=[0, 1, 2])
    value = json.loads((tmp_path / "claim.json").read_text())["value"]
    assert value["share that shrinks at each step"] == 1
    assert value["seeds whose objective rose"] == 0
    assert value["after four steps, largest"] < value["after three steps, largest"] < 0.1


def test_the_study_prints_its_verdicts(tmp_path, run):
    config = tmp_path / "theory.yaml"
    config.write_text("experiment: theory\nseeds: 2\n")
    records, out = run(config)
    assert "claim 1: holds." in out
    assert [record["claim"] for record in records if "claim" in record] == [1, 2, 3, 4, 10]
