"""The plan of a merge: every tensor, what will happen to it and why, decided from headers before any value is read.

Everything that headers, configs and options can reveal as wrong is an error here. Imports no torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.policies import batchnorm_action, head_prefixes, tied_differently
from gradmatch.rules import RULES, Rule
from gradmatch.settings import Depth, numbers, value_at
from gradmatch.stores import FLOATING, SAFETENSORS_NAME, Spec
from gradmatch.transforms import TRANSFORMS, check_options

if TYPE_CHECKING:
    from gradmatch.inputs import Inputs

Edits = tuple[tuple[str, Mapping[str, Any]], ...]
PER_TASK = ("density", "epsilon", "gamma")
POLICIES: dict[str, tuple[str, ...]] = {
    "missing": ("error", "base"),
    "missing_curvature": ("error", "zero"),
    "heads": ("error", "base", "keep-per-task"),
    "embeddings": ("error", "intersect", "union"),
    "batchnorm": ("error", "copy", "average", "recalibrate"),
    "precision": ("auto", "float32", "float64"),
    "rounding": ("nearest", "stochastic"),
    "verify": ("files", "reload"),
}


@dataclass(frozen=True)
class Request:
    """What was asked for, checked by itself; `plan` checks it against the models.

    Attributes:
        method: a name of RULES.
        base_weight: factor on the base's curvature.
        delta0: floor added to it, in nats per squared unit of weight.
        options: of the rule and its transforms.
        transforms: edits of the task vectors before the rule, by name or as {name: options}.
        dtype: of the output ("float32", "bfloat16", ...); None: the base's own, tensor by tensor.
        seed: of random transforms and stochastic rounding.
        head_names: patterns of tensors that count as heads, beside those that differ.
        missing, missing_curvature, heads, embeddings, batchnorm, precision, rounding, verify: see POLICIES.
        shard_bytes: largest size of an output file.
        notes: to be kept with the plan and the report (a translated recipe's differences).
    """

    method: str = "gradient_matching"
    base_weight: float = 1.0
    delta0: float = 1e-6
    options: Mapping[str, Any] = field(default_factory=dict)
    transforms: Sequence[str | Mapping[str, Mapping[str, Any]]] = ()
    dtype: str | None = None
    seed: int = 0
    head_names: Sequence[str] = ()
    missing: str = "error"
    missing_curvature: str = "error"
    heads: str = "error"
    embeddings: str = "error"
    batchnorm: str = "error"
    precision: str = "auto"
    rounding: str = "nearest"
    verify: str = "files"
    shard_bytes: int = 5_000_000_000
    notes: Sequence[str] = ()

    @property
    def rule(self) -> Rule:
        """The rule by its name."""
        return RULES[self.method]

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: an unknown method, option, transform or choice (the nearest is named), or a number out of range.
        """
        if self.method not in RULES:
            raise ValueError(
                f"unknown method {self.method!r}{nearest(self.method, RULES)}; known are {', '.join(RULES)}"
            )
        for policy, choices in POLICIES.items():
            chosen = getattr(self, policy)
            if chosen not in choices:
                raise ValueError(
                    f"{policy} is {chosen!r}{nearest(str(chosen), choices)}; choose one of {', '.join(choices)}"
                )
        if self.dtype is not None and SAFETENSORS_NAME.get(self.dtype) not in FLOATING:
            floats = [name for name, code in SAFETENSORS_NAME.items() if code in FLOATING]
            raise ValueError(
                f"dtype is {self.dtype!r}{nearest(str(self.dtype), floats)}; choose one of {', '.join(floats)}"
            )
        for name, value in (("delta0", self.delta0), ("base_weight", self.base_weight)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}; it must be at least 1")
        resolve_options(self)


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


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' where something is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def resolve_options(request: Request) -> tuple[dict[str, Any], Edits]:
    """The rule's options and the chain of transforms with theirs, defaults filled in, not yet resolved per tensor.

    A flat option belongs to the rule where the rule has it, else to every transform of the chain that has it. TIES after a
    transform that drops entries does not trim again unless its own density is given.

    Raises:
        ValueError: an option or transform that nobody knows (the nearest is named), or a value out of range.
        TypeError: a transform that is neither a name nor {name: options}.
    """
    rule = request.rule
    chain: list[tuple[str, Mapping[str, Any]]] = []
    for entry in (*request.transforms, *rule.transforms):
        if isinstance(entry, str):
            chain.append((entry, {}))
        elif isinstance(entry, Mapping) and len(entry) == 1:
            chain.extend((name, own or {}) for name, own in entry.items())
        else:
            raise TypeError(f"a transform is a name or {{name: options}}, not {entry!r}")
    known = set(rule.options)
    for name, _ in chain:
        if name not in TRANSFORMS:
            raise ValueError(
                f"unknown transform {name!r}{nearest(name, TRANSFORMS)}; known are {', '.join(TRANSFORMS)}"
            )
        known |= set(TRANSFORMS[name].options)
    for option in request.options:
        if option not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ValueError(f"{request.method} has no option {option!r}{nearest(option, known)}; {takes}")
    rule_options = {name: request.options.get(name, default) for name, default in rule.options.items()}
    edits = []
    dropped = False
    for name, own in chain:
        transform = TRANSFORMS[name]
        for option in own:
            if option not in transform.options:
                raise ValueError(
                    f"{name} has no option {option!r}{nearest(option, transform.options)}; "
                    f"it takes {', '.join(transform.options)}"
                )
        flat = {
            key: value
            for key, value in request.options.items()
            if key in transform.options and key not in rule.options
        }
        defaults = {key: request.seed if key == "seed" else value for key, value in transform.options.items()}
        if name == "ties" and dropped:
            defaults["density"] = 1.0
            flat.pop("density", None)
        options = {**defaults, **flat, **own}
        check_options(name, options)
        edits.append((name, options))
        dropped = True
    _check_rule_options(request.method, rule_options)
    return rule_options, tuple(edits)


def _check_rule_options(method: str, options: Mapping[str, Any]) -> None:
    """Ranges of the rules' own options.

    Raises:
        ValueError: a value out of range.
    """
    ranges = {
        "t": (0.0, 1.0),
        "keep": (0.0, 1.0),
        "off_diagonal": (0.0, 1.0),
        "ridge": (0.0, math.inf),
        "floor": (0.0, math.inf),
    }
    for name, (low, high) in ranges.items():
        for value in numbers(options.get(name)):
            if not low <= value <= high or (name == "keep" and value == 0):
                bounds = f"({low:g}, {high:g}]" if name == "keep" else f"[{low:g}, {high:g}]"
                raise ValueError(f"{method}: {name} is {value:g}, it must lie in {bounds}")
    for name in ("scale",):
        for value in numbers(options.get(name)):
            if not math.isfinite(value):
                raise ValueError(f"{method}: {name} is {value}, it must be a finite number")


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
    if rule.linear is not None and not rule.gram:
        for step in result.steps:
            if step.action == "merge":
                rule.linear(step.alpha, None, step.options)  # weights that cannot be normalised are found now
    result.notes += request.notes
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
    options: Mapping[str, Any], tasks: Sequence[Any], name: str, depth: float
) -> dict[str, Any]:
    """A transform's options for one tensor; a tuple, one value a task, where tasks have their own."""
    found: dict[str, Any] = {}
    for key, shared in options.items():
        values = tuple(value_at(task.options.get(key, shared), name, depth, key) for task in tasks)
        own = key in PER_TASK and any(key in task.options for task in tasks)
        found[key] = values if own else values[0]
    return found


def _weight(task: Any, name: str, depth: float) -> float:
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
        tied = [
            name
            for name in extra
            if name.endswith("lm_head.weight") and _ties_embeddings(base, task.checkpoint)
        ]
        own_heads = [
            name for name in task.checkpoint if any(name == h or name.startswith(h + ".") for h in heads)
        ]
        rest = [name for name in extra if name not in tied and name not in own_heads]
        if rest and result.request.missing == "error":
            raise ValueError(
                f"{task.name} ({task.checkpoint.where}) holds {len(rest)} tensor(s) that the base lacks, first {rest[0]!r} "
                f"{task.checkpoint.spec(rest[0])}; pass missing='base' to drop them, or heads='keep-per-task' if it is a head"
            )
        if tied:
            result.notes.append(
                f"{task.name}: {tied[0]} is tied to the embeddings by its config and left out, as in the base"
            )
        result.dropped += [f"{task.name}: {name}" for name in rest]
        if result.request.heads == "keep-per-task" and own_heads:
            result.heads[position] = own_heads


def _ties_embeddings(*checkpoints: Any) -> bool:
    """Whether all configs say that the output embeddings are the input embeddings."""
    return all(
        checkpoint.config and checkpoint.config.get("tie_word_embeddings", True) for checkpoint in checkpoints
    )
