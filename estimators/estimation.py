"""`estimate`: options checked, the model made ready, batches added up, and what came out as a Curvature."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.blocks import check_count, units
from gradmatch.estimators.convergence import Convergence
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint, model_sampler
from gradmatch.estimators.inference import make_likelihood
from gradmatch.estimators.memory import LEAST_BYTES, parse_bytes
from gradmatch.estimators.names import choose
from gradmatch.estimators.problem import Problem, prepared, trainable_parameters
from gradmatch.estimators.progress import shown
from gradmatch.estimators.protocol import ESTIMATORS, check_gives, find_estimator
from gradmatch.estimators.resume import Journal, identity
from gradmatch.estimators.running import Loop, add_up_ranks, advice, count_examples, provenance, run
from gradmatch.estimators.sinks import GRADIENT
from gradmatch.estimators.wrapped import uncompiled, unwrap

__all__ = ["ESTIMATORS", "check_options", "estimate"]

log = logging.getLogger(__name__)
PER_EXAMPLE = ("fisher", "empirical_fisher", "ggn")


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
    progress: bool | None = None,
    labels: str = "auto",
    kfac_form: str = "expand",
    backend: str = "engine",
    chunk: int | str | None = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
) -> Curvature:
    """Curvature of the loss -log p(y|x), summed over a training set, at a model's present weights.

    Args:
        model: any nn.Module. It is run in eval mode and given back as it was. Only parameters that require gradients
            are estimated.
        batches: dicts of tensors (transformers style), `(inputs, targets)` tuples or bare tensors. An *example* is a
            row of a batch; its log-likelihood sums over its predicted tokens, padding and ignored labels excluded.
        method: a key of ESTIMATORS, or "package.module:NAME" of an estimator of your own (see `protocol.py`).
        num_examples: N of the summed loss, the size of the training set; by default the number of examples seen (with
            `tolerance` and a DataLoader, that of its dataset). A row whose labels are all ignored is an example too.
        samples: draws of labels per example (probes per batch for "hessian").
        reduction: "example" squares each example's gradient; "batch" squares the batch's (cheapest, more variance,
            right only because labels are sampled).
        seed: of everything random. The draw for an example depends on the seed and its place in the run alone
            (with a likelihood of one's own: on the batch).
        likelihood: "auto", "classification", "bernoulli", "regression", "causal_lm", "masked_lm", "seq2seq" or
            "token_classification", or an object with `sample(output, generator)` and `log_prob(output, labels)`.
        gradient: also store the gradient of the summed loss at the true labels.
        standard_error: also store the standard error of every coordinate, with the examples taken as a random sample of the
            population: not zero where every example was seen, and more than the noise of sampled labels alone.
        tolerance: stop when the relative standard error of the curvature's trace is below this.
        progress: show a progress bar on stderr; None: on a terminal or in a notebook, unless GRADMATCH_VERBOSITY is quiet.
        labels: "sampled" or "exact" (the expectation over labels) for fisher, ggn and kfac; "auto" takes the exact one
            where it costs no more backward passes than the samples asked for ("ggn": up to 100 of them).
        kfac_form: "expand" or "reduce", for weights shared over positions; see `kfac.py`.
        backend: "engine", or "backpack" for plain nn.Sequential nets with method "ggn", "hessian" or "empirical_fisher".
        chunk: work on parts of a batch, to save memory; the result stays the same (with reduction="batch" it is the
            part whose gradient is squared). At most so many rows; or an amount of memory ("2GB") for the activations and
            outputs of a part; or "auto", half of what the sums take and at least 128 MiB (per-example methods on the
            CPU, where such parts are as quick; elsewhere the whole batch); or None, the whole batch.
        checkpoint: file in which the sums are saved now and then; the same call after an interruption goes on from it.
        checkpoint_seconds: how often.

    Returns:
        Per-example means by parameter name, with provenance.

    Raises:
        ValueError: options, batches or labels that make no sense, a model that mixes examples or has no trainable
            parameter; the message names the place.
        TypeError: a batch, likelihood or num_examples of a wrong type, or a model that is itself compiled by torch.jit.

    Example:
        >>> from torch import nn
        >>> model, batches = nn.Linear(2, 3), [(torch.randn(8, 2), torch.randint(0, 3, (8,))) for _ in range(4)]
        >>> curvature = estimate(model, batches, progress=False)
        >>> curvature.num_examples, curvature.total("weight").shape
        (32, torch.Size([3, 2]))
        >>> curvature.save("task.curvature.safetensors")  # doctest: +SKIP
    """
    check_options(method, samples, reduction, tolerance, labels, num_examples, seed)
    if isinstance(batches, (Tensor, Mapping)) or (
        isinstance(batches, tuple) and all(isinstance(value, Tensor) for value in batches)
    ):
        raise TypeError(
            f"`batches` is a single {type(batches).__name__}, but it must yield batches: wrap a single one in a list, [batch]"
        )
    choose("kfac_form", kfac_form, ("expand", "reduce"))
    choose("backend", backend, ("engine", "backpack"))
    estimator = find_estimator(method)
    wanted = {"standard_error": standard_error, "gradient": gradient, "tolerance": tolerance is not None}
    check_gives(method, estimator, **wanted)
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "the model is compiled by torch.jit, which takes no hooks: give the nn.Module that it was made from, or one that "
            "calls it (the whole of it then takes the slower general path)"
        )
    with uncompiled(model):
        problem = Problem(
            model, trainable_parameters(model), make_likelihood(likelihood), samples, seed, standard_error, gradient,
            reduction, labels, kfac_form,
        )  # fmt: skip
        whole = reduction == "batch" or backend != "engine" or method not in PER_EXAMPLE
        problem.chunk, problem.budget = read_chunk(chunk, problem, whole)
        if backend == "backpack":
            from gradmatch.estimators import backpack

            estimator = backpack.for_method(problem, method)
        print_of_weights = fingerprint(problem.parameters, model_sampler(model))
        journal = (
            Journal(checkpoint, identity(problem, method, print_of_weights, likelihood, backend))
            if checkpoint
            else None
        )
        convergence = Convergence()
        loop = Loop(method, shown(progress), tolerance, journal, checkpoint_seconds)
        with prepared(model), problem.hooks:
            estimator.start(problem)
            loop.done = journal.load(problem, convergence) if journal else 0
            run(problem, estimator, batches, convergence, loop)
        add_up_ranks(problem, convergence)
        seen = problem.counts["examples"]
        if seen == 0:
            raise GradmatchError("`batches` ended without yielding anything", "bad_request")
        if problem.counts["predictions"] == 0:
            raise GradmatchError(
                "all labels are ignored: no example has a single prediction that counts", "bad_request"
            )
        parts = estimator.finish(problem, seen)
        total = num_examples or size_of_training_set(batches, seen, "stopped" in problem.notes)
        check_given(method, problem, parts)
        if gradient:
            parts["gradient"] = {
                name: problem.sums[GRADIENT + name] * (total / seen) for name in problem.parameters
            }
        log.info("%s", advice(convergence, seen))
        covered = fingerprint(parts["mean"], model_sampler(model))  # of the parameters that the file holds
        info = provenance(problem, method, covered, convergence)
        info["units"] = units(total, getattr(estimator, "UNITS", "nats"))
    curvature = Curvature.from_dict(num_examples=total, info=info, **parts)
    if journal:
        journal.remove()
    return curvature


def read_chunk(
    chunk: int | str | None, problem: Problem, whole: bool = False
) -> tuple[int | None, int | None]:
    """Rows and bytes of the parts in which batches are worked on; with `whole`, "auto" is the whole batch."""
    if chunk == "auto":
        sums = sum(value.numel() * 4 for value in problem.parameters.values())
        return None, None if whole or problem.device.type != "cpu" else max(sums // 2, LEAST_BYTES)
    if isinstance(chunk, str):
        return None, parse_bytes(chunk)
    if chunk is not None and chunk < 1:
        raise GradmatchError(f"chunk is a number of rows, at least 1, got {chunk}", "out_of_range")
    return chunk, None


def size_of_training_set(batches: Iterable[Any], seen: int, stopped: bool) -> int:
    """N where it was not given: the examples seen; of a run that stopped early, those that a DataLoader has in all."""
    if not stopped:
        return seen
    known = count_examples(batches)
    if known is None:
        log.warning(
            "stopped after %s examples, and `batches` does not say how many there are: N, the size of the training set, is "
            "taken to be %s; pass num_examples", f"{seen:,}", f"{seen:,}",
        )  # fmt: skip
    return known or seen


def check_options(
    method: str,
    samples: int,
    reduction: str,
    tolerance: float | None,
    labels: str,
    num_examples: int | None,
    seed: int = 0,
) -> None:
    """Everything about the options that can be wrong, before the model is touched."""
    find_estimator(method)
    choose("reduction", reduction, ("example", "batch"))
    choose("labels", labels, ("auto", "sampled", "exact"))
    for option, value in (("samples", samples), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{option} must be a whole number, got {value!r}")
    if samples < 1:
        raise GradmatchError(f"samples must be at least 1, got {samples}", "out_of_range")
    if tolerance is not None and not 0 < tolerance < 1:
        raise GradmatchError(
            f"tolerance is a relative error between 0 and 1, got {tolerance}", "out_of_range"
        )
    if num_examples is not None:
        check_count("num_examples", num_examples)
    if reduction == "batch" and (method != "fisher" or labels == "exact"):
        raise GradmatchError(
            'reduction="batch" is right only for method="fisher" with sampled labels: with any other labels the square of '
            "a batch's gradient is not the sum of its examples' squares",
            "bad_request",
        )


def check_given(method: str, problem: Problem, parts: Mapping[str, Any]) -> None:
    """An estimator must have delivered what was asked of it."""
    unknown = sorted(set(parts.get("mean", {})) - set(problem.parameters))
    if unknown:
        raise GradmatchError(
            f"method={method!r} gave a mean block for {unknown[0]!r}, which is no parameter of the model",
            "bad_request",
            unknown[0],
        )
    missing = [
        "the mean blocks" if not parts.get("mean") else "",
        "standard_error" if problem.standard_error and not parts.get("standard_error") else "",
        *(
            f"the gradient of {name!r}"
            for name in problem.parameters
            if problem.gradient and GRADIENT + name not in problem.sums
        ),
    ]
    if any(missing):
        raise GradmatchError(
            f"method={method!r} did not deliver {next(filter(None, missing))}: see gradmatch.estimators.protocol, and run "
            "check_estimator on it",
            "bad_request",
        )
