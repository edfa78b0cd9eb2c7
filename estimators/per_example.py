"""The engine: one forward and one ordinary backward of the whole batch give the gradient of every example.

Units (a layer with its handler, or any module on the general path) keep their input when they are called; when the
gradient arrives at their output, the two together hold every example's gradient of the unit's parameters. Parameters
are frozen meanwhile, so autograd forms no summed weight gradients: those operations pay for ours. All uses of one
parameter in a forward are gathered before its gradients are handed on, because they add before they are squared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.general import differentiable, per_example_gradients, summed_gradients
from gradmatch.estimators.gradients import (
    CHUNK_BYTES,
    Dense,
    Gradients,
    Outer,
    Rows,
    SetAside,
    combine,
    set_aside,
)
from gradmatch.estimators.likelihood import Seed
from gradmatch.estimators.recurrent import recurrent_gradients
from gradmatch.estimators.units import Call, Unit, detached, examples_first, layer_gradients, record, wide


class Sink(Protocol):
    """What receives the gradients of the parameters, one parameter at a time."""

    whole: bool  # wants all examples of a parameter at once, even on the general path
    summed: bool  # wants only sums over the batch

    def add(self, name: str, gradients: Gradients) -> None:
        """All uses of the parameter in this backward pass, combined."""

    def add_aside(self, name: str, outer: Outer) -> bool:
        """Take the matrix part of a shared embedding at once; False to wait for the other uses."""

    def add_rest(self, name: str, aside: SetAside, rows: Rows) -> None:
        """The embedding part that follows."""


class Engine:
    """Records the calls of units during a forward and hands their gradients to a sink during backward passes."""

    def __init__(self, units: Sequence[Unit], *, capture: bool = False) -> None:
        self.units = list(units)
        self.capture = capture
        self.calls: list[Call] = []
        self.examples = 0
        self._leaves: list[Tensor] = []
        self._state = "idle"
        self._consume: Callable[[Call, int, Tensor], None] | None = None

    @contextmanager
    def attached(self) -> Iterator[Engine]:
        """Hooks on for the duration; they are taken off whatever happens."""
        handles = [
            unit.module.register_forward_hook(partial(self._called, unit), with_kwargs=True, prepend=True)
            for unit in self.units
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.forget()

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model and record; the parameters must be frozen."""
        self.forget()
        self.examples = batch.size
        self._state = "forward"
        try:
            with torch.enable_grad():
                return model(*batch.args, **batch.kwargs)
        finally:
            self._state = "idle"

    def backward(self, seed: Seed, sink: Sink, *, keep: bool = False) -> None:
        """One backward pass from a seed; every parameter's gradients go to the sink.

        Args:
            seed: a tensor of the recorded forward and the gradient of the summed loss at it.
            sink: what receives them.
            keep: keep the graph for another pass over the same forward.
        """
        gather = _Gather(self, sink, keep, seed[0].device.type)
        self._run(seed, gather.take, keep)
        gather.finish()

    def watch(self, seed: Seed, arrived: Callable[[Call, int, Tensor], None], *, keep: bool) -> None:
        """One backward pass that only tells which gradient arrives at which output (by its place) of which call."""
        self._run(seed, arrived, keep)

    def forget(self) -> None:
        """Drop the graph and everything recorded."""
        self.calls, self._leaves = [], []

    def _run(self, seed: Seed, consume: Callable[[Call, int, Tensor], None], keep: bool) -> None:
        output, gradient = seed
        if not output.requires_grad:
            raise GradmatchError(
                "the model's output depends on no trainable parameter: there is nothing to estimate",
                "unsupported_model",
            )
        self._consume, self._state = consume, "backward"
        try:
            torch.autograd.grad(output, self._leaves, gradient, retain_graph=keep, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise GradmatchError(
                "the model uses reentrant gradient checkpointing, which hides its layers from the estimate; switch it off "
                "(model.gradient_checkpointing_disable()) or pass use_reentrant=False to torch.utils.checkpoint",
                "unsupported_model",
            ) from error
        finally:
            self._consume, self._state = None, "idle"

    def _called(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook: note the inputs, and listen at the outputs."""
        if self._state == "idle" or not torch.is_grad_enabled():  # run again by us
            return None
        found = differentiable(output)
        if not found:
            return None
        first_run = self._state == "forward"  # else gradient checkpointing runs it again, for the same graph
        if first_run:
            args, kwargs = pytree.tree_map(detached, (args, kwargs))
            call = Call(
                unit,
                args,
                kwargs,
                pytree.tree_map(detached, output) if self.capture and unit.reruns else None,
            )
            self.calls.append(call)
        leaves, spec = pytree.tree_flatten(output)
        changed = False
        for place, value in found:
            tapped = value
            if not value.requires_grad:
                source = value.detach().requires_grad_()
                if first_run:
                    self._leaves.append(source)
                tapped = self._expanded(unit, source).clone()
            elif unit.expand:
                tapped = self._expanded(unit, value)
            elif len(found) > 1:  # an output may feed another inside the module: listen outside only
                tapped = value.clone()
            if first_run:
                tapped.register_hook(partial(self._arrived, call, place))  # type: ignore[no-untyped-call]
            if tapped is not value:
                leaves[place], changed = tapped, True
        return pytree.tree_unflatten(leaves, spec) if changed else None

    def _expanded(self, unit: Unit, value: Tensor) -> Tensor:
        """An output shared by all examples, given to each of them."""
        if unit.expand == "new":
            return value.unsqueeze(0).expand(self.examples, *value.shape)
        if unit.expand == "one" and value.shape[0] == 1:
            return value.expand(self.examples, *value.shape[1:])
        return value

    def _arrived(self, call: Call, place: int, gradient: Tensor) -> None:
        if self._consume is not None:
            self._consume(call, place, gradient.detach())


class _Gather:
    """Collects the uses of every parameter in one backward pass and hands them on when they are complete."""

    def __init__(self, engine: Engine, sink: Sink, keep: bool, device: str) -> None:
        self.engine, self.sink, self.keep, self.device = engine, sink, keep, device
        self.expected = Counter(name for call in engine.calls for name in call.unit.parameters.values())
        self.pending: dict[str, list[Gradients]] = defaultdict(list)
        self.aside: dict[str, SetAside] = {}

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Our own sums: no graph, and no autocast."""
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            yield

    def take(self, call: Call, place: int, gradient: Tensor) -> None:
        """The gradient arrived at an output: a layer is done with at once, the general path waits for its other outputs."""
        call.gradients[place] = gradient
        if call.unit.handler is None:
            return
        with self._arithmetic():
            for name, gradients in layer_gradients(call, self.engine.examples).items():
                self._add(call, name, gradients)
        call.gradients = {}
        if not self.keep:
            call.args, call.kwargs = (), {}

    def finish(self) -> None:
        """The general path, then whatever had uses that no gradient reached."""
        for call in self.engine.calls:
            if call.unit.handler is None and call.gradients:
                self._general(call)  # the module runs again as it did: under the caller's autocast
                call.gradients = {}
        with self._arithmetic():
            for name, parts in self.pending.items():
                if parts:
                    self._hand_on(name, parts)

    def _general(self, call: Call) -> None:
        unit, own = call.unit, call.unit.own()
        recorded = record(call, self.engine.examples)
        if self.sink.summed:
            sums = summed_gradients(recorded, own)
            with self._arithmetic():
                for local, value in sums.items():
                    self._add(call, unit.parameters[local], Dense(wide(value)[None]))
            return
        if unit.unroll:
            for local, gradients in recurrent_gradients(recorded, list(own)).items():
                with self._arithmetic():
                    self._add(call, unit.parameters[local], gradients)
            return
        whole = self.sink.whole or any(self.expected[name] > 1 for name in unit.parameters.values())
        size = sum(value.numel() * 4 for value in own.values())
        step = recorded.examples if whole else max(1, CHUNK_BYTES // max(size, 1))
        for first in range(0, recorded.examples, step):
            last = min(first + step, recorded.examples)
            parts = per_example_gradients(recorded, own, first, last, unit.vectorize)
            with self._arithmetic():
                for local, value in parts.items():
                    dense = Dense(wide(value))
                    if whole:
                        self._add(call, unit.parameters[local], dense)
                    else:
                        self.sink.add(unit.parameters[local], dense)

    def _add(self, call: Call, name: str, gradients: Gradients) -> None:
        parts = self.pending[name]
        if isinstance(gradients, Outer) and self.expected[name] > 1 and not parts:
            rows = self._rows_to_come(call, name)
            if rows is not None and self.sink.add_aside(name, gradients):
                self.aside[name] = set_aside(gradients, rows, gradients.left.shape[2])
                self.expected[name] -= 1
                return
        parts.append(gradients)
        if len(parts) == self.expected[name]:
            self.pending[name] = []
            self._hand_on(name, parts)

    def _hand_on(self, name: str, parts: list[Gradients]) -> None:
        gradients = combine(parts)
        aside = self.aside.pop(name, None)
        if aside is None:
            self.sink.add(name, gradients)
        else:
            assert isinstance(gradients, Rows)  # _rows_to_come saw to it
            self.sink.add_rest(name, aside, gradients)

    def _rows_to_come(self, call: Call, name: str) -> Tensor | None:
        """The rows (B, T) that all other uses of this weight will touch, or None where one of them is no embedding."""
        indices = []
        for other in self.engine.calls:
            if other is call or name not in other.unit.parameters.values():
                continue
            if (
                not isinstance(other.unit.module, nn.Embedding)
                or other.unit.handler is None
                or not other.args
            ):
                return None
            indices.append(examples_first(other.input, other.unit, self.engine.examples).flatten(1))
        return torch.cat(indices, 1) if indices else None
