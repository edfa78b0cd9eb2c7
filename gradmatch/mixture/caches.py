"""Caches of keys and values for several experts in one: which layers are whose, and rows of what goes with a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def rows_of(given: Any, rows: Tensor) -> Any:
    """Some rows of everything that has one for each row of the batch."""
    if isinstance(given, Tensor):
        return given[rows] if given.dim() and len(given) == len(rows) and len(rows) > 1 else given
    if isinstance(given, Mapping):
        return {key: rows_of(value, rows) for key, value in given.items()}
    if isinstance(given, tuple):
        return tuple(rows_of(value, rows) for value in given)
    return given


def attentions(module: nn.Module) -> list[Any]:
    """Modules that say which layer of a cache is theirs."""
    return [one for one in module.modules() if isinstance(getattr(one, "layer_idx", None), int)]


def shift(module: nn.Module, by: int) -> None:
    """Give a module other layers of the cache."""
    for one in attentions(module):
        one.layer_idx += by


def grow(cache: Any, configs: Sequence[Any]) -> None:
    """Give a cache layers for every expert behind those of the first; configs: of the experts."""
    if cache is None or getattr(cache, "gradmatch_grown", False):
        return
    from transformers import DynamicCache

    own = [DynamicCache(config=config).layers for config in configs]
    missing = [layer for layers in own for layer in layers][len(cache.layers) :]
    cache.layers.extend(missing)
    cache.gradmatch_grown = True


def part_of(cache: Any, first: int, count: int) -> Any:
    """Some layers of a cache as a cache; they are the same layers."""
    part = copy.copy(cache)
    part.layers = cache.layers[first : first + count]
    return part


def mark_length(cache: Any, expert: nn.Module, x: Tensor) -> None:
    """Tell a cache that so many positions have passed a layer whose expert was not computed: masks go by the first layer's length."""
    index = next((one.layer_idx for one in attentions(expert)), None)
    if index is not None:
        nothing = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
        cache.update(nothing, nothing, index)
