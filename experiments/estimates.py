"""Stages: the curvature of a model on its own training data, in every way, and how far one is off another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.files import write_json
from experiments.models import load_classifier, narrowed
from experiments.rows import Views, load_split
from gradmatch.estimators import Curvature, estimate, from_adam, from_ivon
from gradmatch.estimators.protocol import find_estimator, gives_of

# What each kind of estimate hands to `gradmatch.estimators.estimate`; the other kinds have a function of their own below.
KINDS: dict[str, dict[str, Any]] = {
    "fisher": {"method": "fisher", "labels": "sampled"},
    "fisher and gradient": {
        "method": "fisher",
        "gradient": True,
    },  # labels: exact where there are few classes
    "ggn": {"method": "ggn", "labels": "exact"},
    "empirical": {"method": "empirical_fisher"},
    "batch": {"method": "fisher", "labels": "sampled", "reduction": "batch"},
    "gram": {"method": "gram"},
}


def estimate_stage(
    out: Path,
    *,
    data: Views,
    model: Path,
    domain: str,
    kind: str,
    examples: int,
    samples: int,
    batch_size: int,
    seed: int,
    trained_batch_size: int = 0,
    options: Mapping[str, Any] | None = None,
) -> None:
    """One estimate of the loss summed over a training set, from `examples` of it: `out/curvature.safetensors`.

    N is the size of the training set, also where a part is seen. Its seconds, without loading, are in `out/cost.json`.

    kind: of KINDS, an estimator's name with its `options`, or `batch means` (the mean of squared gradients of batch means, true labels: 1/B of a Fisher where the
    mean gradient is small), `adam` (B v_hat of the fine-tuning's own optimizer) or `ivon` (steps that leave the mean where it is).
    """
    rows = load_split(data, domain, "train")
    classifier = narrowed(load_classifier(model / "model"), rows.classes)
    given = rows.subset(examples, seed).given(batch_size, classifier)
    start = time.perf_counter()
    if kind == "adam":
        state = str(model / "optimizer.pt")
        found = from_adam(state, classifier, num_examples=len(rows), batch_size=trained_batch_size)
    elif kind == "ivon":
        found = ivon(classifier, given, len(rows), seed)
    elif kind == "batch means":
        found = Curvature.from_dict(squared_batch_means(classifier, given), len(rows), {"estimator": kind})
    else:
        told = KINDS[kind] if kind in KINDS else {"method": kind, **_gradient(kind)}
        shared = {"num_examples": len(rows), "samples": samples, "seed": seed}
        found = estimate(classifier, given, **shared, **{**told, **(options or {})})
    seconds = time.perf_counter() - start
    found.save(out / "curvature.safetensors")
    write_json(out / "cost.json", {"seconds": seconds, "num_examples": len(rows)})


def _gradient(method: str) -> dict[str, bool]:
    """The measured gradient too, where an estimator gives it."""
    return {"gradient": True} if "gradient" in gives_of(find_estimator(method)) else {}


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
    write_json(out / "error.json", errors(found, truth))


def errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error ||F^ - F|| / ||F||, ratio of traces, and correlation of the logarithms where F > 0.

    Both by parameter name, per-example means. The floor of the logarithm is 1e-14, below every value that counts.
    """
    f, h = (torch.cat([values[name].double().flatten() for name in truth]) for values in (found, truth))
    x, y = (value[h > 0].clamp(min=1e-14).log() for value in (f, h))
    return {
        "relative_error": float((f - h).norm() / h.norm()),
        "trace_ratio": float(f.sum() / h.sum()),
        "log_correlation": float(torch.corrcoef(torch.stack([x, y]))[0, 1]),  # NaN where one is constant
    }
