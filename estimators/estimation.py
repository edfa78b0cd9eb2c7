"""`estimate`: options checked, the model made ready, batches added up, and what came out as a Curvature."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from estimators import empirical_fisher, fisher, ggn
from estimators.batches import Batch, BatchReader
from estimators.curvature import Curvature, check_num_examples, fingerprint, model_sampler
from estimators.inference import make_likelihood
from estimators.problem import Problem, prepared, trainable_parameters
from estimators.sinks import FOURTHS, GRADIENT, SQUARES

log = logging.getLogger(__name__)


class Estimator(Protocol):
    """What a module in ESTIMATORS offers."""

    def start(self, problem: Problem) -> None:
        """Make the accumulators in problem.sums."""

    def step(self, problem: Problem, batch: Batch) -> None:
        """Add one batch."""


ESTIMATORS: dict[str, Estimator] = {
    "fisher": fisher,
    "empirical_fisher": empirical_fisher,
    "ggn": ggn,
}


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "fisher",
    num_examples: int | None = None,
    samples: int = 1,
    reduction: str = "example",
    seed: int = 0,
    likelihood: str | Any = "auto",
    gradient: bool = False,
    standard_error: bool = False,
    tolerance: float | None = None,
    progress: bool = True,
    labels: str = "auto",
) -> Curvature:
    """Curvature of the loss -log p(y|x), summed over a training set, at a model's present weights.

    Args:
        model: any nn.Module. It is run in eval mode and given back as it was. Only parameters that require gradients
            are estimated.
        batches: dicts of tensors (transformers style), `(inputs, targets)` tuples or bare tensors. An *example* is a
            row of a batch; its log-likelihood sums over its predicted tokens, padding and ignored labels excluded.
        method: a key of ESTIMATORS.
        num_examples: N of the summed loss, the size of the training set; the number of examples seen by default.
        samples: draws of labels per example (probes for "hessian").
        reduction: "example" squares each example's gradient; "batch" squares the batch's (cheapest, more variance,
            right only because labels are sampled).
        seed: of everything random. The draw for an example depends on the seed and its place in the run alone.
        likelihood: "auto", a name, or an object with `sample(output, generator)` and `log_prob(output, labels)`.
        gradient: also store the gradient of the summed loss at the true labels.
        standard_error: also store the standard error of every coordinate.
        tolerance: stop when the relative standard error of the curvature's trace is below this.
        progress: show a progress bar.
        labels: "auto", "sampled" or "exact", for fisher and ggn.

    Returns:
        Per-example means by parameter name, with provenance.

    Raises:
        ValueError: options, batches or labels that make no sense, a model that mixes examples or has no trainable
            parameter; the message names the place.
        TypeError: a batch, likelihood or num_examples of a wrong type.
    """
    check_options(method, samples, reduction, tolerance, labels, num_examples)
    parameters = trainable_parameters(model)
    problem = Problem(
        model,
        parameters,
        make_likelihood(likelihood),
        samples,
        seed,
        standard_error,
        gradient,
        reduction,
        labels,
    )
    estimator = ESTIMATORS[method]
    device = next(iter(parameters.values())).device
    reader = BatchReader(model, device)
    seen = steps = 0
    with prepared(model), problem.planned() as hooks:
        estimator.start(problem)
        for index, raw in enumerate(batches):
            batch = reader(raw, index, seen)
            problem.ensure_plan(batch, hooks)
            estimator.step(problem, batch)
            seen, steps = seen + batch.size, steps + 1
    if seen == 0:
        raise ValueError("`batches` ended without yielding anything")
    if problem.predictions == 0:
        raise ValueError("all labels are ignored: no example has a single prediction that counts")
    return finish(problem, method, seen, steps, num_examples)


def check_options(
    method: str, samples: int, reduction: str, tolerance: float | None, labels: str, num_examples: int | None
) -> None:
    """Everything about the options that can be wrong, before the model is touched.

    Raises:
        ValueError: an unknown name, a number out of range, or a combination that would be biased.
        TypeError: num_examples is no whole number.
    """
    choose("method", method, ESTIMATORS)
    choose("reduction", reduction, ("example", "batch"))
    choose("labels", labels, ("auto", "sampled", "exact"))
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance is a relative error between 0 and 1, got {tolerance}")
    if num_examples is not None:
        check_num_examples(num_examples)
    if reduction == "batch" and (method != "fisher" or labels == "exact"):
        raise ValueError(
            'reduction="batch" is right only for method="fisher" with sampled labels: with any other labels the square of '
            "a batch's gradient is not the sum of its examples' squares"
        )


def choose(option: str, value: str, known: Iterable[str]) -> None:
    """Refuse an unknown name and offer the nearest.

    Raises:
        ValueError: not among the known ones.
    """
    names = list(known)
    if value not in names:
        close = difflib.get_close_matches(str(value), names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        raise ValueError(f"unknown {option} {value!r}; {hint}")


def finish(problem: Problem, method: str, seen: int, steps: int, num_examples: int | None) -> Curvature:
    """Sums into per-example means, standard errors and the gradient of the summed loss over N examples."""
    total = seen if num_examples is None else num_examples
    scale = seen * problem.draws
    sums = problem.sums
    mean = {name: sums[SQUARES + name] / scale for name in problem.parameters}
    errors = None
    if problem.standard_error:
        units = steps if problem.reduction == "batch" else seen
        errors = {
            name: standard_error(mean[name], sums[FOURTHS + name], seen, units) for name in problem.parameters
        }
    measured = None
    if problem.gradient:
        measured = {name: sums[GRADIENT + name] * (total / seen) for name in problem.parameters}
    return Curvature.from_dict(
        mean, total, provenance(problem, method, seen), standard_error=errors, gradient=measured
    )


def standard_error(mean: Tensor, fourths: Tensor, seen: int, units: int) -> Tensor:
    """sqrt((sum_k S_k^2 / n_k - n m^2) / (n (K - 1))): of a mean of K sums S_k over n_k examples each, n in all.

    With one example a unit this is the usual sqrt(sum_n (s_n - m)^2 / (n (n - 1))).

    Raises:
        ValueError: a single unit has no spread.
    """
    if units < 2:
        raise ValueError("a standard error needs at least two examples (two batches with reduction='batch')")
    return ((fourths - seen * mean * mean).clamp(min=0) / (seen * (units - 1))).sqrt()


def provenance(problem: Problem, method: str, seen: int) -> dict[str, str]:
    """Everything about the run that a reader of the file should know."""
    import numpy

    names: Mapping[str, Tensor] = problem.parameters
    return {
        "estimator": method,
        "examples_seen": str(seen),
        "samples": str(problem.samples),
        "reduction": problem.reduction,
        "labels": problem.label_kind,
        "likelihood": problem.likelihood.name if problem.likelihood is not None else "none",
        "predictions_seen": str(problem.predictions),
        "seed": str(problem.seed),
        "fingerprint": fingerprint(names, model_sampler(problem.model)),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        **problem.notes,
    }
