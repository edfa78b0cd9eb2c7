"""Modules and names as torch.compile, DataParallel, DDP, FSDP and activation checkpointing wrap them, and what is inside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from torch import nn

INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile; one that is not wrapped as it is.

    Raises:
        ValueError: an FSDP model, whose parameters no process holds whole.
    """
    from torch import nn

    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    kinds = {type(part).__name__ for part in model.modules()} | {type(p).__name__ for p in model.parameters()}
    if any(kind.startswith("FSDP") or "FullyShard" in kind or kind == "DTensor" for kind in kinds):
        raise GradmatchError(
            "the model is sharded by FSDP, so that no process holds its parameters whole: load its checkpoint unsharded "
            "(estimating and merging need no optimizer state, and only one copy of the weights)",
            "unsupported_model",
        )
    return model


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Layers that torch.compile wraps inside a model stand bare for a while: hooks and per-example rules need the layers."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "_orig_mod")
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, unwrap(child))
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Each name with its form without wrappers; a leading `module.` is one where all names have it.

    >>> bare_names(["module.up.weight", "module._orig_mod.down.weight"])
    {'module.up.weight': 'up.weight', 'module._orig_mod.down.weight': 'down.weight'}
    """
    bare = {name: INSIDE.sub("", name) for name in names}
    while bare and all(name.startswith("module.") for name in bare.values()):
        bare = {name: INSIDE.sub("", short.removeprefix("module.")) for name, short in bare.items()}
    return bare
