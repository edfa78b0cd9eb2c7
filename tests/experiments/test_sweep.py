"""The forecast of a sweep: exact where the loss is quadratic in the weights."""

import pytest
import torch
from torch import nn

from experiments.sweep import forecast_losses
from gradmatch.diagnosis.objective import Objective


def test_the_forecast_is_the_loss_itself_for_linear_regression():
    torch.manual_seed(0)
    losses = {}
    for task in ("a", "b"):
        x, y = torch.randn(30, 4), torch.randn(30, 1)
        losses[task] = Objective(nn.Linear(4, 1), [(x, y)], num_examples=90, likelihood="regression")
    weights = {"weight": torch.randn(1, 4), "bias": torch.randn(1)}
    told = forecast_losses(weights, losses)
    for task, loss in losses.items():
        assert told[task] == pytest.approx(loss.loss(weights) / 90, rel=1e-5)
    assert told["mean"] == pytest.approx((told["a"] + told["b"]) / 2)
