"""BackPACK (Dangel et al. 2020) as another way to the same numbers, for plain nn.Sequential nets.

GGN diagonal exact or by sampling, Hessian diagonal exact, sums of squared gradients. BackPACK extends modules in place,
so it works on a copy. It is slower than our engine (one backward pass per class) and knows fewer layers; it is here as
an independent check, and for the exact Hessian diagonal, which nobody else has.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.categorical import Categorical
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fisher import finish
from gradmatch.estimators.problem import Problem
from gradmatch.estimators.sinks import DIAGONAL, zeros
from gradmatch.estimators.values import Bernoulli, Gaussian

METHODS = ("ggn", "hessian", "empirical_fisher")
LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Flatten, nn.Dropout, nn.Identity, nn.ReLU, nn.Sigmoid, nn.Tanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AvgPool3d, nn.ZeroPad2d,
)  # fmt: skip


def for_method(problem: Problem, method: str) -> BackpackEstimator:
    """The estimator for a run, after checking that BackPACK can do it."""
    try:
        import backpack as _  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("backpack", "einops", "unfoldnd"):
            raise  # something that BackPACK imports is broken, not missing
        raise ImportError(
            'backend="backpack" needs BackPACK: pip install --no-deps backpack-for-pytorch einops unfoldnd'
        ) from error
    if method not in METHODS:
        raise GradmatchError(f'backend="backpack" offers {", ".join(METHODS)}, not {method!r}', "backend")
    if problem.standard_error or problem.gradient:
        raise GradmatchError(
            'standard_error and gradient are the engine\'s; leave backend="backpack" away for them', "backend"
        )
    _check_layers(problem.model)
    return BackpackEstimator(method)


def _check_layers(model: nn.Module) -> None:
    if not isinstance(model, nn.Sequential):
        raise GradmatchError(
            f'backend="backpack" takes a plain nn.Sequential, not {type(model).__name__}', "backend"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            continue
        if type(module) not in LAYERS:
            raise GradmatchError(
                f"BackPACK has no second derivatives for {type(module).__name__} (module {name!r}); use the engine",
                "backend",
                name,
            )
        if getattr(module, "inplace", False):
            raise GradmatchError(
                f"BackPACK cannot follow the in-place {type(module).__name__} (module {name!r}); use inplace=False",
                "backend",
                name,
            )


class BackpackEstimator:
    """One method of BackPACK behind the interface of the estimators."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.model: nn.Module | None = None

    def start(self, problem: Problem) -> None:
        """Accumulators, and a copy of the model that BackPACK may extend."""
        from backpack import extend

        zeros(problem.parameters, DIAGONAL, problem.sums)
        problem.notes["backend"] = "backpack"
        self.model = extend(copy.deepcopy(problem.model))
        for name, value in self.model.named_parameters():
            value.requires_grad_(name in problem.parameters)

    def step(self, problem: Problem, batch: Batch) -> None:
        """Add one batch."""
        from backpack import backpack, extensions

        assert self.model is not None
        output = self.model(*batch.args, **batch.kwargs)
        likelihood = problem.likelihood_for(output, batch)
        reading = likelihood.read(output, batch)
        problem.counts["predictions"] += reading.count()
        loss, factor = self._loss(likelihood, reading.labels, output)
        problem.label_kind = "true labels"
        if self.method == "ggn" and problem.labels == "sampled":
            extension, field = extensions.DiagGGNMC(mc_samples=problem.samples), "diag_ggn_mc"
            problem.label_kind = "sampled by BackPACK"
            torch.manual_seed(problem.seed + batch.first)
        elif self.method == "ggn":
            extension, field = extensions.DiagGGNExact(), "diag_ggn_exact"
            problem.label_kind = "exact expectation over labels"
        elif self.method == "hessian":
            extension, field = extensions.DiagHessian(), "diag_h"
        else:
            extension, field = extensions.SumGradSquared(), "sum_grad_squared"
            factor = factor**2
        with backpack(extension):
            loss.backward()
        for name, value in self.model.named_parameters():
            if name in problem.parameters:
                problem.sums[DIAGONAL + name].add_(getattr(value, field), alpha=factor)
                delattr(value, field)
        self.model.zero_grad()

    def finish(self, problem: Problem, seen: int) -> dict[str, Any]:
        """Per-example means."""
        return finish(problem, seen)

    def _loss(self, likelihood: Any, labels: Any, output: Any) -> tuple[Any, float]:
        """An extended loss summed over the batch, and what to multiply it by to have -log p."""
        from backpack import extend

        if labels is None:
            raise GradmatchError(
                "BackPACK's losses need labels, even where the result does not depend on them", "backend"
            )
        if isinstance(likelihood, Categorical) and output.dim() == 2:
            return extend(nn.CrossEntropyLoss(reduction="sum"))(output, labels.view(-1)), 1.0
        if isinstance(likelihood, Gaussian):
            return extend(nn.MSELoss(reduction="sum"))(output, labels.view(output.shape)), 1 / (
                2 * likelihood.variance
            )
        if isinstance(likelihood, Bernoulli) and self.method == "empirical_fisher":
            return extend(nn.BCEWithLogitsLoss(reduction="sum"))(output, labels.view(output.shape)), 1.0
        raise GradmatchError(
            f"BackPACK has no loss for the likelihood {likelihood.name} with outputs of shape {list(output.shape)}",
            "backend",
        )
