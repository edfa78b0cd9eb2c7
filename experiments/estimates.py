"""Stages: curvature in every way that is cheaper, or more exact, than the Monte-Carlo Fisher, and how far it is off."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.models import batches, load_classifier, load_split, subset
from gradmatch.estimators import Curvature, estimate, from_adam, from_ivon

# What each kind of estimate hands to `gradmatch.estimators.estimate`; the other kinds have a function of their own below.
KINDS: dict[str, dict[str, Any]] = {
    "fisher": {"method": "fisher", "labels": "sampled"},
    "ggn": {"method": "ggn", "labels": "exact"},
    "empirical": {"method": "empirical_fisher"},
    "batch": {"method": "fisher", "labels": "sampled", "reduction": "batch"},
    "gram": {"method": "gram"},
}


def estimate_stage(
    out: Path,
    *,
    data: Path,
    model: Path,
    domain: str,
    kind: str,
    examples: int,
    samples: int,
    batch_size: int,
    trained_batch_size: int,
    seed: int,
) -> None:
    """One estimate at a fine-tuned model, in `out/curvature.safetensors`; its seconds, without loading, in `out/cost.json`.

    kind: of KINDS, or `batch means` (the mean of squared gradients of batch means, true labels: 1/B of a Fisher where the
    mean gradient is small), `adam` (B v_hat of the fine-tuning's own optimizer) or `ivon` (steps that leave the mean where it is).
    """
    classifier = load_classifier(model / "model")
    rows = load_split(data, domain, "train")
    device = next(classifier.parameters()).device
    given = [batch for _, batch in batches(subset(rows, examples, seed), batch_size, device)]
    start = time.perf_counter()
    if kind == "adam":
        state = str(model / "optimizer.pt")
        found = from_adam(state, classifier, num_examples=len(rows), batch_size=trained_batch_size)
    elif kind == "ivon":
        found = ivon(classifier, given, len(rows), seed)
    elif kind == "batch means":
        found = Curvature.from_dict(squared_batch_means(classifier, given), len(rows), {"estimator": kind})
    else:
        found = estimate(classifier, given, num_examples=len(rows), samples=samples, seed=seed, **KINDS[kind])
    seconds = time.perf_counter() - start
    found.save(out / "curvature.safetensors")
    (out / "cost.json").write_text(json.dumps({"seconds": seconds, "num_examples": len(rows)}))


def squared_batch_means(model: nn.Module, given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """mean_b g_b^2, g_b = gradient of the mean loss of batch b (true labels): what Adam averages, and a common mistake."""
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for batch in given:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        for name, value in model.named_parameters():
            if value.grad is not None:
                total[name] += value.grad.square()
    return {name: value / len(given) for name, value in total.items()}


def ivon(model: nn.Module, given: list[dict[str, Tensor]], num_examples: int, seed: int) -> Curvature:
    """IVON's Hessian after one step per batch with learning rate 0, which leaves the posterior's mean at theta_t.

    The posterior is sharpened (ess = 1e8, not N): at N its samples would be so far from a fine-tune of this size that their
    gradients say nothing about it. The Hessian per example is the same quantity whatever ess is.
    """
    from ivon import IVON

    torch.manual_seed(seed)
    optimizer = IVON(model.parameters(), lr=0.0, ess=1e8, hess_init=1e-3, weight_decay=1e-6, beta2=0.9)
    for batch in given:
        with optimizer.sampled_params(train=True):
            model.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
        optimizer.step()
    found = from_ivon(optimizer, model)
    return Curvature.from_dict({name: found.mean(name) for name in found}, num_examples, found.info)


def compare_estimate(out: Path, *, estimate: Path, reference: Path) -> None:
    """How far an estimate is from the reference of the same model: `out/error.json`."""
    found, truth = (Curvature.load(folder / "curvature.safetensors") for folder in (estimate, reference))
    (out / "error.json").write_text(json.dumps(errors(found, truth), indent=1), encoding="utf-8")


def errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error ||F^ - F|| / ||F||, ratio of traces, and correlation of the logarithms where F > 0.

    Both by parameter name, per-example means. The floor of the logarithm is 1e-14, below every value that counts.
    """
    squared = norm = trace = expected = 0.0
    moments = torch.zeros(6, dtype=torch.float64)  # n, sums of x, y, xx, yy, xy
    for f, h in _pairs(found, truth):
        squared, norm = squared + float((f - h).square().sum()), norm + float(h.square().sum())
        trace, expected = trace + float(f.sum()), expected + float(h.sum())
        x, y = (value[h > 0].clamp(min=1e-14).log() for value in (f, h))
        moments += torch.stack([torch.tensor(float(len(x))).double(), x.sum(), y.sum(), x @ x, y @ y, x @ y])
    n, x, y, xx, yy, xy = moments.tolist()
    covariance = xy / n - x * y / n**2
    spread = ((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)) ** 0.5
    return {
        "relative_error": (squared / norm) ** 0.5,
        "trace_ratio": trace / expected,
        "log_correlation": covariance / spread if spread > 0 else float("nan"),
    }


def _pairs(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for name in truth:
        yield found[name].double().flatten(), truth[name].double().flatten()
