"""What holds for one tensor of a merge: the tasks' weights, and the edits of its merged update; and what holds for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import value_at
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.plan.request import Edits, Request
from gradmatch.rules.after import AFTER
from gradmatch.rules.options import takes

if TYPE_CHECKING:
    from gradmatch.plan.inputs import Inputs, OpenTask


def check_count(inputs: Inputs, request: Request) -> None:
    """Whether the method takes so many tasks.

    Raises:
        ValueError: it does not.
    """
    count, (fewest, most) = len(inputs.tasks), request.rule.models
    if not fewest <= count <= most:
        number = fewest if count < fewest else most
        bound = "" if fewest == most else "at least " if count < fewest else "at most "
        raise GradmatchError(
            f"{request.method} takes {bound}{number:g} task{'s' * (number > 1)}, got {count}", "bad_setting"
        )


def check_task_options(tasks: Sequence[OpenTask], request: Request) -> None:
    """Options that a task has of its own.

    Raises:
        ValueError: one that no transform takes for a single task, or out of range.
    """
    known = {name for _, options in request.edits for name in options.per_task()}
    for task in tasks:
        for key in task.options:
            if key not in known:
                said = takes(known) if known else "the method has none"
                raise GradmatchError(
                    f"{task.name} has no option {key!r} of its own{nearest(key, known)}; {said}",
                    "unknown_option",
                    task.name,
                )
        for edit, options in request.edits:
            options.changed(edit, {key: value for key, value in task.options.items() if key in options})


def weight_of(task: Any, name: str, depth: float | None) -> float:
    """alpha_t of one tensor.

    Raises:
        ValueError: not finite.
        TypeError: no number.
    """
    weight = value_at(task.weight, name, depth, f"the weight of {task.name}")
    if isinstance(weight, (bool, str)) or weight is None:
        raise TypeError(f"the weight of {task.name} is {weight!r}; it must be a number")
    if not math.isfinite(weight):
        raise GradmatchError(
            f"the weight of {task.name} is {weight}; it must be finite", "out_of_range", task.name
        )
    return float(weight)


def after_of(
    request: Request,
    matrix: bool,
    here: float | None,
    name: str,
    alpha: Sequence[float],
    owners: Sequence[OpenTask],
) -> tuple[Edits, str]:
    """The edits of one tensor's merged update, and which of them leave it as it is.

    Raises:
        ValueError: an edit that must know the layers of a model that has none, or makes no sense of a negative weight.
    """
    found, left = [], []
    for edit, options in request.after_edits:
        kind = AFTER[edit]
        if kind.matrices and not matrix:
            left.append(edit)
            continue
        if kind.deep and here is None:
            raise GradmatchError(
                f"{edit} scales by the layer, and names such as {name!r} hold no layers; give weights by patterns of names instead",
                "bad_setting",
                name,
            )
        negative = [task.name for task, weight in zip(owners, alpha, strict=True) if weight < 0]
        if kind.positive and negative and request.rule.weighs:
            raise GradmatchError(
                f"{edit} compares the merge with what every task asks for, and {negative[0]} is taken away (weight {min(alpha):g}); "
                f"leave {edit} out, or the task",
                "bad_setting",
                edit,
            )
        found.append((edit, options.at(name, here)))
    return tuple(found), f"no matrix: not edited by {', '.join(left)}" if left else ""
