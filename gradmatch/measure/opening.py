"""The inputs of a diagnosis: models, curvatures and whose they are, the planned merge, the structure to run data through."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.common.settings import numbers
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.estimators.fingerprint import fingerprint
from gradmatch.estimators.names import nearest
from gradmatch.measure.conflict import curvature_overlap, sign_conflict
from gradmatch.measure.objective import Objective
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.curvatures import blocks, moved_curvature, open_curvature
from gradmatch.models.loading import load
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import spans, take
from gradmatch.models.task import Task
from gradmatch.models.views import as_module, like
from gradmatch.output.card import CARD
from gradmatch.plan.opened import task_names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.models.task import Model
    from gradmatch.output.report import Report

CurvatureLike = Curvature | str | os.PathLike[str]
AT_ONCE = 2**18  # values of every model and curvature that are compared at a time


def open_models(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    *,
    data: bool = False,
    base_curvature: object = None,
    allow_pickle: bool = False,
) -> tuple[Checkpoint, dict[str, Checkpoint], dict[str, float], dict[str, Curvature]]:
    """Base, and by task: model, weight (the mean where it varies over tensors), curvature where there is one.

    Where data are to be run, or a curvature has other names than the files, all are under the names of the base's module.

    Raises:
        ValueError: no tasks.
        TypeError: tasks that are no Tasks.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not tasks:
        raise GradmatchError(
            "no tasks: a diagnosis needs the base and at least one fine-tuned model", "bad_data"
        )
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
            curvatures[name] = moved_curvature(models[name], open_curvature(task.curvature), name)
    known = [*curvatures.values(), *([base_curvature] if isinstance(base_curvature, Curvature) else [])]
    if data or any(name not in theta0 for curvature in known for name in curvature):
        theta0 = as_module(theta0)
    return theta0, {name: like(model, theta0) for name, model in models.items()}, weights, curvatures


def check_tasks(what: str, given: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    """Refuse a table whose keys are no tasks.

    Raises:
        ValueError: such a key; the nearest task is named.
    """
    for task in given or {}:
        if task not in names:
            raise GradmatchError(
                f"{what} names a task {task!r} that is not merged{nearest(task, names)}; the tasks are {', '.join(names)}",
                "bad_data",
            )


def open_objectives(
    data: Mapping[str, Iterable[Any]],
    sizes: Mapping[str, int],
    base: Model | Checkpoint,
    theta0: Checkpoint,
    module: nn.Module | None,
    likelihood: str | Any,
) -> dict[str, Objective]:
    """Task -> its loss on data; one example batch of each is run at the base, so that data which does not fit is told early.

    Raises:
        ValueError: no batches, or a module whose parameters are not the base's.
        TypeError: batches that are none.
    """
    if not data:
        return {}
    structure = module or module_of(base, theta0)
    objectives = {}
    for task, batches in data.items():
        if isinstance(batches, Mapping | torch.Tensor | str):
            raise TypeError(
                f"data of {task!r} is a {type(batches).__name__}; give a list (or any iterable) of batches, [batch] for a single one"
            )
        try:
            objectives[task] = Objective(structure, batches, sizes.get(task), likelihood)
            objectives[task].first(1).losses(theta0)
        except TypeError as error:
            raise TypeError(f"data of {task!r}: {error}") from error
        except ValueError as error:
            raise GradmatchError(f"data of {task!r}: {error}", "bad_data") from error
        except (RuntimeError, IndexError) as error:  # torch's own
            raise GradmatchError(
                f"data of {task!r}: the module cannot be run on its first batch ({error}); these may be inputs of another model or tokenizer",
                "bad_data",
            ) from error
    return objectives


ADAPTER = (
    "space",
    "rank",
)  # of a merged adapter: what is looked at here is the model that it makes, but for a cut rank


def planned_merge(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    method: str,
    base_curvature: CurvatureLike | float | None,
    base_weight: float,
    delta0: float,
    options: Mapping[str, Any],
) -> tuple[Mapping[str, Tensor] | None, str]:
    """The merge as it would come out, in memory; or None, and why `merge` refuses."""
    from gradmatch.merging import merge

    arguments: dict[str, Any] = {
        "base_curvature": base_curvature,
        "base_weight": base_weight,
        "delta0": delta0,
        "allow_mismatch": True,
        **{name: value for name, value in options.items() if name not in ADAPTER},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return merge(base, tasks, method=method, **arguments), ""
        except ValueError as error:
            return None, str(error)


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


def compared_curvatures(
    base: Checkpoint, models: Mapping[str, Checkpoint], curvatures: Mapping[str, Curvature]
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """Pairs of tasks by what their curvatures share, over the parameters of both.

    Returns:
        (task, task) -> sum sqrt(h_s h_t) / sqrt(sum h_s sum h_t) in [0, 1], and (task, task) -> sum w [opposite signs] / sum w [both
        moved] with w = h_s + h_t of the summed losses (0.5 for unrelated tasks; no entry where no such weight moved).
    """
    pairs = list(combinations(curvatures, 2))
    shared = {pair: [0.0, 0.0, 0.0] for pair in pairs}
    signs = {pair: [0.0, 0.0] for pair in pairs}
    stores = {task: blocks(curvature) for task, curvature in curvatures.items()}
    for name in dict.fromkeys(name for store in stores.values() for name in store):
        shapes = {task: store.spec(name).shape for task, store in stores.items() if name in store}
        for shape in set(shapes.values()):
            held = [task for task in shapes if shapes[task] == shape]
            known = [t for t in held if all(_has(model, name, shape) for model in (base, models[t]))]
            for part in spans(math.prod(shape), AT_ONCE) if len(held) > 1 else ():
                h = {t: take(stores[t], name, *part) * curvatures[t].num_examples for t in held}
                tau = {
                    t: models[t].block(name, *part).float() - base.block(name, *part).float() for t in known
                }
                for a, b in combinations(held, 2):
                    for place, value in enumerate(curvature_overlap(h[a], h[b])):
                        shared[a, b][place] += value
                    if a in tau and b in tau:
                        weight = (h[a] + h[b]).clamp(min=0)
                        for place, value in enumerate(sign_conflict(tau[a], tau[b], weight)):
                            signs[a, b][place] += value
    overlaps = {pair: both / (s * t) ** 0.5 if s * t > 0 else 0.0 for pair, (both, s, t) in shared.items()}
    return overlaps, {pair: against / moving for pair, (against, moving) in signs.items() if moving > 0}


def _has(model: Checkpoint, name: str, shape: tuple[int, ...]) -> bool:
    return name in model and model.spec(name).shape == shape


def module_of(base: Model | Checkpoint, opened: Checkpoint) -> nn.Module:
    """The structure to run data through: the base where it is a module, else what its config.json describes, with its weights.

    Raises:
        ValueError: neither, or a parameter that the base's files do not give.
    """
    if isinstance(base, torch.nn.Module):
        return base
    if isinstance(opened.module, torch.nn.Module):
        return opened.module
    return load(opened)
