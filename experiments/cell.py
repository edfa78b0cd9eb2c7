"""Stage: one merge that is measured and not kept: its test accuracy and its gradient mismatch, without a model on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate import predict, write_metrics
from experiments.merging import chosen_options, merged_model
from experiments.mismatch import objective, write_mismatch
from experiments.models import load_classifier, load_split


def merge_and_measure(
    out: Path,
    *,
    method: str,
    alpha: float,
    options: Mapping[str, Any],
    data: Path,
    domains: Sequence[str],
    gradients: Mapping[str, Path],
    examples: int,
    seed: int,
    choice: Path | None = None,
    **sources: Any,
) -> None:
    """`out/metrics.json` on the test examples of `domains` (with `out/<domain>.npz`), `out/mismatch.json` over the tasks.

    sources: as `merging.merged_model` takes them; gradients: task -> folder of its own gradient, empty to leave the
    mismatch out; choice: folder of a `choose` stage.
    """
    chosen = chosen_options(choice)
    theta = dict(merged_model(method, alpha, {**options, **chosen}, **sources))
    model = load_classifier(sources["base"] / "model")
    model.load_state_dict(theta)
    write_metrics(
        out, {domain: predict(model, load_split(data, domain, "test"), domain) for domain in domains}
    )
    if gradients:
        losses = {task: objective(data, sources["base"], task, examples, seed) for task in gradients}
        write_mismatch(out, theta, losses, gradients, sources["base_curvature"], sources["delta0"])
