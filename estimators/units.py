"""Units: what turns the tensors of one module's call into per-example gradients of its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradmatch.estimators.general import Recorded
from gradmatch.estimators.gradients import Dense, Gradients, Outer, Patches, Rows
from gradmatch.estimators.handlers import Handler, elementwise
from gradmatch.estimators.layout import WHOLE, unfold_rows


@dataclass
class Unit:
    """What turns the tensors of one module into per-example gradients.

    Attributes:
        name: of the module within the model.
        parameters: name within the module -> name within the model.
        handler: the layer's own formula, or None for the general path.
        layout: where the examples lie, see `layout.py`.
        expand: "" or how an output without examples gets them: "one" (its leading dimension is 1), "new" (it has none).
        inputs, outputs: general path: layouts of the leaves of its inputs ("": shared), and of its outputs by position.
        vectorize: general path: whether the module runs under vmap.
        unroll: general path: whether it is a recurrent net that `recurrent.py` takes apart.
    """

    module: nn.Module
    name: str
    parameters: dict[str, str]
    handler: Handler | None
    layout: str = "rows"
    expand: str = ""
    inputs: list[str] | None = None
    outputs: dict[int, str] = field(default_factory=dict)
    vectorize: bool = False
    unroll: bool = False

    @property
    def reruns(self) -> bool:
        """Whether the module itself is run again: always on the general path, and by the handler that probes scales."""
        return self.handler is None or self.handler is elementwise

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters themselves, by their names within the module."""
        return {local: self.module.get_parameter(local) for local in self.parameters}


@dataclass
class Call:
    """One call of a unit in the current forward."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    gradients: dict[int, Tensor] = field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        """A layer's first argument."""
        value: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return value


def record(call: Call, examples: int) -> Recorded:
    """A call of the general path with its gradients, ready to be run again."""
    unit = call.unit
    if unit.inputs is None or unit.layout == WHOLE:
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        outputs = dict.fromkeys(call.gradients, WHOLE)
        return Recorded(
            unit.module, call.args, call.kwargs, [""] * len(leaves), outputs, examples, call.gradients
        )
    outputs = {i: unit.outputs.get(i, unit.layout) for i in call.gradients}
    return Recorded(unit.module, call.args, call.kwargs, unit.inputs, outputs, examples, call.gradients)


def layer_gradients(call: Call, examples: int) -> dict[str, Gradients]:
    """The handler's formula on one call, by the parameters' names within the model; examples first."""
    unit = call.unit
    assert unit.handler is not None
    x = examples_first(wide(call.input), unit, examples, flatten=True)
    g = examples_first(wide(call.gradients[0]), unit, examples, flatten=True, output=True)
    found = unit.handler(unit.module, x, g)
    return {name: regroup(found[local], examples) for local, name in unit.parameters.items()}


def examples_first(
    value: Tensor, unit: Unit, examples: int, flatten: bool = False, output: bool = False
) -> Tensor:
    """A layer's tensor with the examples in the leading dimension; with `flatten` their parts stay folded into it."""
    if unit.expand == "new" and not output:
        value = value.unsqueeze(0).expand(examples, *value.shape)
    elif unit.expand == "one" and value.shape[0] == 1:
        value = value.expand(examples, *value.shape[1:])
    if unit.layout == "time":
        value = value.movedim(1, 0)
    elif unit.layout == "flat_time":
        value = unfold_rows(value, -1, examples).movedim(1, 0).flatten(0, 1)
    elif unit.layout == WHOLE and value.dim() < 2:
        value = value.unsqueeze(0)
    return value if flatten or value.shape[0] == examples else unfold_rows(value, examples, -1)


def regroup(gradients: Gradients, examples: int) -> Gradients:
    """Gradients of the parts of examples (windows, frames) as gradients of the examples."""
    if gradients.examples == examples:
        return gradients
    if isinstance(gradients, Patches):  # the places of all parts are places of the example
        left = unfold_rows(gradients.left, examples, -1).transpose(1, 2).flatten(2)
        kernel = len(gradients.shape) - 2
        seen = gradients.windows.view(examples, -1, *gradients.windows.shape[1:]).movedim(1, kernel + 2)
        return Patches(left, seen, gradients.shape)
    if isinstance(gradients, Outer):
        left, right = gradients.left, gradients.right
        return Outer(left.reshape(examples, -1, left.shape[-1]), right.reshape(examples, -1, right.shape[-1]))
    if isinstance(gradients, Rows):
        index, left = gradients.index, gradients.left
        return Rows(index.reshape(examples, -1), left.reshape(examples, -1, left.shape[-1]), gradients.shape)
    assert isinstance(gradients, Dense)
    return Dense(unfold_rows(gradients.value, examples, -1).sum(1))


def wide(value: Tensor) -> Tensor:
    """At least single precision; indices stay as they are."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def detached(value: Any) -> Any:
    """A tensor without its graph; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value
