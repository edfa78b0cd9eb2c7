"""Models that should not be averaged work side by side: experts are fine-tunes as they are, and a router decides."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.mixture.curve import SizeCurve, size_curve
    from gradmatch.mixture.loading import load
    from gradmatch.mixture.mixing import mix
    from gradmatch.mixture.shares import Routing, routing
    from gradmatch.mixture.stacking import stack, train_blocks
    from gradmatch.mixture.training import train_router

EXPORTS = {
    "Routing": "gradmatch.mixture.shares",
    "SizeCurve": "gradmatch.mixture.curve",
    "load": "gradmatch.mixture.loading",
    "mix": "gradmatch.mixture.mixing",
    "routing": "gradmatch.mixture.shares",
    "size_curve": "gradmatch.mixture.curve",
    "stack": "gradmatch.mixture.stacking",
    "train_blocks": "gradmatch.mixture.stacking",
    "train_router": "gradmatch.mixture.training",
}
__all__ = [
    "Routing",
    "SizeCurve",
    "load",
    "mix",
    "routing",
    "size_curve",
    "stack",
    "train_blocks",
    "train_router",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)
