"""The plan of a merge: every tensor, what will happen to it and why, decided from headers before any value is read.

Everything that headers, configs and options can reveal as wrong is an error here. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.common.names import nearest
from gradmatch.common.settings import Depth, value_at
from gradmatch.common.warning import warn
from gradmatch.models.stores import SAFETENSORS_NAME, Spec
from gradmatch.plan.matching import check_extra, check_kinds, participants
from gradmatch.plan.policies import (
    batchnorm_action,
    check_file_names,
    head_prefixes,
    idle_patterns,
    tied_differently,
)
from gradmatch.plan.request import Edits, Request, resolve_options
from gradmatch.plan.step import Plan, Step
from gradmatch.rules.edits import check_options, given_or_widest
from gradmatch.rules.linear import weight_sum

if TYPE_CHECKING:
    from gradmatch.plan.opened import Inputs

PER_TASK = ("density", "epsilon", "gamma")


def plan(inputs: Inputs, request: Request) -> Plan:
    """Decide what happens to every tensor of the base.

    Raises:
        ValueError: whatever does not fit together; the message names the tensor, both values and the option that settles it.
    """
    rule, count = request.rule, len(inputs.tasks)
    fewest, most = rule.models
    if not fewest <= count <= most:
        wanted = f"{fewest}" if fewest == most else f"at least {fewest}"
        raise ValueError(f"{request.method} takes {wanted} task{'s' * (fewest > 1)}, got {count}")
    rule_options, chain = resolve_options(request)
    _check_task_options(inputs.tasks, chain)
    result = Plan(request, inputs, [])
    base = inputs.base
    tied_differently(base, inputs.tasks)
    heads = head_prefixes(base, inputs.tasks, request)
    if request.heads == "keep-per-task":
        check_file_names([task.name for task in inputs.tasks])
    depth = Depth(base)
    check_extra(result, heads)
    for name in base:
        if name in base.aliases:
            continue
        spec = base.spec(name)
        out = Spec(SAFETENSORS_NAME[request.dtype], spec.shape) if request.dtype and spec.floating else spec
        if any(name == head or name.startswith(head + ".") for head in heads):
            result.steps.append(
                Step(name, "copy", out, spec.dtype, "head: the base's", bytes_read=spec.nbytes)
            )
            continue
        action, why = batchnorm_action(name, base, inputs.tasks, request)
        if not action and not spec.floating:
            check_kinds(name, spec, inputs.tasks)
            action, why = "copy", f"{spec.dtype} buffer: the base's"
        if action == "copy":
            result.steps.append(Step(name, "copy", out, spec.dtype, why, bytes_read=spec.nbytes))
            continue
        tasks = participants(name, spec, result)
        if not tasks:
            result.steps.append(
                Step(name, "copy", out, spec.dtype, "in no task: the base's", bytes_read=spec.nbytes)
            )
            continue
        if len(tasks) < fewest:
            raise ValueError(
                f"tensor {name!r} is in {len(tasks)} of the tasks, and {request.method} needs {fewest} that have it; missing='base' "
                "cannot help here: use another method, or tasks of one architecture"
            )
        here = depth.of(name)
        alpha = tuple(_weight(inputs.tasks[t], name, here) for t in tasks)
        specs = [spec, *(inputs.tasks[t].checkpoint.spec(name) for t in tasks)]
        compute = _compute_dtype(specs, request.precision)
        options = {
            key: value_at(value, name, here, key)
            for key, value in rule_options.items()
            if not callable(value)
        }
        owners = [inputs.tasks[t] for t in tasks]
        edits = tuple((edit, _edit_options(own, owners, name, here)) for edit, own in chain)
        if action == "average":
            result.steps.append(
                Step(
                    name,
                    "average",
                    out,
                    compute,
                    why,
                    tasks,
                    alpha,
                    bytes_read=sum(s.nbytes for s in specs[1:]),
                )
            )
            continue
        known, matrix = inputs.curvatures_of(name, tasks, request, spec)
        factors = "gram matrices" if "gram" in rule.needs else "Kronecker factors"
        action, why = ("matrix", factors) if matrix else ("merge", "")
        nbytes = sum(s.nbytes for s in specs) + sum(known)
        result.steps.append(Step(name, action, out, compute, why, tasks, alpha, options, edits, nbytes))
    for step in result.steps:  # weights that cannot be normalised are found now
        if step.action in ("merge", "matrix", "average") and rule.relative:
            weight_sum(step.alpha)
        elif step.action == "merge" and rule.linear is not None and not rule.gram:
            rule.linear(step.alpha, None, step.options)
    result.notes += request.notes
    for note in idle_patterns(base, inputs.tasks, request, rule_options, chain):
        result.notes.append(note)
        warn(note)
    inputs.describe(result.notes, request)
    return result


def _check_task_options(tasks: Sequence[Any], chain: Edits) -> None:
    """Options that a task has of its own.

    Raises:
        ValueError: one that no transform takes for a single task, or out of range.
    """
    for task in tasks:
        known = {key for _, options in chain for key in options if key in PER_TASK}
        for key in task.options:
            if key not in known:
                takes = f"it takes {', '.join(sorted(known))}" if known else "the method has none"
                raise ValueError(
                    f"{task.name} has no option {key!r} of its own{nearest(key, known)}; {takes}"
                )
        for edit, options in chain:
            check_options(
                edit, {**options, **{key: value for key, value in task.options.items() if key in options}}
            )


def _edit_options(
    options: Mapping[str, Any], tasks: Sequence[Any], name: str, depth: float | None
) -> dict[str, Any]:
    """A transform's options for one tensor; a tuple, one value a task, where tasks have their own."""
    found: dict[str, Any] = {}
    for key, shared in options.items():
        if key == "seed":
            found[key] = int(shared)  # whole: a float would lose digits
            continue
        values = tuple(value_at(task.options.get(key, shared), name, depth, key) for task in tasks)
        own = key in PER_TASK and any(key in task.options for task in tasks)
        found[key] = values if own else values[0]
    if "epsilon" in found:
        found["epsilon"] = given_or_widest(found["epsilon"], found["density"])
    return found


def _weight(task: Any, name: str, depth: float | None) -> float:
    """alpha_t of one tensor.

    Raises:
        ValueError: not finite.
        TypeError: no number.
    """
    weight = value_at(task.weight, name, depth, f"the weight of {task.name}")
    if isinstance(weight, (bool, str)) or weight is None:
        raise TypeError(f"the weight of {task.name} is {weight!r}; it must be a number")
    if not math.isfinite(weight):
        raise ValueError(f"the weight of {task.name} is {weight}; it must be finite")
    return float(weight)


def _compute_dtype(specs: Sequence[Spec], precision: str) -> str:
    """float32, or float64 where an input is or where it was asked for."""
    if precision == "auto":
        return "F64" if any(spec.dtype == "F64" for spec in specs) else "F32"
    return "F64" if precision == "float64" else "F32"
