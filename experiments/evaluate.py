"""Stage: accuracy, negative log-likelihood and calibration of a classifier, per domain and averaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from experiments.models import batches, load_classifier, load_split

Array = NDArray[np.float64]


def evaluate(out: Path, *, data: Path, model: Path, domains: Sequence[str], split: str) -> None:
    """Evaluate a model folder: `out/metrics.json`, and `out/<domain>.npz` with the probabilities and labels."""
    classifier = load_classifier(model / "model")
    write_metrics(
        out, {domain: predict(classifier, load_split(data, domain, split), domain) for domain in domains}
    )


def write_metrics(out: Path, predictions: Mapping[str, tuple[Array, NDArray[np.int64]]]) -> None:
    """`out/metrics.json` and `out/<domain>.npz` from each domain's probabilities (n, classes) and labels (n,)."""
    for domain, (probabilities, labels) in predictions.items():
        np.savez(out / f"{domain}.npz", probabilities=probabilities.astype(np.float32), labels=labels)
    metrics = {domain: measure(*found) for domain, found in predictions.items()}
    (out / "metrics.json").write_text(json.dumps(with_averages(metrics), indent=1), encoding="utf-8")


@torch.inference_mode()
def predict(
    model: nn.Module, rows: object, title: str = "", batch_size: int = 64
) -> tuple[Array, NDArray[np.int64]]:
    """Class probabilities (n, classes) and labels (n,) in the order of the rows; forward in float32, eval mode."""
    device = next(model.parameters()).device
    probabilities: list[Array] = []
    labels: list[int] = []
    order: list[int] = []
    progress = tqdm(desc=title, total=len(rows), leave=False, disable=not title)  # type: ignore[arg-type]
    for indices, batch in batches(rows, batch_size, device):
        labels += batch.pop("labels").tolist()
        probabilities.append(model(**batch).logits.double().softmax(-1).cpu().numpy())
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


def with_averages(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Add `macro` (each domain counts alike) and `per_example` (each example counts alike) averages."""
    total = sum(part["n"] for part in metrics.values())
    names = ("accuracy", "nll", "ece")
    macro = {name: sum(part[name] for part in metrics.values()) / len(metrics) for name in names}
    pooled = {name: sum(part["n"] * part[name] for part in metrics.values()) / total for name in names}
    averages = {"macro": {**macro, "n": total}, "per_example": {**pooled, "n": total}}
    return {**{domain: dict(part) for domain, part in metrics.items()}, **averages}
