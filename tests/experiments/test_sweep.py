"""The forecast of a sweep: the quadratic of each task at its own fine-tune."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.sweep import forecast_losses
from gradmatch.measure.objective import Objective


def test_each_task_is_expanded_at_its_own_weights():
    """Softmax regression: gradient and GGN (its Hessian) by autograd in float64, at each fine-tune."""
    torch.manual_seed(0)
    losses, expected = {}, {}
    weights = {"weight": torch.randn(3, 4, dtype=torch.float64)}
    for task in ("a", "b"):
        x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
        module = nn.Linear(4, 3, bias=False, dtype=torch.float64)
        losses[task] = Objective(module, [(x, y)], num_examples=90)

        def mean_loss(w, x=x, y=y):
            return cross_entropy(x @ w.view(3, 4).T, y)

        own = module.weight.detach().flatten()
        d = weights["weight"].flatten() - own
        g, h = torch.func.grad(mean_loss)(own), torch.func.hessian(mean_loss)(own)
        expected[task] = float(mean_loss(own) + g @ d + d @ h @ d / 2)
    told = forecast_losses(weights, losses)
    assert told["a"] == pytest.approx(expected["a"], rel=1e-9)
    assert told["b"] == pytest.approx(expected["b"], rel=1e-9)
    assert told["mean"] == pytest.approx((told["a"] + told["b"]) / 2)
