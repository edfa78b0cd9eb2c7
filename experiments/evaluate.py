"""Stage: accuracy, negative log-likelihood and calibration of a classifier, per domain and averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from experiments.files import write_json
from experiments.models import load_classifier
from experiments.rows import Rows, Views, load_split
from experiments.statistics import paired_bootstrap

Array = NDArray[np.float64]
Weights = Mapping[str, Tensor]
Metrics = dict[str, dict[str, float]]
QUANTITIES = ("accuracy", "nll", "ece")
BATCH = 64


def evaluate(out: Path, *, data: Views, model: Path, domains: Sequence[str], split: str) -> None:
    """Evaluate a model folder: `out/metrics.json`, and `out/<domain>.npz` with the probabilities and labels."""
    write_metrics(out, load_classifier(model / "model"), data, domains, split)


def write_metrics(out: Path, model: nn.Module, data: Views, domains: Sequence[str], split: str) -> None:
    """`out/metrics.json` and `out/<domain>.npz` of a model; `low` and `high`: 95 % interval of macro accuracy over the examples."""
    metrics, right, documents = {}, [], []
    for domain in domains:
        rows = load_split(data, domain, split)
        probabilities, labels = predict(model, rows, domain)
        np.savez(out / f"{domain}.npz", probabilities=probabilities.astype(np.float32), labels=labels)
        metrics[domain] = measure(probabilities, labels)
        right.append((probabilities.argmax(-1) == labels).astype(float)[None])
        documents.append(rows.documents())
    found = with_averages(metrics)
    found["macro"]["low"], found["macro"]["high"] = paired_bootstrap(right, documents)
    write_json(out / "metrics.json", found)


def scorer(base: Path, data: Views, domains: Sequence[str], split: str) -> Callable[[Weights], Metrics]:
    """Metrics of weights, which are placed into the base's module, as a function of the weights."""
    model = load_classifier(base / "model")
    rows = {domain: load_split(data, domain, split) for domain in domains}

    def score(weights: Weights) -> Metrics:
        model.load_state_dict(dict(weights))
        return with_averages({domain: measure(*predict(model, own)) for domain, own in rows.items()})

    return score


@torch.inference_mode()
def predict(model: nn.Module, rows: Rows, title: str = "") -> tuple[Array, NDArray[np.int64]]:
    """Probabilities (n, classes of the rows) and labels (n,) in the order of the rows; forward in float32, eval mode."""
    device = next(model.parameters()).device
    probabilities, labels, order = [], [], []
    progress = tqdm(desc=title, total=len(rows), leave=False, disable=not title)
    for indices, batch in rows.batches(BATCH, device):
        labels += batch.pop("labels").tolist()
        logits = model(**batch).logits[:, rows.classes]
        probabilities.append(logits.double().softmax(-1).cpu().numpy())
        order += indices
        progress.update(len(indices))
    progress.close()
    back = np.argsort(order)
    return np.concatenate(probabilities)[back], np.asarray(labels)[back]


def measure(probabilities: Array, labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood (nats), ECE and n of predictions: probabilities (n, classes), labels (n,)."""
    chosen = probabilities[np.arange(len(labels)), labels]
    correct = probabilities.argmax(-1) == labels
    return {
        "accuracy": float(correct.mean()),
        "nll": float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean()),
        "ece": expected_calibration_error(probabilities.max(-1), correct),
        "n": len(labels),
    }


def expected_calibration_error(confidence: Array, correct: NDArray[np.bool_], bins: int = 15) -> float:
    """ECE = sum_b (n_b / n) |accuracy_b - mean confidence_b| over equal bins of confidence (Guo et al. 2017).

    confidence, correct: (n,).
    """
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, weights=correct.astype(float) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def with_averages(metrics: Mapping[str, Mapping[str, float]]) -> Metrics:
    """Add `macro` (each domain counts alike) and `per_example` (each example counts alike) averages."""
    parts = metrics.values()
    total = sum(part["n"] for part in parts)
    macro = {name: sum(part[name] for part in parts) / len(metrics) for name in QUANTITIES}
    pooled = {name: sum(part["n"] * part[name] for part in parts) / total for name in QUANTITIES}
    averages = {"macro": {**macro, "n": total}, "per_example": {**pooled, "n": total}}
    return {**{domain: dict(part) for domain, part in metrics.items()}, **averages}
