"""The plan of a merge of adapters in core space: which weights the output adapts, and whether that can be done at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.common.settings import Depth
from gradmatch.models.cores import Adapter, adapter_of
from gradmatch.models.stores import SAFETENSORS_NAME, Spec
from gradmatch.plan.step import Plan, Step
from gradmatch.plan.tensors import after_of, check_count, check_task_options, weight_of
from gradmatch.rules.core import coefficients_of
from gradmatch.rules.rule import Linear

if TYPE_CHECKING:
    from gradmatch.plan.inputs import Inputs
    from gradmatch.plan.request import Request


def plan_core(inputs: Inputs, request: Request) -> Plan:
    """Decide what happens to every weight that some adapter adapts; an adapter that does not adapt it has no update there.

    Raises:
        ValueError: a task that is no adapter of the base, one that holds more than factors, or weights that scale the base.
    """
    check_count(inputs, request)
    check_task_options(inputs.tasks, request)
    adapters = [adapter_of(task.name, task.checkpoint, inputs.base) for task in inputs.tasks]
    result = Plan(request, inputs, [], adapters=adapters)
    depth, rule = Depth(inputs.base), request.rule
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.weights):
        known = [adapter for adapter in adapters if name in adapter.weights]
        here, options = depth.of(name), request.rule_options.at(name, depth.of(name))
        alpha = tuple(weight_of(task, name, here) for task in inputs.tasks)
        if isinstance(rule, Linear) and not rule.gram_of(options):
            coefficients_of(rule, alpha, None, options)  # weights that scale the base are found now
        after, _ = after_of(request, True, here, name, alpha, inputs.tasks)
        spec = Spec(_dtype(known, name, request), known[0].shape(name))
        ranks = [adapter.rank(name) for adapter in known]
        sides = spec.shape[0], spec.numel // max(1, spec.shape[0])
        result.steps.append(
            Step(
                name, rule.kind, spec, "F64", path="core", why=f"ranks {', '.join(map(str, ranks))}", rule=rule,
                tasks=tuple(range(len(adapters))), alpha=alpha, options=options, after=after, depth=here or 0.0,
                rank=min(sum(ranks), *sides, request.rank or sum(ranks)),
                bytes_read=sum(one.nbytes for adapter in known for one in adapter.stored(name)),
            )
        )  # fmt: skip
    result.notes += request.notes
    inputs.describe(result.notes, request)
    return result


def _dtype(known: list[Adapter], name: str, request: Request) -> str:
    """Of the output's factors: as asked, else the widest of the adapters' own."""
    if request.dtype:
        return SAFETENSORS_NAME[request.dtype]
    given = {spec.dtype for adapter in known for spec in adapter.stored(name)}
    return given.pop() if len(given) == 1 else "F64" if "F64" in given else "F32"
