"""Stage: a merge refined on a network (claim 10): the objective of Eq. 9 after each step, and the test accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.evaluate import measure, predict, with_averages
from experiments.merging import merged_model
from experiments.mismatch import objective
from experiments.models import batches, load_classifier, load_split, subset
from gradmatch.estimators import Curvature, estimate
from gradmatch.refine import refine


def refine_stage(
    out: Path,
    *,
    method: str,
    data: Path,
    examples: int,
    steps: int,
    damping: float,
    seed: int,
    **sources: Any,
) -> None:
    """Merge, then refine on `examples` of each task's training set; `out/refined.json`.

    sources: as `merging.merged_model` takes them. H_t is estimated again (Monte-Carlo Fisher) before every step.
    """
    theta0 = dict(load_classifier(sources["base"] / "model").state_dict())
    theta = dict(merged_model(method, 1.0, {}, **sources))
    tasks = list(sources["tasks"])
    losses = {task: objective(data, sources["base"], task, examples, seed) for task in tasks}
    model = load_classifier(sources["base"] / "model")

    def fisher(task: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model.load_state_dict(dict(weights))
        rows = load_split(data, task, "train")
        given = [batch for _, batch in batches(subset(rows, examples, seed), 32)]
        found = estimate(model, given, num_examples=len(rows), seed=seed, progress=False)
        return {name: found.total(name) for name in found}

    h0 = Curvature.load(sources["base_curvature"] / "curvature.safetensors")
    found = refine(
        theta,
        theta0,
        losses,
        alpha=dict.fromkeys(tasks, 1.0),
        h0={name: h0.total(name) + sources["delta0"] for name in h0},
        curvature=fisher,
        steps=steps,
        damping=damping,
    )
    metrics = []
    for weights in (theta, found.theta):
        model.load_state_dict(dict(weights))
        own = {task: measure(*predict(model, load_split(data, task, "test"))) for task in tasks}
        metrics.append(with_averages(own))
    card = {"values": found.values, "sizes": found.sizes, "before": metrics[0], "after": metrics[1]}
    (out / "refined.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
