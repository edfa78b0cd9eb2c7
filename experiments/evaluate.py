"""Stage: accuracy, negative log-likelihood and calibration of a classifier, per domain and averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from experiments.files import write_json
from experiments.models import load_classifier
from experiments.rows import IGNORED, Language, Rows, Views, load_split
from experiments.statistics import paired_bootstrap
from gradmatch.estimators.parts import find_part

Array = NDArray[np.float64]
Weights = Mapping[str, Tensor]
Metrics = dict[str, dict[str, float]]
QUANTITIES = ("accuracy", "nll", "ece")
BATCH = 64


def evaluate(
    out: Path, *, data: Views, model: Path, domains: Sequence[str], split: str, own: str = ""
) -> None:
    """Evaluate a model folder: `out/metrics.json`, and `out/<domain>.npz` with the probabilities and labels.

    own: `package.module:function`, called with the model and its folder; what it returns is written to `out/own.json`.

    Raises:
        TypeError: it returns no numbers by name.
    """
    loaded = load_classifier(model / "model")
    write_metrics(out, loaded, data, domains, split)
    if own:
        found = find_part("evaluation", "gradmatch.evaluations", own, {})(loaded, model / "model")
        if not isinstance(found, Mapping) or not all(
            isinstance(value, (int, float)) for value in found.values()
        ):
            raise TypeError(f"{own} must return numbers by name, as {{'f1': 0.8}}, not {found!r:.80}")
        write_json(out / "own.json", {str(name): float(value) for name, value in found.items()})


def write_metrics(out: Path, model: nn.Module, data: Views, domains: Sequence[str], split: str) -> None:
    """`out/metrics.json` and `out/<domain>.npz` of a model; `low` and `high`: 95 % interval of macro accuracy over the examples."""
    metrics, right, documents = {}, [], []
    for domain in domains:
        rows = load_split(data, domain, split)
        if isinstance(rows, Language):
            metrics[domain], found_ = predict_texts(model, rows, domain)
        else:
            probabilities, labels = predict(model, rows, domain)
            metrics[domain] = measure(probabilities, labels)
            found_ = {
                "correct": (probabilities.argmax(-1) == labels).astype(float),
                "nll": nll_of(probabilities, labels),
            }
            found_ |= {"probabilities": probabilities.astype(np.float32), "labels": labels}
        np.savez(out / f"{domain}.npz", **found_)
        right.append(found_["correct"][None])
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
        return with_averages({domain: metrics_of(model, own) for domain, own in rows.items()})

    return score


def metrics_of(model: nn.Module, rows: Any) -> dict[str, float]:
    """Accuracy, loss, calibration and n of a model on rows of either kind."""
    return predict_texts(model, rows)[0] if isinstance(rows, Language) else measure(*predict(model, rows))


@torch.inference_mode()
def predict_texts(
    model: nn.Module, rows: Language, title: str = ""
) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """Of a language model: metrics, and of each text `correct` (share of its tokens that were the likeliest) and `nll` a token.

    Each text counts alike in accuracy and nll; ece is over tokens; n counts texts.
    """
    device = next(model.parameters()).device
    order, correct, losses, confidences, hits = [], [], [], [], []
    progress = tqdm(desc=title, total=len(rows), leave=False, disable=not title)
    for indices, batch in rows.batches(BATCH // 4, device):
        labels = batch.pop("labels")[:, 1:]
        logs = model(**batch).logits[:, :-1].double().log_softmax(-1)
        told = labels != IGNORED
        chosen = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        confidence, guess = logs.max(-1)
        hit = (guess == labels) & told
        counts = told.sum(-1)
        correct += (hit.sum(-1) / counts).tolist()
        losses += (-(chosen * told).sum(-1) / counts).tolist()
        confidences.append(confidence[told].exp().cpu().numpy())
        hits.append(hit[told].cpu().numpy())
        order += indices
        progress.update(len(indices))
    progress.close()
    back = np.argsort(order)
    found = {"correct": np.asarray(correct)[back], "nll": np.asarray(losses)[back]}
    ece = expected_calibration_error(np.concatenate(confidences), np.concatenate(hits))
    return {
        "accuracy": float(found["correct"].mean()),
        "nll": float(found["nll"].mean()),
        "ece": ece,
        "n": len(rows),
    }, found


def nll_of(probabilities: Array, labels: NDArray[np.int64]) -> Array:
    """(n,) negative log-likelihoods in nats."""
    chosen = probabilities[np.arange(len(labels)), labels]
    found: Array = -np.log(np.maximum(chosen, np.finfo(np.float64).tiny))
    return found


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
    correct = probabilities.argmax(-1) == labels
    return {
        "accuracy": float(correct.mean()),
        "nll": float(nll_of(probabilities, labels).mean()),
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
