"""Quantised weights, which cannot be averaged: told by a config, or by what lies beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.stores import Store

EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
PACKED = ("I8", "U8", "I32")  # what quantised weights are packed in; tables of indices are I64
QUANTISERS = ("quantization_config", "compression_config")  # the second: compressed-tensors
SCALE = re.compile(r"scale|absmax|scb$|zero|quant", re.IGNORECASE)
StoreT = TypeVar("StoreT", bound=Store)


def refuse_quantised(store: StoreT, where: object, config: Mapping[str, Any] | None = None) -> StoreT:
    """The store, unless its weights are quantised.

    Raises:
        ValueError: quantised weights.
    """
    told = next(_by_config(config), None) or next(_by_scales(store), None)
    if told:
        raise GradmatchError(
            f"{where} is quantised ({told}); quantised weights cannot be averaged: merge the unquantised model and quantise the result",
            "quantised",
            where,
        )
    return store


def _by_scales(store: Store) -> Iterator[str]:
    """Where packed weights have a scale beside them."""
    for name in store:
        spec, module = store.spec(name), name.rpartition(".")[0]
        if spec.dtype in EIGHT_BITS or (spec.dtype in PACKED and len(spec.shape) > 1):
            inside = f"{module}." if module else ""
            beside = (other[len(module) :] for other in store if other != name and other.startswith(inside))
            yield from (
                f"{name!r} is {spec} with {module + one!r} beside it" for one in beside if SCALE.search(one)
            )


def _by_config(config: Any, at: str = "") -> Iterator[str]:
    """Where a config says that weights are quantised, in nested configs too."""
    if isinstance(config, Mapping):
        yield from (f"{at}{key} in its config.json" for key in QUANTISERS if config.get(key))
        for key, value in config.items():
            yield from _by_config(value, f"{at}{key}.")
