"""The plan of a merge: every tensor, what will happen to it and why, decided from headers before any value is read.

Everything that headers, configs and options can reveal as wrong is an error here. Imports no torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.inputs.stores import SAFETENSORS_NAME, Spec
from gradmatch.names import nearest
from gradmatch.plan.policies import (
    batchnorm_action,
    check_file_names,
    head_prefixes,
    idle_patterns,
    tied_differently,
)
from gradmatch.plan.request import Edits, Request, resolve_options
from gradmatch.plan.settings import FIRST, Depth, value_at
from gradmatch.rules.linear import weight_sum
from gradmatch.transforms import check_options

if TYPE_CHECKING:
    from gradmatch.checkpoint import Checkpoint
    from gradmatch.inputs.opened import Inputs, OpenTask

PER_TASK = ("density", "epsilon", "gamma")


@dataclass(frozen=True)
class Step:
    """What happens to one output tensor.

    Attributes:
        name: of the tensor in the output.
        action: "merge", "copy" (from the base), "average" (BatchNorm statistics), "matrix" (RegMean).
        spec: shape and output dtype.
        compute: dtype of the arithmetic, "F32" or "F64".
        why: for the printed plan.
        tasks: positions of the tasks that take part.
        alpha: their weights.
        options: the rule's options here.
        edits: the transforms with their options here.
        bytes_read: of all inputs together.
    """

    name: str
    action: str
    spec: Spec
    compute: str = "F32"
    why: str = ""
    tasks: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    edits: Edits = ()
    bytes_read: int = 0

    @property
    def along(self) -> str:
        """Which vectors of a tensor the rule treats one by one: "rows", "columns", or "" where it treats the tensor as one."""
        chosen = self.options.get("along", "tensor")
        return "" if chosen == "tensor" else str(chosen)

    @property
    def whole(self) -> bool:
        """Whether the rule needs all of the tensor at once."""
        return self.action == "matrix" or (
            self.along != "" and (self.along == "columns" or len(self.spec.shape) > 2)
        )


@dataclass
class Plan:
    """All steps of a merge, with what a reader should know before it runs."""

    request: Request
    inputs: Inputs
    steps: list[Step]
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    heads: dict[int, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs, once."""
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's tensors."""
        return sum(step.spec.nbytes for step in self.steps)


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
    _check_extra(result, heads)
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
            _check_kinds(name, spec, inputs.tasks)
            action, why = "copy", f"{spec.dtype} buffer: the base's"
        if action == "copy":
            result.steps.append(Step(name, "copy", out, spec.dtype, why, bytes_read=spec.nbytes))
            continue
        tasks = _participants(name, spec, result)
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
        known = inputs.curvatures_of(name, tasks, request, spec)
        action, why = ("matrix", "gram matrices") if known and rule.matrix else ("merge", "")
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
        warnings.warn(note, stacklevel=3)
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


def _check_kinds(name: str, spec: Spec, tasks: Sequence[OpenTask]) -> None:
    """Integers of the base are copied.

    Raises:
        ValueError: a task has floats there: the base's are quantised weights, not a buffer.
    """
    for task in tasks:
        if name in task.checkpoint and task.checkpoint.spec(name).floating:
            raise ValueError(
                f"tensor {name!r} is {spec.dtype} in the base and {task.checkpoint.spec(name).dtype} in {task.name}; quantised "
                "weights cannot be merged: pass the unquantised base"
            )


def _prefix_hint(base: Checkpoint, task: Checkpoint) -> str:
    """What to say where the names of two models differ by a prefix alone, as those of a bare model and one with a head do."""
    ours, theirs = set(base), set(task)
    for longer, shorter, owner in ((theirs, ours, "the task"), (ours, theirs, "the base")):
        for prefix in sorted({name.partition(".")[0] + "." for name in longer}):
            inner = {name.removeprefix(prefix) for name in longer if name.startswith(prefix)}
            if len(inner & shorter) > len(shorter) / 2:
                return f"; names of {owner} begin with {prefix!r}: one of the two is a bare model, load both as the same class"
    if not ours & theirs:
        return "; in fact the two share no tensor at all: they are models of different architectures"
    return ""


def _compute_dtype(specs: Sequence[Spec], precision: str) -> str:
    """float32, or float64 where an input is or where it was asked for."""
    if precision == "auto":
        return "F64" if any(spec.dtype == "F64" for spec in specs) else "F32"
    return "F64" if precision == "float64" else "F32"


def _participants(name: str, spec: Spec, result: Plan) -> tuple[int, ...]:
    """Positions of the tasks that have this tensor in this shape.

    Raises:
        ValueError: a task lacks it and no policy was chosen, or its shape or kind differs.
    """
    tasks = []
    for position, task in enumerate(result.inputs.tasks):
        if name not in task.checkpoint:
            if result.request.missing == "error":
                raise ValueError(
                    f"tensor {name!r} {spec} of the base is missing in {task.name} ({task.checkpoint.where}); "
                    "pass missing='base' to let tasks without a tensor take no part in it"
                    f"{_prefix_hint(result.inputs.base, task.checkpoint)}"
                )
            result.notes.append(f"{name}: missing in {task.name}, which takes no part in it")
            continue
        found = task.checkpoint.spec(name)
        if found.shape != spec.shape:
            raise ValueError(
                f"tensor {name!r} has shape {list(spec.shape)} in the base and {list(found.shape)} in {task.name}; "
                "only models of one architecture can be merged (heads='base' or 'keep-per-task' sets heads aside, "
                "embeddings='intersect' or 'union' aligns vocabularies)"
            )
        if not found.floating:
            raise ValueError(
                f"tensor {name!r} is {spec.dtype} in the base and {found.dtype} in {task.name}; convert one of them"
            )
        tasks.append(position)
    return tuple(tasks)


def _check_extra(result: Plan, heads: Sequence[str]) -> None:
    """Tensors that a task has and the base lacks: heads, an untied copy of the embeddings, or an error.

    Raises:
        ValueError: extra tensors and no policy for them.
    """
    base = result.inputs.base
    for position, task in enumerate(result.inputs.tasks):
        extra = [name for name in task.checkpoint if name not in base]
        tied = [name for name in extra if _is_tied(name, base, task.checkpoint)]
        own_heads = [
            name for name in task.checkpoint if any(name == h or name.startswith(h + ".") for h in heads)
        ]
        rest = [name for name in extra if name not in tied and name not in own_heads]
        if rest and result.request.missing == "error":
            raise ValueError(
                f"{task.name} ({task.checkpoint.where}) holds {len(rest)} tensor(s) that the base lacks, first {rest[0]!r} "
                f"{task.checkpoint.spec(rest[0])}; pass missing='base' to drop them, or heads='keep-per-task' if it is a head"
                f"{_prefix_hint(base, task.checkpoint)}"
            )
        if tied:
            result.notes.append(
                f"{task.name}: {', '.join(tied)} left out: tied to a tensor of the base, as there"
            )
        result.dropped += [f"{task.name}: {name}" for name in rest]
        if result.request.heads == "keep-per-task" and own_heads:
            result.heads[position] = own_heads


def _is_tied(name: str, base: Checkpoint, task: Checkpoint) -> bool:
    """Whether a task's tensor is another name of one that the base has: by its memory, or an equal lm_head by the configs."""
    held = task.aliases.get(name, name)
    if any(task.aliases.get(other, other) == held for other in task if other != name and other in base):
        return True
    ties = all(model.config and model.config.get("tie_word_embeddings", True) for model in (base, task))
    if not name.endswith("lm_head.weight") or not ties:
        return False
    sample = task.sample(name)
    return any(task.sample(other) == sample for other in task if other in base and FIRST.search(other))
