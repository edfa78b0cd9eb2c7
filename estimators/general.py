"""The general path: per-example gradients of any module's own parameters, by running that module again.

What the module was called with is cut into examples, and each example's gradient is a vector-Jacobian product of the
module alone with the gradient that arrived at its outputs: all examples at once under torch.func.vmap where the module
allows it, else one after the other.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradmatch.estimators.layout import WHOLE, fits, split
from gradmatch.estimators.memory import raise_if_full

log = logging.getLogger(__name__)


@dataclass
class Recorded:
    """One call of a module: its inputs, and per differentiable output the gradient that arrives there.

    inputs: for every leaf of the inputs, the layout by which it is cut into examples; "" where all share it.
    outputs: the layout of every output that carries a gradient.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[str]
    outputs: dict[int, str]
    examples: int
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def example(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of one example."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        cut = [
            split(leaf, layout, self.examples)[index] if layout else leaf
            for leaf, layout in zip(leaves, self.inputs, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(cut, spec)
        return args, kwargs


def input_layouts(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], first_choice: str, examples: int
) -> list[str]:
    """For every leaf of the inputs the first layout that its shape allows; "" for what all examples share.

    A module may be given tensors of several layouts: a recurrent net takes (B, T, D) and a state of (layers, B, D).
    """
    found = []
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        options = (first_choice, "rows", "time") if isinstance(leaf, Tensor) else ()
        found.append(next((layout for layout in options if fits(leaf, layout, examples)), ""))
    return found


def differentiable(output: Any) -> list[tuple[int, Tensor]]:
    """Position and value of every floating tensor among the leaves of a module's output."""
    leaves = pytree.tree_leaves(output)
    return [
        (i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def per_example_gradients(
    call: Recorded, parameters: Mapping[str, nn.Parameter], first: int, last: int, vectorize: bool
) -> dict[str, Tensor]:
    """Gradients of the module's parameters (by their names within it) for examples first .. last-1: (last-first, *shape)."""
    if vectorize and last - first > 1:
        return _vectorized(call, parameters, first, last)
    rows = [_single(call, parameters, index) for index in range(first, last)]
    return {name: torch.stack([row[name] for row in rows]) for name in parameters}


def summed_gradients(call: Recorded, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients summed over the whole batch, by one run of the module."""
    return _backward(call.module, parameters, call.args, call.kwargs, call.gradients)


def _single(call: Recorded, parameters: Mapping[str, nn.Parameter], index: int) -> dict[str, Tensor]:
    args, kwargs = call.example(index)
    own = {
        i: split(g, call.outputs[i], call.examples)[0 if call.outputs[i] == WHOLE else index]
        for i, g in call.gradients.items()
    }
    return _backward(call.module, parameters, args, kwargs, own)


def _backward(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gradients: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """One vector-Jacobian product; the parameters ask for gradients only while it runs."""
    values = list(parameters.values())
    try:
        for value in values:
            value.requires_grad_(True)
        with torch.enable_grad():
            outputs = dict(differentiable(module(*args, **kwargs)))
            used = [i for i in gradients if outputs[i].requires_grad]
            found: tuple[Tensor | None, ...] = (None,) * len(values)
            if used:
                found = torch.autograd.grad(
                    [outputs[i] for i in used], values, [gradients[i] for i in used], allow_unused=True
                )
    finally:
        for value in values:
            value.requires_grad_(False)
    return {
        name: torch.zeros_like(value) if g is None else g
        for (name, value), g in zip(parameters.items(), found, strict=True)
    }


def _vectorized(
    call: Recorded, parameters: Mapping[str, nn.Parameter], first: int, last: int
) -> dict[str, Tensor]:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    cut = [
        split(leaf, layout, call.examples)[first:last] if layout else leaf
        for leaf, layout in zip(leaves, call.inputs, strict=True)
    ]
    places = [i for i, layout in enumerate(call.inputs) if layout]
    order = sorted(call.gradients)
    gradients = [split(call.gradients[i], call.outputs[i], call.examples)[first:last] for i in order]

    def one(own: list[Tensor], own_gradients: list[Tensor]) -> dict[str, Tensor]:
        inputs = list(cut)
        for place, value in zip(places, own, strict=True):
            inputs[place] = value
        args, kwargs = pytree.tree_unflatten(inputs, spec)

        def run(values: dict[str, Tensor]) -> list[Tensor]:
            output = torch.func.functional_call(call.module, values, args, kwargs)
            found = dict(differentiable(output))
            return [found[i] for i in order]

        _, pull, *_ = torch.func.vjp(run, {name: value.detach() for name, value in parameters.items()})
        result: dict[str, Tensor] = pull(own_gradients)[0]
        return result

    with (
        warnings.catch_warnings()
    ):  # an operation without a batching rule is looped over inside: slower, not wrong
        warnings.filterwarnings("ignore", message=".*batching rule.*")
        found: dict[str, Tensor] = torch.func.vmap(one)([cut[place] for place in places], gradients)
    return {name: value.detach() for name, value in found.items()}


def reproduces(call: Recorded, output: Any, tolerance: float) -> bool:
    """Whether the module, run on each example by itself, gives the rows of the output that it gave for the batch."""
    expected = [(i, value) for i, value in differentiable(output) if i in call.outputs]
    if not expected:
        return False
    for index in range(call.examples):
        args, kwargs = call.example(index)
        try:
            with torch.no_grad():
                again = dict(differentiable(call.module(*args, **kwargs)))
        except Exception as error:  # whatever an arbitrary module raises when it is given one example
            raise_if_full(error)
            log.debug("%s cannot be run on single examples: %s", type(call.module).__name__, error)
            return False
        for i, value in expected:
            mine = split(value.detach(), call.outputs[i], call.examples)[index]
            if i not in again or again[i].shape != mine.shape:
                return False
            scale = max(float(mine.abs().max()), 1e-12) if mine.numel() else 1.0
            if mine.numel() and float((again[i] - mine).abs().max()) > tolerance * scale:
                return False
    return True
