"""Stage: one merge at many weights alpha, each evaluated on the test examples without writing a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.evaluate import measure, predict, with_averages
from experiments.merging import Metrics, chosen_options, merged_model
from experiments.models import load_classifier, load_split


def sweep(
    out: Path,
    *,
    method: str,
    alphas: Sequence[float],
    options: Mapping[str, Any],
    data: Path,
    domains: Sequence[str],
    choice: Path | None = None,
    **sources: Any,
) -> None:
    """Metrics at every alpha, in `out/sweep.json`. An option chosen on validation examples (at alpha = 1) is kept fixed."""
    model = load_classifier(sources["base"] / "model")
    rows = {domain: load_split(data, domain, "test") for domain in domains}

    def score(alpha: float, chosen: Mapping[str, Any]) -> Metrics:
        model.load_state_dict(dict(merged_model(method, alpha, {**options, **chosen}, **sources)))
        return with_averages({domain: measure(*predict(model, rows[domain])) for domain in domains})

    write_sweep(out, alphas, choice, score)


def write_sweep(
    out: Path,
    alphas: Sequence[float],
    choice: Path | None,
    score: Callable[[float, Mapping[str, Any]], Metrics],
) -> None:
    """`out/sweep.json`: score(alpha, chosen options) at every alpha; `choice` is the folder of a `choose` stage."""
    chosen = chosen_options(choice)
    points = [{"alpha": alpha, "metrics": score(alpha, chosen)} for alpha in tqdm(alphas, desc="alpha")]
    found = {"chosen": chosen, "points": points}
    (out / "sweep.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
