"""Stages of the vision study on images, as those of the sentiment study are on texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from experiments.estimation import write_fisher
from experiments.evaluate import measure, with_averages, write_metrics
from experiments.merging import Metrics, merged_model, write_choice
from experiments.mismatch import write_gradient, write_mismatch
from experiments.sweep import write_sweep
from experiments.vision.models import Rows, classes_of, load, load_split
from gradmatch.measure.objective import Objective


@torch.inference_mode()
def predict(model: nn.Module, rows: Rows, classes: slice) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities (n, classes) over a set's own classes, and labels (n,)."""
    device = next(model.parameters()).device
    found = [
        model(pixel_values=batch["pixel_values"]).logits[:, classes].double().softmax(-1).cpu().numpy()
        for batch in rows.batches(64, device)
    ]
    return np.concatenate(found), rows.labels.numpy()


def evaluate(out: Path, *, data: Path, model: Path, domains: Sequence[str], split: str) -> None:
    """Evaluate a model folder: `out/metrics.json`, and `out/<set>.npz` with the probabilities and labels."""
    classifier = load(model / "model")
    write_metrics(
        out,
        {
            name: predict(classifier, load_split(data, name, split), classes_of(data, name))
            for name in domains
        },
    )


def curvature(
    out: Path,
    *,
    data: Path,
    model: Path,
    domain: str,
    examples: int,
    samples: int,
    batch_size: int,
    seed: int,
) -> None:
    """Monte-Carlo Fisher with the measured gradient of the loss summed over a set's training images; see `estimation`."""
    classifier = load(model / "model", classes_of(data, domain))
    rows = load_split(data, domain, "train")
    given = list(rows.subset(examples, seed).batches(batch_size, next(classifier.parameters()).device))
    write_fisher(out, classifier, given, num_examples=len(rows), samples=samples, seed=seed)


def objective(data: Path, model: Path, domain: str, examples: int, seed: int) -> Objective:
    """l_t: the loss of a set's training images, from `examples` of them, scaled up to all."""
    rows = load_split(data, domain, "train")
    module = load(model / "model", classes_of(data, domain))
    chosen = rows.subset(examples, seed).batches(32, next(module.parameters()).device)
    return Objective(module, chosen, num_examples=len(rows))


def task_gradient(out: Path, *, data: Path, model: Path, domain: str, examples: int, seed: int) -> None:
    """grad l_t(theta_t) of a fine-tuned model, which the mismatch of every merge is compared with."""
    write_gradient(out, objective(data, model, domain, examples, seed))


def mismatch(
    out: Path,
    *,
    data: Path,
    model: Path,
    gradients: Mapping[str, Path],
    base_curvature: Path,
    examples: int,
    seed: int,
    delta0: float,
) -> None:
    """Norms of the gradient mismatch of one merged model, in `out/mismatch.json`; as on texts, all weights are 1."""
    losses = {name: objective(data, model, name, examples, seed) for name in gradients}
    theta = dict(next(iter(losses.values())).module.state_dict())
    write_mismatch(out, theta, losses, gradients, base_curvature, delta0)


def score(
    model: nn.Module, weights: Mapping[str, Any], data: Path, domains: Sequence[str], split: str
) -> Metrics:
    """Metrics of weights placed into a model: each set, and the averages."""
    model.load_state_dict(dict(weights))
    found = {
        name: measure(*predict(model, load_split(data, name, split), classes_of(data, name)))
        for name in domains
    }
    return with_averages(found)


def choose(
    out: Path,
    *,
    method: str,
    alpha: float,
    options: Mapping[str, Any],
    grid: Mapping[str, Sequence[float]],
    data: Path,
    domains: Sequence[str],
    **sources: Any,
) -> None:
    """Try each value of the grid's one option on the validation images; `out/choice.json` keeps all and the best.

    Best: lowest negative log-likelihood, macro average over the sets. Test images are never read.
    """
    model = load(sources["base"] / "model")

    def at(setting: Mapping[str, Any]) -> Metrics:
        weights = merged_model(method, alpha, {**options, **setting}, **sources)
        return score(model, weights, data, domains, "validation")

    write_choice(out, grid, at)


def sweep(
    out: Path,
    *,
    method: str,
    alphas: Sequence[float],
    options: Mapping[str, Any],
    data: Path,
    domains: Sequence[str],
    seed: int = 0,
    forecast: int = 0,
    choice: Path | None = None,
    **sources: Any,
) -> None:
    """Metrics on test images, and forecasts from training images, at every alpha: see `experiments.sweep`."""
    model = load(sources["base"] / "model")
    tasks = sources["tasks"] if forecast else {}
    losses = {task: objective(data, folder, task, forecast, seed) for task, folder in tasks.items()}

    def at(weights: Mapping[str, Any]) -> Metrics:
        return score(model, weights, data, domains, "test")

    write_sweep(out, method, alphas, options, choice, at, losses, **sources)
