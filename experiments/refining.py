"""Stage: a merge refined on a network (claim 10): the objective of Eq. 9 after each step, and the test accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.evaluate import scorer
from experiments.files import write_json
from experiments.merging import CURVATURE, merged_model
from experiments.mismatch import BATCH, objective
from experiments.models import load_classifier, narrowed
from experiments.rows import Views, load_split
from gradmatch.estimators import Curvature, estimate
from gradmatch.refine import refine


def refine_stage(
    out: Path,
    *,
    method: str,
    data: Views,
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

    def fisher(task: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = load_split(data, task, "train")
        model = narrowed(load_classifier(sources["base"] / "model"), rows.classes)
        model.load_state_dict(dict(weights))
        given = rows.subset(examples, seed).given(BATCH, model)
        found = estimate(model, given, num_examples=len(rows), seed=seed, progress=False)
        return {name: found.total(name) for name in found}

    h0 = Curvature.load(sources["base_curvature"] / CURVATURE)
    found = refine(
        theta,
        theta0,
        {task: objective(data, sources["base"], task, examples, seed) for task in tasks},
        alpha=dict.fromkeys(tasks, 1.0),
        h0={name: h0.total(name) + sources["delta0"] for name in h0},
        curvature=fisher,
        steps=steps,
        damping=damping,
    )
    score = scorer(sources["base"], data, tasks, "test")
    told = {"before": score(theta), "after": score(found.theta)}
    write_json(out / "refined.json", {"values": found.values, "sizes": found.sizes, **told})
