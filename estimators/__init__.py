"""Curvature of neural networks, exact per example: any nn.Module and batches in, a `Curvature` on disk out.

`estimate(model, batches, method=...)` runs one of `ESTIMATORS`; `from_adam`, `from_ivon` and `from_laplace` read what
others have already measured. Names are loaded when they are first used, so that importing this package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from estimators.adam import from_adam
    from estimators.curvature import Curvature
    from estimators.estimation import ESTIMATORS, estimate
    from estimators.ivon import from_ivon
    from estimators.laplace import from_laplace
    from estimators.likelihood import Categorical
    from estimators.values import Bernoulli, Gaussian

__all__ = [
    "ESTIMATORS",
    "Bernoulli",
    "Categorical",
    "Curvature",
    "Gaussian",
    "estimate",
    "from_adam",
    "from_ivon",
    "from_laplace",
]

_WHERE = {
    "Bernoulli": "estimators.values",
    "Categorical": "estimators.likelihood",
    "Curvature": "estimators.curvature",
    "Gaussian": "estimators.values",
    "from_adam": "estimators.adam",
    "from_ivon": "estimators.ivon",
    "from_laplace": "estimators.laplace",
    "ESTIMATORS": "estimators.estimation",
    "estimate": "estimators.estimation",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module 'estimators' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
