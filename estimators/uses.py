"""Which module is running when a parameter is used: watched once, on a few rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.likelihood import Seed

Stack = tuple[str, ...]  # names of the modules that are running, outermost first
SeedOf = Callable[[Any, Batch], Seed]  # the model's output and its batch -> a seed


def find_uses(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch
) -> tuple[dict[str, set[Stack]], Any]:
    """For every parameter, the stacks of module names during whose calls a torch function was given it."""
    watch = _Watch({id(value): name for name, value in parameters.items()})
    with watch.stacked(model), watch, torch.no_grad():
        output = model(*batch.args, **batch.kwargs)
    holders: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        for value in module.parameters():
            holders[id(value)].add(name)
    uses = {
        name: {_upto(stack, holders[id(parameters[name])]) for stack in stacks}
        for name, stacks in watch.uses.items()
    }
    return uses, output


def find_hidden_uses(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, seed_of: SeedOf
) -> set[str]:
    """Which of these parameters reach the output although no torch function was seen to take them.

    Compiled code (torch.jit, operations written in C++) is not seen, but autograd knows.
    """
    try:
        for value in parameters.values():
            value.requires_grad_(True)
        with torch.enable_grad():
            output, gradient = seed_of(model(*batch.args, **batch.kwargs), batch)
        if not output.requires_grad:
            return set()
        found = torch.autograd.grad(output, list(parameters.values()), gradient, allow_unused=True)
    finally:
        for value in parameters.values():
            value.requires_grad_(False)
    return {name for name, value in zip(parameters, found, strict=True) if value is not None}


def watchable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that take hooks: all but compiled ones."""
    return [pair for pair in model.named_modules() if not isinstance(pair[1], torch.jit.ScriptModule)]


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
        for name, module in watchable(model):
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
