"""Hessian diagonal of the loss at the true labels, by Hutchinson's estimator: E[z * (H z)] with signs z.

`samples` probes a batch, each one Hessian-vector product: forward over reverse (torch.func), or twice backward for
models whose operations have no forward derivative. The error bars are those of the probes. Entries may be negative:
this is no Fisher.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.fisher import GIVES, finish
from gradmatch.estimators.memory import raise_if_full
from gradmatch.estimators.problem import Problem
from gradmatch.estimators.randomness import signs
from gradmatch.estimators.sinks import DIAGONAL, GRADIENT, SPREAD, zeros

__all__ = ["GIVES", "finish", "start", "step"]

log = logging.getLogger(__name__)
Vector = dict[str, Tensor]


def start(problem: Problem) -> None:
    """Make the accumulators."""
    zeros(problem.parameters, DIAGONAL, problem.sums)
    if problem.standard_error:
        zeros(problem.parameters, SPREAD, problem.sums)
    if problem.gradient:
        zeros(problem.parameters, GRADIENT, problem.sums)


def step(problem: Problem, batch: Batch) -> None:
    """Add one batch: diagonal += z * (H z) for every probe, H of the loss summed over the batch."""
    problem.ensure_plan(batch)
    problem.label_kind, problem.draws = "true labels", problem.samples
    for probe in range(problem.samples):
        z = {
            name: signs(problem.seed, probe, batch.first * len(problem.parameters) + place, value.numel(), value.device)
            .view(value.shape).to(value.dtype)
            for place, (name, value) in enumerate(problem.parameters.items())
        }  # fmt: skip
        gradient, product = hessian_product(problem, batch, z)
        for name, value in product.items():
            diagonal = problem.sums[DIAGONAL + name]
            estimate = (z[name] * value).to(diagonal.dtype)
            diagonal.add_(estimate)
            if problem.standard_error:
                problem.sums[SPREAD + name].addcmul_(estimate, estimate, value=1 / batch.size)
            if problem.gradient and probe == 0:
                problem.sums[GRADIENT + name].add_(gradient[name])
    problem.counts["predictions"] += _predictions(problem, batch)
    problem.counts["spread_units"] += problem.samples
    problem.counts["spread_examples"] += batch.size * problem.samples


def _predictions(problem: Problem, batch: Batch) -> int:
    """How many of the batch's labels count."""
    with torch.no_grad():
        output = problem.model(*batch.args, **batch.kwargs)
    return problem.likelihood_for(output, batch).read(output, batch).count()


def hessian_product(problem: Problem, batch: Batch, z: Vector) -> tuple[Vector, Vector]:
    """Gradient and Hessian-vector product of the batch's summed loss, by parameter name."""
    values = {name: value.detach() for name, value in problem.parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has first derivatives only
        if not problem.notes.get("product"):
            try:
                found = _forward_over_reverse(problem, batch, values, z)
            except (RuntimeError, NotImplementedError) as error:
                raise_if_full(error)
                log.info("no forward-mode derivative, going backward twice: %s", str(error).split("\n")[0])
                problem.notes["product"] = "backward twice"
            else:
                problem.notes["product"] = "forward over reverse"
                return found
        if problem.notes["product"] == "forward over reverse":
            return _forward_over_reverse(problem, batch, values, z)
        return _backward_twice(problem, batch, values, z)


def loss(problem: Problem, batch: Batch, values: Vector) -> Tensor:
    """-sum_n log p(y_n | x_n) of the batch, with the model's parameters replaced by `values`; a scalar."""
    output = torch.func.functional_call(_Whole(problem.model), _prefixed(values), batch.args, batch.kwargs)
    likelihood = problem.likelihood_for(output, batch)
    return -likelihood.log_prob(likelihood.read(output, batch)).sum()


class _Whole(nn.Module):
    """The model as a child, so that parameters are replaced under all their names, tied ones too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)


def _prefixed(values: Vector) -> Vector:
    return {f"model.{name}": value for name, value in values.items()}


def _forward_over_reverse(problem: Problem, batch: Batch, values: Vector, z: Vector) -> tuple[Vector, Vector]:
    gradient = torch.func.grad(lambda at: loss(problem, batch, at))
    first, second, *_ = torch.func.jvp(gradient, (values,), (z,))
    return first, second


def _backward_twice(problem: Problem, batch: Batch, values: Vector, z: Vector) -> tuple[Vector, Vector]:
    at = {name: value.clone().requires_grad_() for name, value in values.items()}
    with torch.enable_grad():
        value = loss(problem, batch, at)
        first = torch.autograd.grad(value, list(at.values()), create_graph=True, allow_unused=True)
        inner = sum(
            ((g * z[name]).sum() for name, g in zip(at, first, strict=True) if g is not None), torch.zeros(())
        )
        if not inner.requires_grad:  # a loss that is linear in the parameters
            second: tuple[Tensor | None, ...] = (None,) * len(at)
        else:
            second = torch.autograd.grad(inner, list(at.values()), allow_unused=True)

    def filled(found: tuple[Tensor | None, ...]) -> Vector:
        return {
            name: torch.zeros_like(values[name]) if g is None else g.detach()
            for name, g in zip(at, found, strict=True)
        }

    return filled(first), filled(second)
