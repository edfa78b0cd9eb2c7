"""Which module answers for each parameter, and where its examples lie: found by running a few rows of the first batch.

Nothing is looked up by architecture. A parameter belongs to the innermost module in whose call it is used; that module
is trusted only if measuring confirms it: the loss of example 0 (and of example 1) must send gradient to the rows of
that example alone, and a module on the general path must reproduce its output from single examples. What fails
climbs to the calling module, in the worst case to the whole model.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from estimators.batches import Batch
from estimators.general import Recorded, differentiable, input_layouts, per_example_gradients, reproduces
from estimators.handlers import find_handler
from estimators.layout import LAYOUTS, WHOLE, fits, split
from estimators.likelihood import Seed
from estimators.per_example import Call, Engine, Unit

log = logging.getLogger(__name__)
PROBE_ROWS = 3
SeedOf = Callable[[Any, Batch], Seed]  # the model's output and its batch -> a seed
Stack = tuple[str, ...]
Evidence = tuple[Call, list[dict[int, Tensor]]]


@dataclass
class Plan:
    """The units of a model and what is to be said about them.

    Attributes:
        units: one per module that answers for parameters.
        rows: how many examples it was checked with; 1 means unchecked.
        unused: parameters that no call used; their curvature is zero.
    """

    units: list[Unit]
    rows: int
    unused: list[str]

    def general(self) -> list[str]:
        """Modules on the general path, each with how it runs."""
        how = {True: "vmap", False: "one by one"}
        return [
            f"{unit.name or 'whole model'} ({how[unit.vectorize]})"
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

    Raises:
        ValueError: the model mixes examples; the module is named.
    """
    rows = min(batch.size, PROBE_ROWS)
    batch = batch.rows(0, rows)
    uses, reference = find_uses(model, parameters, batch)
    check_determinism(model, batch)
    check_independence(model, batch)
    if rows == 1:
        units = [replace(unit, layout=WHOLE) for unit in _units(model, parameters, uses)]
        return Plan(units, 1, sorted(set(parameters) - set(uses)))
    unused = sorted(set(parameters) - set(uses))
    settled: dict[str, Unit] = {}
    for _ in range(100):  # each round moves something one module up
        units = [settled.get(unit.name) or unit for unit in _units(model, parameters, uses)]
        units = [
            replace(unit, parameters=fresh.parameters)
            for unit, fresh in zip(units, _units(model, parameters, uses), strict=True)
        ]
        checked, failed = _check(model, units, batch, seed_of, reference)
        if not failed:
            return Plan(checked, rows, unused)
        for unit in failed:
            if unit.name == "":
                raise ValueError(
                    "the model mixes the examples of a batch: the loss of one example depends on the others, so "
                    "per-example curvature does not exist; the forward passes of single modules do not show it, so look at "
                    "the likelihood's log_prob and at the model's own forward"
                )
            uses = _climb(uses, unit)
        settled = {unit.name: unit for unit in checked if unit not in failed}
    raise AssertionError("unreachable: every round climbs")


def find_uses(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch
) -> tuple[dict[str, set[Stack]], Any]:
    """For every parameter, the stacks of module names during whose calls a torch function was given it."""
    watch = _Watch({id(value): name for name, value in parameters.items()})
    with watch.stacked(model), watch, torch.no_grad():
        output = model(*batch.args, **batch.kwargs)
    modules = dict(model.named_modules())
    uses = {}
    for name, stacks in watch.uses.items():
        holders = {
            top for top, module in modules.items() if any(v is parameters[name] for v in module.parameters())
        }
        uses[name] = {_upto(stack, holders) for stack in stacks}
    return uses, output


def _upto(stack: Stack, holders: set[str]) -> Stack:
    """The stack down to the innermost module that contains the parameter; it may have been lent to one that does not."""
    last = max(place for place, name in enumerate(stack) if name in holders)
    return stack[: last + 1]


class _Watch(TorchFunctionMode):
    """Notes which module is running whenever a parameter takes part in a torch function that yields a tensor."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.stack: list[str] = []
        self.uses: dict[str, set[Stack]] = defaultdict(set)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)):
            for value in pytree.tree_leaves((args, kwargs)):
                if (
                    isinstance(value, nn.Parameter)
                    and id(value) in self.names
                    and not isinstance(result, torch.Size)
                ):
                    self.uses[self.names[id(value)]].add(tuple(self.stack))
        return result

    @contextmanager
    def stacked(self, model: nn.Module) -> Iterator[None]:
        """Keep the stack of running modules while the model runs."""
        handles = []
        for name, module in model.named_modules():
            enter: Callable[..., None] = lambda *_, name=name: self.stack.append(name)  # noqa: E731
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self.stack.pop()


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
        units.append(Unit(module, top, own, find_handler(module) if direct else None))
    return units


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
) -> tuple[list[Unit], list[Unit]]:
    """Find a layout for every unit; those for which there is none have failed."""
    evidence = _gather_evidence(model, units, batch, seed_of)
    failed = [unit for unit in units if not _settle(unit, evidence[unit.name], batch.size)]
    return units, [unit for unit in failed if not _expands(model, unit, units, batch, seed_of, reference)]


def _gather_evidence(
    model: nn.Module, units: list[Unit], batch: Batch, seed_of: SeedOf
) -> dict[str, list[Evidence]]:
    """By unit, every call with the gradients at its outputs of the loss of example 0 alone, and of example 1 alone."""
    engine = Engine(units, capture=True)
    with engine.attached():
        value, gradient = seed_of(engine.forward(model, batch), batch)
        alone = []
        for example in range(2):
            only = torch.zeros_like(gradient)
            only[example] = gradient[example]
            alone.append(engine.capture_gradients((value, only)))
        calls = engine.calls
    evidence: dict[str, list[Evidence]] = defaultdict(list)
    for place, call in enumerate(calls):
        evidence[call.unit.name].append((call, [found[place] for found in alone]))
    return evidence


def _expands(
    model: nn.Module, unit: Unit, units: list[Unit], batch: Batch, seed_of: SeedOf, reference: Any
) -> bool:
    """A layer whose output all examples share (position embeddings) can often be given to each of them instead.

    Tried, and kept if the model's output stays what it was and the gradients then belong to their examples.
    """
    if unit.handler is None:
        return False
    for unit.expand in ("one", "new"):
        try:
            evidence = _gather_evidence(model, units, batch, seed_of)
        except Exception as error:  # the model's own code met a shape that it did not expect
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
        mine.shape == value.shape and torch.allclose(mine, value, rtol=1e-3, atol=1e-6)
        for (_, mine), (_, value) in zip(differentiable(output), differentiable(reference), strict=True)
    )


def _settle(unit: Unit, evidence: list[Evidence], examples: int) -> bool:
    """Give the unit the first layout that all its calls confirm."""
    if not evidence:
        return unit.handler is not None  # called where no gradient is recorded: it contributes nothing
    places = sorted({place for _, found in evidence for gradients in found for place in gradients})
    layouts: dict[int, str] = {}
    for place in places:
        possible = (
            layout
            for layout in LAYOUTS
            if all(_isolated(found, place, layout, examples) for _, found in evidence)
        )
        layouts[place] = next(possible, "")
    if not all(layouts.values()):
        return False
    unit.layout, unit.outputs = next(iter(layouts.values()), "rows"), layouts
    if unit.handler is not None:
        return all(_fits_input(call, unit.layout, examples) for call, _ in evidence)
    return bool(places) and _settle_general(unit, evidence, examples)


def _isolated(found: list[dict[int, Tensor]], place: int, layout: str, examples: int) -> bool:
    """The loss of example e sends gradient to the rows of example e alone, at one output of a call."""
    for example, gradients in enumerate(found):
        value = gradients.get(place)
        if value is None:
            continue
        if not fits(value, layout, examples):
            return False
        size = split(value, layout, examples).flatten(1).abs().amax(1)
        if float(size.sum() - size[example]) > 1e-6 * float(size[example]):
            return False
    return True


def _fits_input(call: Call, layout: str, examples: int) -> bool:
    return bool(call.unit.expand) or fits(call.input, layout, examples)


def _settle_general(unit: Unit, evidence: list[Evidence], examples: int) -> bool:
    """Does the module reproduce its output example by example, and does it run under vmap?"""
    unit.inputs, unit.vectorize = None, True
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
        unit.vectorize = unit.vectorize and _agree(recorded, unit)
    return True


def sum_of(found: list[dict[int, Tensor]], place: int) -> Tensor:
    """The gradients of both probes at one output, added."""
    values = [gradients[place] for gradients in found if place in gradients]
    return torch.stack(values).sum(0)


def _agree(recorded: Recorded, unit: Unit) -> bool:
    """vmap gives what single examples give."""
    own = unit.own()
    slow = per_example_gradients(recorded, own, 0, 2, False)
    try:
        fast = per_example_gradients(recorded, own, 0, 2, True)
    except Exception as error:  # anything may go wrong in an arbitrary module under vmap
        log.debug("%s does not run under vmap: %s", unit.name, error)
        return False
    return all(
        bool(((fast[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-30).item())
        for name, value in slow.items()
    )


def _tolerance(output: Any) -> float:
    """How much rounding may change an output when its example is computed alone."""
    kinds = {value.dtype for _, value in differentiable(output)}
    if kinds & {torch.bfloat16, torch.float16}:
        return 5e-2
    return 1e-3 if torch.float32 in kinds else 1e-8


def check_determinism(model: nn.Module, batch: Batch) -> None:
    """Two runs must agree: dropout that ignores eval mode would be measured as curvature.

    Raises:
        ValueError: they differ; the first module that does is named.
    """
    for (name, kind, one), (_, _, other) in zip(_outputs(model, batch), _outputs(model, batch), strict=False):
        if one.shape != other.shape or float((one - other).abs().max()) > 1e-5 * float(one.abs().max()):
            raise ValueError(
                f"two runs of the model in eval mode differ, first at {name or 'the model itself'} ({kind}): it is random "
                "(dropout that is always on?) or keeps state from one run to the next; make it deterministic"
            )


def check_independence(model: nn.Module, batch: Batch) -> None:
    """The outputs for a row must not change when other rows are taken away.

    Raises:
        ValueError: they do; the first module at which it shows is named.
    """
    if batch.size < 2:
        return
    culprit = _culprit(model, batch)
    if culprit:
        raise ValueError(
            "the model mixes the examples of a batch (its output for one row depends on the other rows), so per-example "
            f"curvature does not exist; the first module that does so is {culprit}"
        )


def _culprit(model: nn.Module, batch: Batch) -> str:
    """The first module whose output for a row changes when the last row is taken away; "" where the whole's does not."""
    kept = batch.size - 1
    changed = []
    for (name, kind, value), (_, _, less) in zip(
        _outputs(model, batch), _outputs(model, batch.rows(0, kept)), strict=False
    ):
        if value.dim() and value.shape[0] == batch.size and less.shape == (kept, *value.shape[1:]):
            difference = float((value[:-1] - less).abs().max())
            if difference > (1e-3 if value.dtype in (torch.float32, torch.float64) else 5e-2) * float(
                value.abs().max()
            ):
                changed.append((name, f"{name or 'the model itself'} ({kind})"))
    return changed[0][1] if changed and changed[-1][0] == "" else ""


def _outputs(model: nn.Module, batch: Batch) -> list[tuple[str, str, Tensor]]:
    """The first floating output of every module, innermost first, in the order in which they finish."""
    found: list[tuple[str, str, Tensor]] = []

    def note(name: str, module: nn.Module, output: Any) -> None:
        values = differentiable(output)
        if values:
            found.append((name, type(module).__name__, values[0][1].detach()))

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(*batch.args, **batch.kwargs)
    except Exception as error:  # some models need the very batch they were given
        log.debug("the model does not run on fewer rows: %s", error)
    finally:
        for handle in handles:
            handle.remove()
    return found
