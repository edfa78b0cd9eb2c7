"""BackPACK as an independent check of the engine, and what it cannot do."""

import sys

import pytest
import torch
from torch import nn

from gradmatch.estimators import Gaussian, estimate
from tests import oracle
from tests.estimators.architectures import mlp as in_place
from tests.estimators.architectures import plain

backpack = pytest.importorskip("backpack", reason="backpack-for-pytorch is optional")


def mlp():
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 3)
    ).double()


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()


CASES = {"mlp": (mlp, (4,)), "cnn": (cnn, (2, 6, 6))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["ggn", "empirical_fisher"])
def test_two_implementations_agree(name, method):
    build, shape = CASES[name]
    model, batch = build(), plain(*shape)
    given = [(batch["x"][:3], batch["labels"][:3]), (batch["x"][3:], batch["labels"][3:])]
    ours = estimate(model, given, method=method, progress=False)
    theirs = estimate(model, given, method=method, backend="backpack", progress=False)
    assert oracle.relative_l1(ours, theirs) < 1e-9
    assert theirs.info["backend"] == "backpack"
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("likelihood", "targets"), [(Gaussian(0.5), torch.randn(5, 3)), ("bernoulli", torch.rand(5, 3).round())]
)
@pytest.mark.parametrize("method", ["ggn", "empirical_fisher"])
def test_other_likelihoods_agree(likelihood, targets, method):
    if likelihood == "bernoulli" and method == "ggn":
        with pytest.raises(ValueError, match="BackPACK has no loss for the likelihood bernoulli"):
            estimate(
                mlp(), [(plain(4)["x"], targets)], method=method, likelihood=likelihood, backend="backpack"
            )
        return
    model, x = mlp(), plain(4)["x"]
    options = {"method": method, "likelihood": likelihood, "progress": False}
    ours = estimate(model, [(x, targets.double())], **options)
    theirs = estimate(model, [(x, targets.double())], backend="backpack", **options)
    assert oracle.relative_l1(ours, theirs) < 1e-9


def test_batch_l2_of_backpack_is_the_trace_of_ours():
    model, batch = mlp(), plain(4)
    twin = backpack.extend(mlp())
    twin.load_state_dict(model.state_dict())
    with backpack.backpack(backpack.extensions.BatchL2Grad()):
        backpack.extend(nn.CrossEntropyLoss(reduction="sum"))(twin(batch["x"]), batch["labels"]).backward()
    ours = estimate(model, [(batch["x"], batch["labels"])], method="empirical_fisher", progress=False)
    for name, value in twin.named_parameters():
        assert float(ours[name].sum()) == pytest.approx(float(value.batch_l2.sum()) / 5, rel=1e-9)


def test_hessian_diagonal_is_what_hutchinson_estimates():
    model, batch = mlp(), plain(4)
    given = [(batch["x"], batch["labels"])]
    exact = estimate(model, given, method="hessian", backend="backpack", progress=False)
    noisy = estimate(model, given, method="hessian", samples=150, standard_error=True, progress=False)
    for name in exact:
        error = noisy.standard_error(name) + 1e-12
        assert float(((noisy[name] - exact[name]) / error).abs().max()) < 5.5


def test_sampled_ggn_is_reproducible():
    model, batch = mlp(), plain(4)
    options = {"method": "ggn", "backend": "backpack", "labels": "sampled", "samples": 2, "progress": False}
    one, two = (estimate(model, [(batch["x"], batch["labels"])], **options) for _ in range(2))
    assert oracle.relative_l1(one, two) == 0
    assert one.info["labels"] == "sampled by BackPACK"


class Poisson:
    def sample(self, output, generator):
        return output

    def log_prob(self, output, labels):
        return output.sum(1)


GIVEN = [(plain(4)["x"], plain(4)["labels"])]
REFUSED = {
    "method": (mlp, GIVEN, {"method": "fisher"}, "offers ggn, hessian, empirical_fisher, not 'fisher'"),
    "error bars": (mlp, GIVEN, {"method": "ggn", "standard_error": True}, "are the engine's"),
    "module": (lambda: nn.Linear(4, 3), GIVEN, {"method": "ggn"}, "takes a plain nn.Sequential, not Linear"),
    "layer": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), GIVEN, {"method": "ggn"},
        r"no second derivatives for LayerNorm \(module '1'\)",
    ),
    "in place": (in_place, GIVEN, {"method": "ggn"}, r"cannot follow the in-place ReLU \(module '1'\)"),
    "labels": (mlp, [GIVEN[0][0]], {"method": "ggn"}, "losses need labels"),
    "loss": (mlp, GIVEN, {"method": "ggn", "likelihood": Poisson()}, "has no loss for the likelihood Poisson"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    build, given, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        estimate(build(), given, backend="backpack", progress=False, **options)


def test_without_backpack(monkeypatch):
    monkeypatch.setitem(sys.modules, "backpack", None)
    with pytest.raises(ImportError, match="pip install --no-deps backpack-for-pytorch"):
        estimate(mlp(), GIVEN, method="ggn", backend="backpack")
