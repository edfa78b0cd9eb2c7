"""Un-merging: a task's belief is divided out of a merge, without the other tasks' models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.merging import POSTERIOR, CurvatureLike, Merged, execute, prepare
from gradmatch.models.curvatures import open_curvature
from gradmatch.models.task import Task
from gradmatch.plan.step import Origin, Plan

if TYPE_CHECKING:
    from gradmatch.estimators.curvature import Curvature
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

# rules whose tasks' beliefs hold H0 beside H_t: all that are Eq. 12, fisher with the floor alone
EQ12, FLOORED = ("gradient_matching", "kronecker"), ("fisher", "mats")
RUNNING = ("out", "overwrite", "progress")


def unmerge(
    merged: Model | Checkpoint,
    posterior: CurvatureLike | None,
    task: Task,
    *,
    base: Model | Checkpoint | None = None,
    base_curvature: CurvatureLike | float | None = None,
    **options: Any,
) -> Merged | Checkpoint:
    """Take a task out of a merge: theta - alpha (P - alpha H_t)^-1 (H_t (theta_t - theta) + H0 (theta_t - theta0)).

    P is the posterior precision of the merge theta. Of a merge by gradient_matching, fisher, kronecker or mats the result is the merge
    of the other tasks, exactly but for rounding (float64 is worth its time here: the difference of two precisions is divided by). Matrices
    with Kronecker factors must have been merged with solver="exact", tolerance=1e-12: what their fast solution leaves would be blown up.

    Args:
        merged: the merge, as `merge` returned it, or its folder.
        posterior: of the merge, `merge(...).posterior` or its file; None: the file beside the folder's weights.
        task: the model, curvature and weight that it was merged with; its name tells which one it was, if it has one.
        base: what the tasks were merged on; not needed for a merge in memory, or by fisher and mats with delta0=0.
        base_curvature: as it was given to the merge by gradient_matching or kronecker; not needed for a merge in memory.
        **options: out, overwrite, progress, dtype and other policies, as for `merge`.

    Returns:
        As `merge`, with the posterior of what is left.

    Raises:
        ValueError: as `merge`; also a posterior of another merge or method, or of a merge that is no mode to rounding, a weight that is not the one of the merge, no base where it
            is needed, and a posterior of which nothing but rounding is left.
        TypeError: a task that is none.

    Example:
        >>> import torch
        >>> from gradmatch import Curvature, Task, merge
        >>> state = lambda x: {"w": torch.tensor([x], dtype=torch.float64)}
        >>> h = lambda x: Curvature.from_dict(state(x), 1)
        >>> a, b = Task(state(1.0), h(1.0), name="a"), Task(state(3.0), h(2.0), name="b")
        >>> both = merge(state(0.0), [a, b], base_curvature=h(1.0))
        >>> round(unmerge(both, both.posterior, b)["w"].item(), 9), merge(state(0.0), [a], base_curvature=h(1.0))["w"].item()
        (1.0, 1.0)
    """
    if not isinstance(task, Task):
        raise TypeError(f"what is taken out is a Task(model, curvature, weight), not {type(task).__name__}")
    if posterior is None and isinstance(merged, (str, os.PathLike)):
        posterior = Path(merged) / POSTERIOR
    if posterior is None:
        raise GradmatchError(
            "unmerge needs the posterior of the merge: merge(...).posterior, or its file", "bad_curvature"
        )
    known = open_curvature(posterior)
    method = _method(known)
    weights = _weights(known, task)
    if isinstance(merged, Merged) and base is None:
        before = origin(merged.made)
        base = before.base
        base_curvature = before.base_curvature if base_curvature is None else base_curvature
    floor, base_weight = float(known.info["delta0"]), float(known.info["base_weight"])
    tasks, prior = [task], floor
    if method in EQ12 and base_curvature is not None:
        if isinstance(base_curvature, (int, float)):
            prior += base_weight * base_curvature
        elif base is not None:
            name = f"base of {task.name}" if task.name else "the base"
            tasks.append(Task(base, base_curvature, base_weight, name=name))
    lacks = [
        name
        for name, given, needed in (
            ("base", base, method in EQ12 or prior > 0),
            ("base_curvature", base_curvature, method in EQ12),
        )
        if needed and given is None
    ]
    if lacks:
        raise GradmatchError(
            f"a merge by {method} is taken apart with {' and '.join(lacks)}=..., as {'they were' if len(lacks) > 1 else 'it was'} given to it",
            "bad_setting",
            lacks[0],
        )
    running = {name: options.pop(name) for name in RUNNING if name in options}
    made = prepare(
        merged, tasks, method="gradmatch.rules.family:UNMERGED", base_curvature=known, anchor=merged if base is None else base,
        delta0=0.0, prior=prior, solver="exact", tolerance=1e-13, iterations=1000, **options,
    )  # fmt: skip
    kept = {key: known.info[key] for key in ("method", "base_weight", "delta0")}
    made.origin = Origin(base, base_curvature, kept | {"weights": json.dumps(weights)})
    return execute(made, posterior=True, **running)


def origin(made: Plan) -> Origin:
    """What the merge was made with: its own base and curvature, or of an un-merged model those of the merge before."""
    given = made.inputs.base_curvature
    h0 = given if given is None or isinstance(given, float) else given.curvature
    return made.origin or Origin(made.inputs.base, h0, {})


def _method(posterior: Curvature) -> str:
    """The method of the merge.

    Raises:
        ValueError: no posterior of a merge, or of one whose tasks' beliefs cannot be told apart.
    """
    method = posterior.info.get("method", "")
    if posterior.info.get("estimator") != "posterior":
        raise GradmatchError(
            f"a curvature of {posterior.info.get('estimator')!r} is no posterior of a merge; it is merge(...).posterior, or the file "
            f"{POSTERIOR} that merge(..., posterior=True) writes",
            "bad_curvature",
        )
    if method not in EQ12 + FLOORED:
        raise GradmatchError(
            f"tasks cannot be taken out of a merge by {method}; of {', '.join(EQ12 + FLOORED)} they can",
            "bad_setting",
            method,
        )
    if why := posterior.info.get("inexact"):
        raise GradmatchError(
            f"a task cannot be taken out of this merge, which is not exactly the mode of the tasks' beliefs: {why}",
            "bad_setting",
            "posterior",
        )
    return method


def _weights(posterior: Curvature, task: Task) -> dict[str, Any]:
    """The weights of the tasks that are left, after comparing this one's with what the merge says of it.

    Raises:
        ValueError: no task of this name, or another weight.
    """
    weights: dict[str, Any] = json.loads(posterior.info.get("weights", "{}"))
    name = task.name
    if not name and isinstance(task.model, (str, os.PathLike)):
        name = Path(task.model).name if Path(task.model).name in weights else ""
    if not name:
        return weights
    if name not in weights:
        raise GradmatchError(
            f"no task {name!r} was merged{nearest(name, weights)}; there were {', '.join(weights)}",
            "bad_tasks",
            name,
        )
    if json.loads(json.dumps(task.weight)) != weights[name]:
        raise GradmatchError(
            f"{name} was merged with the weight {weights[name]}, not {task.weight}; give that weight",
            "bad_tasks",
            name,
        )
    return {one: weight for one, weight in weights.items() if one != name}
