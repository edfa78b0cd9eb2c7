"""Stages: merge fine-tuned models, measure a merge that is not kept, choose a merge's option on validation examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.evaluate import Metrics, scorer, write_metrics
from experiments.files import write_json
from experiments.mismatch import objective, write_mismatch
from experiments.models import load_classifier
from experiments.rows import Views
from gradmatch import Task, merge

CURVATURE = "curvature.safetensors"


def merge_stage(
    out: Path,
    *,
    method: str,
    alpha: float,
    options: Mapping[str, Any],
    choice: Path | None = None,
    **sources: Any,
) -> None:
    """Merge into `out/model`, a folder that from_pretrained loads; `choice` is the folder of a `choose` stage.

    sources: base, tasks, base_curvature, curvatures (folders of stages), delta0.
    """
    merged_model(method, alpha, {**options, **chosen_options(choice)}, out=out / "model", **sources)


def merged_model(
    method: str,
    alpha: float,
    options: Mapping[str, Any],
    *,
    base: Path,
    tasks: Mapping[str, Path],
    base_curvature: Path | None = None,
    curvatures: Mapping[str, Path] | None = None,
    delta0: float | None = None,
    out: Path | None = None,
) -> Any:
    """theta of one rule; options called `alpha` and `delta0` replace the weight of every task and the floor."""
    given = {**({} if delta0 is None else {"delta0": delta0}), **options}
    weight = given.pop("alpha", alpha)

    def curvature(folder: Path | None) -> str | None:
        return None if folder is None else str(folder / CURVATURE)

    merge_tasks = [
        Task(str(folder / "model"), curvature((curvatures or {}).get(name)), weight=weight, name=name)
        for name, folder in tasks.items()
    ]
    h0 = curvature(base_curvature)
    return merge(str(base / "model"), merge_tasks, method=method, base_curvature=h0, out=out, **given)


def merge_and_measure(
    out: Path,
    *,
    method: str,
    alpha: float,
    options: Mapping[str, Any],
    data: Views,
    domains: Sequence[str],
    gradients: Mapping[str, Path],
    examples: int,
    seed: int,
    choice: Path | None = None,
    **sources: Any,
) -> None:
    """`out/metrics.json` on the test examples of `domains` (with `out/<domain>.npz`), `out/mismatch.json` over the tasks.

    sources: as `merged_model` takes them; gradients: task -> folder of its own gradient, empty to leave the mismatch out;
    choice: folder of a `choose` stage.
    """
    theta = dict(merged_model(method, alpha, {**options, **chosen_options(choice)}, **sources))
    model = load_classifier(sources["base"] / "model")
    model.load_state_dict(theta)
    write_metrics(out, model, data, domains, "test")
    if gradients:
        losses = {task: objective(data, sources["base"], task, examples, seed) for task in gradients}
        write_mismatch(out, theta, losses, gradients, sources["base_curvature"])


def choose(
    out: Path,
    *,
    method: str,
    alpha: float,
    options: Mapping[str, Any],
    grid: Mapping[str, Sequence[float]],
    data: Views,
    domains: Sequence[str],
    **sources: Any,
) -> None:
    """Try each value of the grid's one option on the validation examples; `out/choice.json` keeps all and the best.

    Best: lowest negative log-likelihood, macro average over the domains. Test examples are never read.
    """
    score = scorer(sources["base"], data, domains, "validation")
    write_choice(
        out, grid, lambda setting: score(merged_model(method, alpha, {**options, **setting}, **sources))
    )


def chosen_options(choice: Path | None) -> dict[str, Any]:
    """What a `choose` stage chose, by option; nothing where there is none."""
    if choice is None:
        return {}
    found: dict[str, Any] = json.loads((choice / "choice.json").read_text(encoding="utf-8"))["chosen"]
    return found


def write_choice(
    out: Path, grid: Mapping[str, Sequence[Any]], score: Callable[[Mapping[str, Any]], Metrics]
) -> None:
    """`out/choice.json`: every value of the grid's one option with its macro averages, and the lowest likelihood loss."""
    ((option, values),) = grid.items()
    tried = []
    for value in tqdm(values, desc=f"choosing {option}"):
        macro = score({option: value})["macro"]
        tried.append({"value": value, "nll": macro["nll"], "accuracy": macro["accuracy"]})
    best = min(tried, key=lambda cell: cell["nll"])
    write_json(out / "choice.json", {"chosen": {option: best["value"]}, "tried": tried})
