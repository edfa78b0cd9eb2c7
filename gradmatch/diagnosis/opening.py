"""The inputs of a diagnosis: models, curvatures and whose they are, the planned merge, the structure to run data through."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from estimators.curvature import Curvature
from estimators.fingerprint import fingerprint
from gradmatch.checkpoint import Checkpoint, open_checkpoint, read_json
from gradmatch.diagnosis.conflict import curvature_overlap
from gradmatch.inputs.curvatures import open_curvature
from gradmatch.inputs.opened import task_names
from gradmatch.names import nearest
from gradmatch.output.card import CARD
from gradmatch.plan.settings import numbers
from gradmatch.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.output.report import Report
    from gradmatch.task import Model

CurvatureLike = Curvature | str | os.PathLike[str]


def open_models(
    base: Model | Checkpoint, tasks: Sequence[Task], *, allow_pickle: bool = False
) -> tuple[Checkpoint, dict[str, Checkpoint], dict[str, float], dict[str, Curvature]]:
    """Base, and by task: model, weight (the mean where it varies over tensors), curvature where there is one.

    Raises:
        ValueError: no tasks.
        TypeError: tasks that are no Tasks.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not tasks:
        raise ValueError("no tasks: a diagnosis needs the base and at least one fine-tuned model")
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(
                f"tasks must be Task objects, got {type(task).__name__}; write Task(model, curvature, weight)"
            )
    theta0 = open_checkpoint(base, allow_pickle=allow_pickle)
    models: dict[str, Checkpoint] = {}
    weights: dict[str, float] = {}
    curvatures: dict[str, Curvature] = {}
    for name, task in zip(task_names(tasks), tasks, strict=True):
        models[name] = open_checkpoint(task.model, base=theta0, allow_pickle=allow_pickle)
        found = numbers(task.weight)
        weights[name] = sum(found) / len(found)
        if task.curvature is not None:
            curvatures[name] = open_curvature(task.curvature)
    return theta0, models, weights, curvatures


def check_tasks(what: str, given: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    """Refuse a table whose keys are no tasks.

    Raises:
        ValueError: such a key; the nearest task is named.
    """
    for task in given or {}:
        if task not in names:
            raise ValueError(
                f"{what} names a task {task!r} that is not merged{nearest(task, names)}; the tasks are {', '.join(names)}"
            )


def planned_merge(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    method: str,
    base_curvature: CurvatureLike | float | None,
    base_weight: float,
    delta0: float,
    options: Mapping[str, Any],
    notes: list[str],
) -> Mapping[str, Tensor] | None:
    """The merge as it would come out, in memory; None, with a note, where `merge` refuses."""
    from gradmatch.merging import merge

    arguments: dict[str, Any] = {
        "base_curvature": base_curvature,
        "base_weight": base_weight,
        "delta0": delta0,
        "allow_mismatch": True,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return merge(base, tasks, method=method, **arguments)
        except ValueError as error:
            notes.append(f"the merge itself was refused: {error}")
            return None


def linear_instead(report: Report | None, merged: Any) -> list[str]:
    """A note where SLERP interpolated linearly, as the report in memory or the folder's card tells; merges without one pass."""
    branches = report.branches if report else {}
    path = getattr(merged, "path", None)
    if report is None and path is not None and (Path(path) / CARD).is_file():
        branches = read_json(Path(path) / CARD).get("report", {}).get("branches") or {}
    linear, total = branches.get("lerp", 0), sum(branches.values())
    if not linear:
        return []
    return [
        f"SLERP was LERP in {linear} of {total} tensors: models that are nearly parallel, as fine-tunes of one base are, have no "
        "arc between them worth the name; there the merge is a plain weighted average"
    ]


def curvature_owners(
    base: Checkpoint,
    models: Mapping[str, Checkpoint],
    curvatures: Mapping[str, Curvature],
    base_curvature: Curvature | float | None,
) -> dict[str, str]:
    """Whose curvature -> the model that it was taken at, "" for none of these; curvatures without a fingerprint pass."""
    found: dict[str, str] = {}
    everyone = {"base": base, **models}
    given: dict[str, Curvature] = dict(curvatures)
    if isinstance(base_curvature, Curvature):
        given["base"] = base_curvature
    for whose, curvature in given.items():
        stored = curvature.info.get("fingerprint")
        if stored is None:
            continue
        order = [whose, *(model for model in everyone if model != whose)]
        found[whose] = next((m for m in order if _print_of(everyone[m], curvature) == stored), "")
    return found


def _print_of(model: Checkpoint, curvature: Curvature) -> str | None:
    try:
        return fingerprint(curvature, model.sample)
    except KeyError:
        return None


def curvature_overlaps(curvatures: Mapping[str, Curvature]) -> dict[tuple[str, str], float]:
    """(task, task) -> sum sqrt(h_s h_t) / sqrt(sum h_s sum h_t) over the parameters of both, in [0, 1]."""
    overlaps = {}
    for a, b in combinations(curvatures, 2):
        both = s = t = 0.0
        for name in curvatures[a]:
            if name in curvatures[b]:
                part = curvature_overlap(curvatures[a].mean(name), curvatures[b].mean(name))
                both, s, t = both + part[0], s + part[1], t + part[2]
        overlaps[a, b] = both / (s * t) ** 0.5 if s * t > 0 else 0.0
    return overlaps


def module_of(base: Model | Checkpoint, opened: Checkpoint) -> nn.Module:
    """The structure to run data through: the base where it is a module, else what its config.json describes.

    Raises:
        ValueError: neither.
    """
    if isinstance(base, torch.nn.Module):
        return base
    if isinstance(opened.module, torch.nn.Module):
        return opened.module
    architectures = (opened.config or {}).get("architectures") or []
    if opened.path is None or not architectures:
        raise ValueError(
            "data needs a module to run through: pass module=, or a base that is a module or a folder with a config.json"
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(opened.path)
    architecture = getattr(transformers, architectures[0], None)
    if architecture is None:
        raise ValueError(
            f"{opened.path} wants the architecture {architectures[0]!r}, which transformers lacks; pass module="
        )
    module: nn.Module = architecture(config)
    return module
