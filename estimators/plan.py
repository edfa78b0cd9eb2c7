"""Which module answers for each parameter, and where its examples lie: found by running a few rows of the first batch.

Nothing is looked up by architecture. A parameter belongs to the innermost module in whose call it is used; that module
is trusted only if measuring confirms it: the loss of example 0 (and of example 1) must send gradient to the rows of
that example alone, and a module on the general path must reproduce its output from single examples. What fails
climbs to the calling module, in the worst case to the whole model.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.checks import check_determinism, check_independence, check_inputs_kept
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.evidence import Evidence, gather_evidence, isolated, sum_of
from gradmatch.estimators.general import (
    Recorded,
    differentiable,
    input_layouts,
    per_example_gradients,
    reproduces,
)
from gradmatch.estimators.handlers import elementwise, find_handler, is_elementwise
from gradmatch.estimators.layout import LAYOUTS, WHOLE, alike, fits
from gradmatch.estimators.memory import raise_if_full
from gradmatch.estimators.per_example import Engine
from gradmatch.estimators.recurrent import recurrent_gradients, unrollable
from gradmatch.estimators.units import Call, Unit, wide
from gradmatch.estimators.uses import SeedOf, Stack, find_hidden_uses, find_uses

log = logging.getLogger(__name__)
PROBE_ROWS = 3


@dataclass
class Plan:
    """The units of a model and what is to be said about them.

    Attributes:
        units: one per module that answers for parameters.
        rows: how many examples it was checked with; 1 means unchecked.
        unused: parameters that no call used; their curvature is zero.
        value_bytes: memory of a forward and backward pass for each number of the input (token, pixel); 0 is unknown.
    """

    units: list[Unit]
    rows: int
    unused: list[str]
    value_bytes: float = 0.0

    def rows_within(self, budget: int, batch: Batch) -> int:
        """How many rows like those of a batch can be worked on in so many bytes, at least one; all of them if unknown."""
        each = self.value_bytes * batch.values_per_row()
        return max(1, min(batch.size, int(budget / each))) if each else batch.size

    def general(self) -> list[str]:
        """Modules on the general path, each with how it runs."""
        return [
            f"{unit.name or 'whole model'} ({'unrolled' if unit.unroll else 'vmap' if unit.vectorize else 'one by one'})"
            for unit in self.units
            if unit.handler is None
        ]


def make_plan(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, seed_of: SeedOf
) -> Plan:
    """Assign every parameter to units and check them.

    Args:
        model: frozen, in eval mode.
        parameters: the trainable ones, by name.
        batch: the first batch; a few rows of it are used.
        seed_of: what the check differentiates.
    """
    rows = min(batch.size, PROBE_ROWS)
    given = batch.rows(0, rows)
    batch = given.copied()  # so that the user's tensors stay what they are
    uses, reference = find_uses(model, parameters, batch)
    check_inputs_kept(given, batch)
    check_determinism(model, batch, reference)
    check_independence(model, batch, reference)
    unseen = {name: value for name, value in parameters.items() if name not in uses}
    if unseen:  # the whole model answers for what is used unseen
        uses |= {name: {("",)} for name in find_hidden_uses(model, unseen, batch, seed_of)}
    unused = sorted(set(parameters) - set(uses))
    if rows == 1:
        return Plan([_unchecked(unit) for unit in _units(model, parameters, uses)], 1, unused)
    expand: dict[str, str] = {}
    while True:  # each round moves something one module up, so this ends
        units = [replace(unit, expand=expand.get(unit.name, "")) for unit in _units(model, parameters, uses)]
        failed, size = _check(model, units, batch, seed_of, reference)
        if not failed:
            return Plan(units, rows, unused, size / (rows * batch.values_per_row()))
        for unit in failed:
            if unit.name == "" and not differentiable(reference):
                raise GradmatchError(
                    f"parameters of the model itself are used, and its output of type {type(reference).__name__} shows no tensor: "
                    "return a tensor, a tuple, a dict or a transformers ModelOutput",
                    "unsupported_model",
                )
            if unit.name == "":
                raise GradmatchError(
                    "the model mixes the examples of a batch: the loss of one example depends on the others, so "
                    "per-example curvature does not exist; the forward passes of single modules do not show it, so look at "
                    "the likelihood's log_prob and at the model's own forward",
                    "unsupported_model",
                )
            uses = _climb(uses, unit)
        expand = {unit.name: unit.expand for unit in units}


def _units(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], uses: Mapping[str, set[Stack]]
) -> list[Unit]:
    """One unit per module that is innermost for some parameter, without those inside another unit of the parameter."""
    owned: dict[str, dict[str, str]] = defaultdict(dict)
    modules = dict(model.named_modules())
    for name, stacks in uses.items():
        tops = {stack[-1] for stack in stacks}
        inner = {stack[-1] for stack in stacks if tops & set(stack[:-1])}
        for top in tops - inner:
            local = _local_name(modules[top], parameters[name])
            owned[top][local] = name
    units = []
    for top, own in owned.items():
        module = modules[top]
        direct = all("." not in local for local in own)
        units.append(Unit(module, top, own, (find_handler(module) or elementwise) if direct else None))
    return units


def _unchecked(unit: Unit) -> Unit:
    """For a batch of one example: all is that example's, and only what needs no proof is taken for granted."""
    return replace(unit, layout=WHOLE, handler=None if unit.reruns else unit.handler)


def _local_name(module: nn.Module, parameter: nn.Parameter) -> str:
    named = module.named_parameters(remove_duplicate=False)
    return next(local for local, value in named if value is parameter)


def _climb(uses: Mapping[str, set[Stack]], unit: Unit) -> dict[str, set[Stack]]:
    """The failed unit's parameters are answered for by the modules that called it."""
    mine = set(unit.parameters.values())
    return {
        name: {stack[:-1] if stack[-1] == unit.name and name in mine else stack for stack in stacks}
        for name, stacks in uses.items()
    }


def _check(
    model: nn.Module, units: list[Unit], batch: Batch, seed_of: SeedOf, reference: Any
) -> tuple[list[Unit], int]:
    """Find a layout for every unit; returns those for which there is none, and the bytes that the pass took."""
    evidence, size = gather_evidence(model, units, batch, seed_of)
    failed = [unit for unit in units if not _settle(unit, evidence[unit.name], batch.size)]
    return [unit for unit in failed if not _expands(model, unit, units, batch, seed_of, reference)], size


def _expands(
    model: nn.Module, unit: Unit, units: list[Unit], batch: Batch, seed_of: SeedOf, reference: Any
) -> bool:
    """A layer whose output all examples share (position embeddings) can often be given to each of them instead.

    Tried, and kept if the model's output stays what it was and the gradients then belong to their examples.
    """
    if unit.reruns:
        return False
    for unit.expand in ("one", "new"):
        try:
            evidence, _ = gather_evidence(model, units, batch, seed_of)
        except Exception as error:  # the model's own code met a shape that it did not expect
            raise_if_full(error)
            log.debug("%s cannot be given to each example: %s", unit.name, error)
            continue
        if _settle(unit, evidence[unit.name], batch.size) and _same_output(model, units, batch, reference):
            return True
    unit.expand = ""
    return False


def _same_output(model: nn.Module, units: list[Unit], batch: Batch, reference: Any) -> bool:
    engine = Engine(units)
    with engine.attached():
        output = engine.forward(model, batch)
    return all(
        mine.shape == value.shape
        and all(torch.allclose(m, v, rtol=1e-3, atol=1e-6) for m, v in zip(mine.detach(), value, strict=True))
        for (_, mine), (_, value) in zip(differentiable(output), differentiable(reference), strict=True)
    )


def _settle(unit: Unit, evidence: list[Evidence], examples: int) -> bool:
    """Give the unit the first layout that all its calls confirm."""
    if not evidence:
        return not unit.reruns  # called where no gradient is recorded: it contributes nothing
    places = sorted({place for _, found in evidence for gradients in found for place in gradients})
    layouts: dict[int, str] = {}
    for place in places:
        possible = [
            layout
            for layout in LAYOUTS
            if all(isolated(found, place, layout, examples) for _, found in evidence)
        ]
        arrived = [gradients[place] for _, found in evidence for gradients in found if place in gradients]
        if not any(value.reached() for value in arrived) and not all(
            alike(value.shape, possible, examples) for value in arrived
        ):
            possible = []  # no gradient, no evidence: taken where the shape leaves no choice
        layouts[place] = next(iter(possible), "")
    if not all(layouts.values()):
        return False
    unit.layout, unit.outputs = next(iter(layouts.values()), "rows"), layouts
    if unit.handler is elementwise and not all(_is_elementwise(call) for call, _ in evidence):
        unit.handler = None
    if unit.handler is not None:
        return all(_fits_input(call, unit.layout, examples) for call, _ in evidence)
    return bool(places) and _settle_general(unit, evidence, examples)


def _is_elementwise(call: Call) -> bool:
    """A module that was called with one tensor and returned one, which its parameters scale and shift by feature."""
    if len(call.args) != 1 or call.kwargs or not isinstance(call.output, Tensor):
        return False
    with torch.no_grad():
        return is_elementwise(call.unit.module, wide(call.args[0]), wide(call.output))


def _fits_input(call: Call, layout: str, examples: int) -> bool:
    return bool(call.unit.expand) or fits(call.input, layout, examples)


def _settle_general(unit: Unit, evidence: list[Evidence], examples: int) -> bool:
    """Does the module reproduce its output example by example, and does it run under vmap?"""
    # under vmap a recurrent net falls apart into single steps, many times slower than one example after the other
    recurrent = any(isinstance(module, nn.RNNBase) for module in unit.module.modules())
    unit.inputs, unit.vectorize, unit.unroll = None, not recurrent, recurrent
    for call, found in evidence:
        inputs = input_layouts(call.args, call.kwargs, unit.layout, examples)
        if unit.inputs is not None and inputs != unit.inputs:
            return False
        unit.inputs = inputs
        gradients = {place: sum_of(found, place) for place in set().union(*found)}
        outputs = {place: unit.outputs[place] for place in gradients}
        recorded = Recorded(unit.module, call.args, call.kwargs, inputs, outputs, examples, gradients)
        if not gradients:
            continue
        if not reproduces(recorded, call.output, _tolerance(call.output)):
            return False
        unit.vectorize = unit.vectorize and _agree(recorded, unit, _under_vmap)
        unit.unroll = unit.unroll and unrollable(recorded) and _agree(recorded, unit, _unrolled)
    return True


def _under_vmap(recorded: Recorded, own: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return per_example_gradients(recorded, own, 0, 2, True)


def _unrolled(recorded: Recorded, own: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.dense(0, 2) for name, value in recurrent_gradients(recorded, list(own)).items()}


def _agree(
    recorded: Recorded, unit: Unit, run: Callable[[Recorded, Mapping[str, nn.Parameter]], dict[str, Tensor]]
) -> bool:
    """Whether this way of running the unit for two examples at once gives what single examples give."""
    own = unit.own()
    slow = per_example_gradients(recorded, own, 0, 2, False)
    try:
        fast = run(recorded, own)
    except Exception as error:  # anything may go wrong in an arbitrary module
        raise_if_full(error)
        log.debug("%s does not run for two examples at once: %s", unit.name, error)
        return False
    return all(
        fast[name].shape == value.shape
        and bool(((fast[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-30).item())
        for name, value in slow.items()
    )


def _tolerance(output: Any) -> float:
    """How much rounding may change an output when its example is computed alone."""
    kinds = {value.dtype for _, value in differentiable(output)}
    if kinds & {torch.bfloat16, torch.float16}:
        return 5e-2
    return 1e-3 if torch.float32 in kinds else 1e-8
