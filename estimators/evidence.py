"""Evidence of where examples lie: what arrives at every call's outputs from the loss of one example alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.layout import LAYOUTS, fits, split
from gradmatch.estimators.memory import kept_storages, note
from gradmatch.estimators.per_example import Engine
from gradmatch.estimators.units import Call, Unit
from gradmatch.estimators.uses import SeedOf


@dataclass
class Arrival:
    """The gradient that arrived at an output in one probe.

    Attributes:
        shape: of it.
        sizes: by layout that its shape allows, the largest absolute value for each example, (B,).
        value: itself, where its module may have to run again.
    """

    shape: torch.Size
    sizes: dict[str, Tensor]
    value: Tensor | None

    def reached(self) -> bool:
        """Whether there was any gradient at all."""
        return any(bool(size.any()) for size in self.sizes.values())


Evidence = tuple[Call, list[dict[int, Arrival]]]


def gather_evidence(
    model: nn.Module, units: list[Unit], batch: Batch, seed_of: SeedOf
) -> tuple[dict[str, list[Evidence]], int]:
    """By unit, every call with what arrives at its outputs from the loss of example 0 alone, and of example 1 alone.

    Also the bytes that the pass keeps: what autograd saves, the units' inputs, and twice the outputs. Of a layer only
    shapes and sizes are kept as evidence; of the general path the tensors themselves, to run its modules again.
    """
    engine = Engine(units, capture=True)
    with engine.attached():
        with kept_storages(model) as kept:
            value, gradient = seed_of(engine.forward(model, batch), batch)
        for call in engine.calls:
            note(kept, pytree.tree_leaves((call.args, call.kwargs)))
            if not call.unit.reruns:
                call.args, call.kwargs = pytree.tree_map(_shape_only, (call.args, call.kwargs))
        alone: dict[int, list[dict[int, Arrival]]] = defaultdict(list)
        only = torch.zeros_like(gradient)
        for example in range(2):
            for call in engine.calls:
                alone[id(call)].append({})
            only[example] = gradient[example]
            engine.watch((value, only), partial(_note_arrival, alone, batch.size), keep=example == 0)
            only[example] = 0
        calls = engine.calls
    evidence: dict[str, list[Evidence]] = defaultdict(list)
    for call in calls:
        evidence[call.unit.name].append((call, alone[id(call)]))
    return evidence, sum(kept.values()) + 2 * value.numel() * value.element_size()


def _note_arrival(
    alone: Mapping[int, list[dict[int, Arrival]]], examples: int, call: Call, place: int, gradient: Tensor
) -> None:
    sizes = {
        layout: torch.linalg.vector_norm(split(gradient, layout, examples).flatten(1), torch.inf, dim=1)
        for layout in LAYOUTS
        if fits(gradient, layout, examples) and gradient.numel()
    }
    alone[id(call)][-1][place] = Arrival(gradient.shape, sizes, gradient if call.unit.reruns else None)


def _shape_only(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def isolated(found: list[dict[int, Arrival]], place: int, layout: str, examples: int) -> bool:
    """The loss of example e sends gradient to the rows of example e alone, at one output of a call."""
    for example, gradients in enumerate(found):
        if place not in gradients:
            continue
        size = gradients[place].sizes.get(layout)
        if size is None:
            return False
        if float(size.sum() - size[example]) > 1e-6 * float(size[example]):
            return False
    return True


def sum_of(found: list[dict[int, Arrival]], place: int) -> Tensor:
    """The gradients of both probes at one output, added."""
    arrived = [gradients[place].value for gradients in found if place in gradients]
    values = [value for value in arrived if value is not None]
    return torch.stack(values).sum(0)
