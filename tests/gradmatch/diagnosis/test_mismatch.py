"""Gradient mismatch: Eqs. 6 and 10 as identities on converged logistic regression, and the measured form."""

import math

import pytest
import torch

from gradmatch.common.layers import group_norms, layer_group
from gradmatch.measure.mismatch import (
    gradient_mismatch,
    mismatch_of,
    preconditioned_mismatch,
    task_mismatch,
    total_mismatch,
)
from gradmatch.measure.objective import Objective

DIM, N = 5, 40


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def slow_gradient(x, y, theta):
    """Gradient of sum_n log(1 + exp(-y_n x_n' theta)), one example and one coordinate at a time."""
    gradient = [0.0] * DIM
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        z = sum(a * b for a, b in zip(row, theta.tolist(), strict=True))
        for i in range(DIM):
            gradient[i] += -label * row[i] * sigmoid(-label * z)
    return torch.tensor(gradient, dtype=torch.float64)


def minimise(problems, h0, theta0):
    """argmin sum_t alpha_t l_t(theta) + 1/2 ||theta - theta0||^2_H0 by Newton's method (Eqs. 8 and 9)."""
    theta = theta0.clone()
    for _ in range(60):
        gradient, hessian = h0 * (theta - theta0), torch.diag(h0)
        for alpha, x, y in problems:
            p = torch.sigmoid(-y * (x @ theta))
            gradient = gradient - alpha * ((y * p)[:, None] * x).sum(0)
            hessian = hessian + alpha * x.T @ ((p * (1 - p))[:, None] * x)
        theta = theta - torch.linalg.solve(hessian, gradient)
    return theta


def logistic(seed, tasks=3, isotropic=False):
    """(theta0, h0, alpha, data, theta_t, theta*) of one random problem."""
    torch.manual_seed(seed)
    theta0 = 0.3 * torch.randn(DIM, dtype=torch.float64)  # small, so that Newton needs no damping
    h0 = torch.ones(DIM, dtype=torch.float64) if isotropic else torch.rand(DIM, dtype=torch.float64) * 4 + 0.5
    data = []
    for _ in range(tasks):
        x = 0.7 * torch.randn(N, DIM, dtype=torch.float64)
        data.append((x, torch.sign(x @ torch.randn(DIM, dtype=torch.float64) + torch.randn(N))))
    alpha = (torch.rand(tasks, dtype=torch.float64) + 0.3).tolist()
    fine = [minimise([(1.0, x, y)], h0, theta0) for x, y in data]
    target = minimise([(a, x, y) for a, (x, y) in zip(alpha, data, strict=True)], h0, theta0)
    return theta0, h0, alpha, data, fine, target


@pytest.mark.parametrize("seed", range(5))
def test_eq_10_is_an_identity_at_the_target(seed):
    theta0, h0, alpha, data, fine, target = logistic(seed)
    merged = theta0 + sum(a * (theta - theta0) for a, theta in zip(alpha, fine, strict=True))
    mismatches = [
        task_mismatch(slow_gradient(x, y, target), slow_gradient(x, y, theta))
        for (x, y), theta in zip(data, fine, strict=True)
    ]
    error = preconditioned_mismatch(total_mismatch(mismatches, alpha), h0)
    assert (target - merged + error).abs().max() < 1e-8
    assert error.abs().max() > 1e-2  # the identity is not 0 = 0


@pytest.mark.parametrize("seed", range(5))
def test_eq_6_is_eq_10_with_identity_curvature_and_weights_that_sum_to_one(seed):
    theta0, h0, _, data, fine, _ = logistic(seed, isotropic=True)
    alpha = [1 / 3] * 3
    target = minimise([(a, x, y) for a, (x, y) in zip(alpha, data, strict=True)], h0, theta0)
    average = sum(fine) / 3
    total = total_mismatch(
        [slow_gradient(x, y, target) - slow_gradient(x, y, t) for (x, y), t in zip(data, fine, strict=True)],
        alpha,
    )
    assert (target - average + total).abs().max() < 1e-8


@pytest.mark.parametrize("seed", range(3))
def test_gradient_mismatch_measures_with_a_module_what_the_slow_gradients_say(seed):
    theta0, h0, alpha, data, fine, _ = logistic(seed)
    module = torch.nn.Linear(DIM, 2, bias=False, dtype=torch.float64)

    def weights(theta):  # two-class softmax with logits (0, x'theta): the same likelihood
        return {"weight": torch.stack([torch.zeros_like(theta), theta])}

    objectives = {str(t): Objective(module, [(x, (y > 0).long())]) for t, (x, y) in enumerate(data)}
    merged = theta0 + sum(a * (theta - theta0) for a, theta in zip(alpha, fine, strict=True))
    tasks = {str(t): weights(theta) for t, theta in enumerate(fine)}
    arguments = {"alpha": dict(zip("012", alpha, strict=True)), "num_examples": dict.fromkeys("012", N)}
    arguments |= {"h0": {"weight": h0.expand(2, DIM)}}
    asked = []

    def gradient(task, w):
        asked.append(task)
        return objectives[task].gradient(w)

    result = gradient_mismatch(weights(merged), tasks, gradient, **arguments, keep_vectors=True)
    pairs = zip(data, fine, strict=True)
    slow = [slow_gradient(x, y, merged) - slow_gradient(x, y, t) for (x, y), t in pairs]
    total = total_mismatch(slow, alpha)
    torch.testing.assert_close(result.vectors["weight"][1], total, rtol=1e-10, atol=1e-10)
    root2 = math.sqrt(2)  # both rows carry the gradient, with opposite signs
    assert result.total_norm() == pytest.approx(root2 * float(total.norm()))
    assert result.preconditioned_norm() == pytest.approx(root2 * float((total / h0).norm()))
    assert result.task_norms() == pytest.approx({str(t): root2 * float(m.norm()) for t, m in enumerate(slow)})
    assert result.per_example() == pytest.approx(result.total_norm() / (3 * N))

    stored = {t: objectives[t].gradient(w) for t, w in tasks.items()}
    asked.clear()
    again = gradient_mismatch(weights(merged), tasks, gradient, **arguments, stored=stored)
    assert asked == ["0", "1", "2"]  # the stored gradients save the second pass
    assert again.total == pytest.approx(result.total)


def test_one_task_at_weight_one_has_no_mismatch():
    gradient = {"a": {"w": torch.randn(4), "b": torch.randn(2)}}
    result = mismatch_of(gradient, gradient, {"a": 1.0}, {"a": 10})
    assert result.total_norm() == 0
    assert result.preconditioned_norm() == 0


def test_gradients_scale_with_the_number_of_examples():
    module = torch.nn.Linear(3, 2)
    weights = {name: value.detach() for name, value in module.named_parameters()}
    batch = (torch.randn(8, 3), torch.randint(2, (8,)))
    seen = Objective(module, [batch]).gradient(weights)
    full = Objective(module, [batch], num_examples=800).gradient(weights)
    torch.testing.assert_close(full["weight"], 100 * seen["weight"])


def test_layers_and_groups():
    assert layer_group("bert.encoder.layer.11.output.dense.bias") == "bert.encoder.layer.11"
    assert layer_group("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_group("weight") == "weight"
    assert group_norms({"0.weight": 3.0, "0.bias": 4.0, "1.weight": 2.0}) == {"0": 5.0, "1": 2.0}
    gradient = {"a": {"0.w": torch.tensor([3.0]), "0.b": torch.tensor([4.0])}}
    zero = {"a": {"0.w": torch.zeros(1), "0.b": torch.zeros(1)}}
    rows = mismatch_of(gradient, zero, {"a": 0.5}, {"a": 1}, h0=2.0).layers()
    assert rows == {"a": {"0": 5.0}, "total": {"0": 2.5}, "preconditioned": {"0": 1.25}}


def test_errors_say_what_to_do():
    gradient = {"a": {"w": torch.ones(3)}}
    with pytest.raises(ValueError, match="no task"):
        mismatch_of({}, {}, {}, {})
    with pytest.raises(ValueError, match="'a' has no gradient of 'w'"):
        mismatch_of(gradient, {"a": {}}, {"a": 1.0}, {"a": 1})
    with pytest.raises(ValueError, match=r"^w: .* on 1 weights.* delta0"):
        mismatch_of(
            gradient, gradient, {"a": 1.0}, {"a": 1}, h0={"w": torch.tensor([0.0, 1.0, 2.0])}, delta0=0.0
        )
