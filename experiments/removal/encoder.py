"""Stages of the proof on an encoder: wrong labels, curvature over several domains, and every edit against retraining."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.models import batches, load_classifier, load_split, subset
from experiments.removal.proof import diagonal_edits
from gradmatch.estimators import Curvature, estimate

CURVATURE = "curvature.safetensors"
DELTA0 = 1e-6


def poison(out: Path, *, data: Path, domain: str, count: int) -> None:
    """Copy the data with the labels of one domain turned round, in every split; `count` training texts of it remain."""
    from datasets import load_from_disk

    for source in sorted(path for path in data.glob("*/*") if path.is_dir()):
        rows = load_from_disk(str(source))
        name, split = source.parent.name, source.name
        if name == domain:
            rows = subset(rows, count, 0) if split == "train" else rows
            rows = rows.map(lambda row: {"labels": 1 - row["labels"]})
        rows.save_to_disk(out / name / split)


def curvature(
    out: Path, *, data: Path, model: Path, domains: Sequence[str], seed: int, examples: int
) -> None:
    """Monte-Carlo Fisher over the training texts of several domains together: `out/curvature.safetensors`."""
    from datasets import concatenate_datasets

    classifier = load_classifier(model / "model")
    rows = concatenate_datasets([load_split(data, domain, "train") for domain in domains])
    seen = [
        batch for _, batch in batches(subset(rows, examples, seed), 32, next(classifier.parameters()).device)
    ]
    estimate(classifier, seen, num_examples=len(rows), seed=seed).save(out / CURVATURE)


def compare(
    out: Path,
    *,
    data: Path,
    base: Path,
    retrained: Path,
    task: Path,
    rest: Path,
    base_curvature: Path,
    task_curvature: Path,
    keep: Sequence[str],
    remove: str,
    alphas: Sequence[float],
) -> None:
    """Every edit against the model that never saw the wrong labels; the rows are those of `proof.measure`."""
    classifier = load_classifier(base / "model")
    device = next(classifier.parameters()).device
    unseen = [batch for domain in keep for _, batch in batches(load_split(data, domain, "test"), 64, device)]
    removed = [batch for _, batch in batches(load_split(data, remove, "train"), 64, device)]
    unseen_wrong = [batch for _, batch in batches(load_split(data, remove, "test"), 64, device)]

    def weights(folder: Path) -> dict[str, Tensor]:
        return {
            name: value.detach().clone()
            for name, value in load_classifier(folder / "model").named_parameters()
        }

    vectors = {
        name: weights(path) for name, path in (("base", base), ("retrained", retrained), ("rest", rest))
    }
    curvatures = [Curvature.load(folder / CURVATURE) for folder in (base_curvature, task_curvature)]
    edits = {("base", 0.0): vectors["base"], ("retrained", 0.0): vectors["retrained"]}
    edits["fine-tuned on the rest", 0.0] = vectors["rest"]
    edits |= diagonal_edits(vectors["base"], weights(task), *curvatures, alphas, DELTA0)
    classifier.load_state_dict(vectors["retrained"], strict=False)
    truth = _log_probs(classifier, unseen)[0]
    rows = []
    for (name, alpha), theta in edits.items():
        classifier.load_state_dict(theta, strict=False)
        found, labels = _log_probs(classifier, unseen)
        known, wrong = _log_probs(classifier, removed), _log_probs(classifier, unseen_wrong)
        rows.append(
            {
                "edit": name,
                "alpha": alpha,
                "distance": _distance(theta, vectors["retrained"])
                / _distance(vectors["base"], vectors["retrained"]),
                "kl": float((truth.exp() * (truth - found)).sum(-1).mean()),
                "removed": _accuracy(*known),
                "accuracy": _accuracy(found, labels),
                "gap": _loss(*wrong) - _loss(*known),
            }
        )
    (out / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


@torch.inference_mode()
def _log_probs(model: nn.Module, data: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(n, classes) log-probabilities in float64, and (n,) labels."""
    inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in data]
    found = torch.cat([model(**batch).logits.double().log_softmax(-1) for batch in inputs])
    return found, torch.cat([batch["labels"] for batch in data])


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name] - b[name]).double().square().sum()) for name in b) ** 0.5


def _accuracy(log_probs: Tensor, labels: Tensor) -> float:
    return float((log_probs.argmax(-1) == labels).double().mean())


def _loss(log_probs: Tensor, labels: Tensor) -> float:
    return float(-log_probs.gather(-1, labels[:, None]).mean())
