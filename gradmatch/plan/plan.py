"""The plan of a merge: every tensor, what will happen to it and why, decided from headers before any value is read.

Everything that headers, configs and options can reveal as wrong is an error here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gradmatch.common.settings import Depth
from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.stores import SAFETENSORS_NAME, Spec
from gradmatch.plan.matching import check_extra, check_kinds, check_sizes, participants
from gradmatch.plan.policies import (
    batchnorm_action,
    check_file_names,
    head_prefixes,
    idle_patterns,
    tied_differently,
)
from gradmatch.plan.request import Edits, Request
from gradmatch.plan.step import Plan, Step, path_of
from gradmatch.plan.tensors import after_of, check_count, check_task_options, weight_of
from gradmatch.rules import RULES, Linear, Options, Rule, Solve, Whole
from gradmatch.rules.linear import weight_sum

if TYPE_CHECKING:
    from gradmatch.plan.inputs import Inputs

NOWHERE = "in no task: the base's"
LITTLE = 0.1  # share of the weights that are merged, below which it is remarked


def plan(inputs: Inputs, request: Request) -> Plan:
    """Decide what happens to every tensor of the base.

    Raises:
        ValueError: whatever does not fit together; the message names the tensor, both values and the option that settles it.
    """
    fewest, _ = request.rule.models
    check_count(inputs, request)
    check_task_options(inputs.tasks, request)
    result = Plan(request, inputs, [])
    base = inputs.base
    tied_differently(base, inputs.tasks)
    check_sizes(base, inputs.tasks)
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
        copied = Step(name, "copy", out, spec.dtype, bytes_read=spec.nbytes)
        if any(name == head or name.startswith(head + ".") for head in heads):
            result.steps.append(replace(copied, why="head: the base's"))
            continue
        action, why = batchnorm_action(name, base, inputs.tasks, request)
        if not action and not spec.floating:
            check_kinds(name, spec, inputs)
            action, why = "copy", f"{spec.dtype} buffer: the base's"
        tasks = participants(name, spec, result) if action != "copy" else ()
        if not tasks:
            result.steps.append(replace(copied, why=why if action == "copy" else NOWHERE))
            continue
        if len(tasks) < fewest:
            raise GradmatchError(
                f"tensor {name!r} is in {len(tasks)} of the tasks, and {request.method} needs {fewest} that have it; missing='base' "
                "cannot help here: use another method, or tasks of one architecture",
                "bad_setting",
                name,
            )
        result.steps.append(_merged(result, copied, tasks, depth.of(name), why if action else ""))
    result.notes += request.notes
    for note in (
        *idle_patterns(base, inputs.tasks, request),
        *_little_merged(result),
        *_unusual_sums(result),
    ):
        result.notes.append(note)
        warn(note)
    inputs.describe(result.notes, request)
    return result


def _merged(result: Plan, copied: Step, tasks: tuple[int, ...], here: float | None, statistic: str) -> Step:
    """The step of a tensor that several models have: by which rule, with which weights and options, computed how."""
    request, inputs, name = result.request, result.inputs, copied.name
    owners = [inputs.tasks[t] for t in tasks]
    spec = inputs.base.spec(name)
    specs = [spec, *(task.checkpoint.spec(name) for task in owners)]
    rule, why, known = RULES["averaging"], statistic, [-spec.nbytes]  # of statistics, the base's are not read
    if not statistic:
        known, factors = inputs.curvatures_of(name, tasks, request, spec)
        rule, why = _rule_of(request.rule, spec, factors)
    alpha = tuple(weight_of(task, name, here) for task in owners)
    edits: Edits = ()
    after: Edits = ()
    if statistic:
        options = rule.options
    else:
        asked = request.rule_options.at(name, here)
        options = asked if rule is request.rule else _shared(rule, asked)
        edits = tuple((edit, own.at(name, here, [t.options for t in owners])) for edit, own in request.edits)
        after, left = after_of(request, len(spec.shape) > 1, here, name, alpha, owners)
        why = "; ".join(filter(None, (why, left)))
    if request.rule.relative:
        weight_sum(alpha)  # weights that cannot be normalised are found now
    coefficients = None
    if isinstance(rule, Linear) and not rule.gram:
        c0, c, _ = rule.terms(alpha, None, options)
        coefficients = c0, c
    return replace(
        copied, kind="average" if statistic else rule.kind, compute=_compute_dtype(specs, request.precision),
        path=path_of(rule, options, edits, after), why=why, rule=rule, tasks=tasks, alpha=alpha, options=options,
        edits=edits, after=after, depth=here or 0.0, coefficients=coefficients, bytes_read=sum(s.nbytes for s in specs) + sum(known),
    )  # fmt: skip


def _rule_of(rule: Rule, spec: Spec, factors: bool) -> tuple[Rule, str]:
    """The rule of one tensor, and why it is another than the one that was asked for."""
    if isinstance(rule, Solve):
        if not factors:
            return rule.otherwise, f"no {'matrix' if rule.whole else 'factors'}: {rule.otherwise.source}"
        return rule, "gram matrices" if "gram" in rule.needs else "" if rule.whole else "Kronecker factors"
    if isinstance(rule, Whole) and rule.otherwise and len(spec.shape) < 2:
        return rule.otherwise, f"no matrix: {rule.otherwise.source}"
    return rule, ""


def _shared(rule: Rule, options: Options) -> Options:
    """The options of a rule that stands in for another: those of the same names."""
    return replace(rule.options, **{name: value for name, value in options.items() if name in rule.options})


def _little_merged(result: Plan) -> list[str]:
    """What to say where the policies leave little to merge."""
    whole = sum(step.spec.numel for step in result.steps if step.spec.floating)
    merged = sum(step.spec.numel for step in result.merged)
    if whole and not merged:
        why = {step.why for step in result.steps if step.spec.floating}
        raise GradmatchError(
            f"no tensor would be merged, so the result would be the base ({'; '.join(sorted(why))}); check the policies, or that the "
            "tasks are models of this base",
            "bad_setting",
        )
    if result.merged and result.request.rule.weighs and not any(any(step.alpha) for step in result.merged):
        return ["every weight is 0, so that no task takes part"]
    loose = [step for step in result.steps if step.spec.floating and step.why == NOWHERE]
    if len(loose) > 3 * len(result.merged):
        raise GradmatchError(
            f"{len(result.merged)} of the base's tensors would be merged, and {loose[0].name!r} and {len(loose) - 1} others are in no task: the "
            "names do not fit together; give models of one architecture, as folders whose config.json names it, so that names are "
            "matched as transformers does",
            "bad_setting",
        )
    if merged < LITTLE * whole:
        return [f"{merged} of the base's {whole} weights are merged; all others are the base's"]
    return []


def _unusual_sums(result: Plan) -> list[str]:
    """What to say of models that are scaled as a whole: sum_t c_t is not 1, and neither is the base's share."""
    sums = [
        (step, step.coefficients[0] + sum(step.coefficients[1]))
        for step in result.merged
        if step.coefficients and step.rule and step.rule.weighs and not step.edits and not step.after
    ]
    unusual = [(step.name, total) for step, total in sums if abs(total - 1) > 1e-6]
    if not unusual:
        return []
    name, total = unusual[0]
    return [
        f"the weights of {len(unusual)} tensors do not sum to 1 ({total:g} for {name!r}): those tensors are scaled by the sum; "
        "the option normalize divides by it; or give weights that sum to 1"
    ]


def _compute_dtype(specs: Sequence[Spec], precision: str) -> str:
    """float32, or float64 where an input is or where it was asked for."""
    if precision == "auto":
        return "F64" if any(spec.dtype == "F64" for spec in specs) else "F32"
    return "F64" if precision == "float64" else "F32"
