"""The public contract, from outside: names, signatures, and what a user may rely on, on problems with a known answer."""

import importlib
import inspect

import pytest
import torch
from torch import nn

import gradmatch
from gradmatch import Task, analogy, merge, subtract
from gradmatch.estimators import Curvature, estimate

SIGNATURES = {
    "gradmatch.estimators.estimate": (
        "model batches method num_examples samples reduction seed likelihood gradient standard_error tolerance progress"
    ),
    "gradmatch.estimators.from_adam": "state model num_examples batch_size",
    "gradmatch.estimators.from_ivon": "optimizer model",
    "gradmatch.Task": "model curvature weight name",
    "gradmatch.merge": "base tasks method base_curvature base_weight delta0 out",
    "gradmatch.subtract": "base task base_curvature weight keep",
    "gradmatch.analogy": "base a b c",
    "gradmatch.diagnose": "base tasks merged base_curvature data",
    "gradmatch.open_checkpoint": "path",
    "gradmatch.forecast": "base tasks data products base_curvature base_weight delta0 span",
    "gradmatch.budget": "problem nats share largest",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    package, _, function = name.rpartition(".")
    found = inspect.signature(getattr(importlib.import_module(package), function))
    assert set(SIGNATURES[name].split()) <= set(found.parameters)


def test_the_tables_are_explicit_dicts():
    assert set(gradmatch.estimators.ESTIMATORS) >= {
        "fisher",
        "empirical_fisher",
        "ggn",
        "hessian",
        "kfac",
        "gram",
    }
    assert set(gradmatch.RULES) >= {"averaging", "weighted", "task_arithmetic", "fisher", "fisher_base"}
    assert set(gradmatch.RULES) >= {"gradient_matching", "measured", "removal"}


@pytest.mark.parametrize(
    "submodule",
    [
        "gradmatch.merging",
        "gradmatch.measure.mismatch",
        "gradmatch.estimators.estimation",
        "gradmatch.commands.budget",
    ],
)
def test_functions_stay_callable_whatever_was_imported(submodule):
    __import__(submodule)
    assert callable(gradmatch.merge)
    assert callable(gradmatch.diagnose)
    assert callable(gradmatch.forecast)
    assert callable(gradmatch.budget)
    assert callable(gradmatch.estimators.estimate)


# Linear regression whose features never meet: every Gram matrix is diagonal, so that diagonal curvature is exact.
FEATURES, TASKS = 6, 3


def diagonal_problem(generator):
    """One task: X with a single non-zero feature a row, and targets. Returns (X, y)."""
    rows = torch.arange(FEATURES).repeat_interleave(4)
    x = torch.zeros(len(rows), FEATURES, dtype=torch.float64)
    x[torch.arange(len(rows)), rows] = torch.rand(len(rows), generator=generator, dtype=torch.float64) + 0.5
    return x, torch.randn(len(rows), generator=generator, dtype=torch.float64)


def ridge(problems, weights, theta0, h0):
    """argmin sum_t w_t/2 ||X_t theta - y_t||^2 + 1/2 ||theta - theta0||^2_{H0}, H0 diagonal."""
    a = torch.diag(h0) + sum(w * x.T @ x for w, (x, _) in zip(weights, problems, strict=True))
    b = h0 * theta0 + sum(w * x.T @ y for w, (x, y) in zip(weights, problems, strict=True))
    return torch.linalg.solve(a, b)


@pytest.fixture
def regression():
    """theta0, h0 and tasks fine-tuned by Eq. 8, with their exact diagonal curvature."""
    generator = torch.Generator().manual_seed(1)
    theta0 = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    h0 = torch.rand(FEATURES, generator=generator, dtype=torch.float64) + 0.1
    problems = [diagonal_problem(generator) for _ in range(TASKS)]
    models = [ridge([p], [1.0], theta0, h0) for p in problems]
    curvatures = [Curvature.from_dict({"w": (x**2).mean(0)}, len(x)) for x, _ in problems]
    base_curvature = Curvature.from_dict({"w": h0}, 1)
    return theta0, h0, problems, models, curvatures, base_curvature


@pytest.mark.parametrize("alpha", [(1.0, 1.0, 1.0), (0.3, 1.7, 0.9)])
def test_gradient_matching_is_the_joint_solution(regression, alpha):
    theta0, h0, problems, models, curvatures, base_curvature = regression
    tasks = [Task({"w": m}, c, a) for m, c, a in zip(models, curvatures, alpha, strict=True)]
    merged = merge({"w": theta0}, tasks, base_curvature=base_curvature, delta0=0.0)["w"]
    target = ridge(problems, alpha, theta0, h0)
    assert torch.linalg.norm(merged - target) <= 1e-9 * torch.linalg.norm(target - theta0)
    arithmetic = merge({"w": theta0}, tasks, method="task_arithmetic")["w"]
    assert torch.linalg.norm(arithmetic - target) >= 1e-2 * torch.linalg.norm(target - theta0)


def test_removal_is_retraining_without_the_data(regression):
    theta0, h0, problems, _, curvatures, _ = regression
    base_problem, removed = problems[0], problems[1]
    both = ridge([base_problem, removed], [1.0, 1.0], theta0, h0)  # what we have: it knows both
    kept = ridge([base_problem], [1.0], theta0, h0)  # what we want
    h_both = h0 + (base_problem[0] ** 2).sum(0) + (removed[0] ** 2).sum(0)
    fine_tuned = ridge([removed], [1.0], both, h_both)  # Eq. 8 from the model that knows both
    result = subtract(
        {"w": both},
        Task({"w": fine_tuned}, curvatures[1]),
        base_curvature=Curvature.from_dict({"w": h_both}, 1),
        keep=1e-6,
        delta0=0.0,
    )["w"]
    assert torch.linalg.norm(result - kept) <= 1e-9 * torch.linalg.norm(both - kept)


def test_special_cases(regression):
    theta0, h0, _, models, curvatures, base_curvature = regression
    stacked, total = torch.stack(models), torch.stack([c.total("w") for c in curvatures])
    zero = Curvature.from_dict({"w": torch.zeros_like(h0)}, 1)

    def merged(method, curvature, weight, **options):
        tasks = [Task({"w": m}, curvature or c, weight) for m, c in zip(models, curvatures, strict=True)]
        return merge({"w": theta0}, tasks, method=method, **options)["w"]

    arithmetic = theta0 + 0.7 * (stacked - theta0).sum(0)
    mean, fisher = stacked.mean(0), (total * stacked).sum(0) / total.sum(0)
    for found, expected in (
        (merged("task_arithmetic", None, 0.7), arithmetic),
        (merged("gradient_matching", zero, 0.7, base_curvature=base_curvature), arithmetic),
        (merged("gradient_matching", zero, 0.7, base_curvature=zero), arithmetic),
        (merged("averaging", None, 1.0), mean),
        (merged("gradient_matching", zero, 1 / 3, base_curvature=zero), mean),
        (merged("fisher", None, 1.0, delta0=0.0), fisher),
        (merged("gradient_matching", None, 1.0, base_curvature=zero, delta0=1e-14), fisher),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_base_weight_scales_the_bases_curvature(regression):
    theta0, h0, _, models, curvatures, base_curvature = regression
    tasks = [Task({"w": m}, c) for m, c in zip(models, curvatures, strict=True)]
    scaled = merge({"w": theta0}, tasks, base_curvature=base_curvature, base_weight=0.1, delta0=0.0)["w"]
    given = merge({"w": theta0}, tasks, base_curvature=Curvature.from_dict({"w": 0.1 * h0}, 1), delta0=0.0)[
        "w"
    ]
    torch.testing.assert_close(scaled, given, rtol=1e-12, atol=1e-12)


def test_analogy(regression):
    theta0, _, _, models, _, _ = regression
    a, b, c = ({"w": m} for m in models)
    result = analogy({"w": theta0}, a, b, c)["w"]
    torch.testing.assert_close(result, models[2] + models[1] - models[0], rtol=1e-12, atol=1e-12)


class Odd(nn.Module):
    """A module no registry knows: a bare parameter, a custom layer, dictionary output."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.first = nn.Linear(5, 7)
        self.norm = nn.GroupNorm(1, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return {"logits": self.head(torch.tanh(self.norm(self.first(x * self.scale))))}


def per_example_squares(model, x, labels):
    """The definition: a loop over single examples, in float64."""
    model = model.double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row, label in zip(x.double(), labels, strict=True):
        out = model(row[None])
        logits = out["logits"] if isinstance(out, dict) else out
        loss = nn.functional.cross_entropy(logits, label[None])
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total[name] += g**2
    return {name: value / len(x) for name, value in total.items()}


@pytest.mark.parametrize("make", [Odd, lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))])
@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_empirical_fisher_of_any_module(make, batch_size):
    model, x, labels = make(), torch.randn(12, 5), torch.randint(3, (12,))
    batches = list(zip(x.split(batch_size), labels.split(batch_size), strict=True))
    curvature = estimate(model, batches, method="empirical_fisher", num_examples=240, progress=False)
    assert curvature.num_examples == 240
    for name, expected in per_example_squares(model, x, labels).items():
        error = (curvature.mean(name) - expected).abs().sum() / expected.abs().sum()
        assert error <= 1e-5, name


def test_estimate_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curvature = estimate(model, [(torch.randn(6, 5), torch.randint(3, (6,)))], progress=False)
    assert set(curvature) == {"0.bias", "2.weight", "2.bias"}
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
