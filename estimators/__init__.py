"""Curvature of neural networks, exact per example: any nn.Module and batches in, a `Curvature` on disk out.

`estimate(model, batches, method=...)` runs one of `ESTIMATORS`, or one of your own (`protocol.py`, `check_estimator`);
`from_adam`, `from_ivon` and `from_laplace` read what others have already measured, `from_task_vectors` needs the weights alone. Names are loaded when they are first used, so that importing this package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.estimators.adam import from_adam
    from gradmatch.estimators.callback import CurvatureCallback
    from gradmatch.estimators.categorical import Categorical
    from gradmatch.estimators.conformance import check_estimator
    from gradmatch.estimators.curvature import Curvature
    from gradmatch.estimators.estimation import estimate
    from gradmatch.estimators.ivon import from_ivon
    from gradmatch.estimators.laplace import from_laplace, to_laplace
    from gradmatch.estimators.operators import from_operator
    from gradmatch.estimators.protocol import ESTIMATORS
    from gradmatch.estimators.task_vectors import from_task_vectors
    from gradmatch.estimators.values import Bernoulli, Gaussian

__all__ = [
    "ESTIMATORS",
    "Bernoulli",
    "Categorical",
    "Curvature",
    "CurvatureCallback",
    "Gaussian",
    "check_estimator",
    "estimate",
    "from_adam",
    "from_ivon",
    "from_laplace",
    "from_operator",
    "from_task_vectors",
    "to_laplace",
]

_WHERE = {
    "Bernoulli": "gradmatch.estimators.values",
    "Categorical": "gradmatch.estimators.categorical",
    "Curvature": "gradmatch.estimators.curvature",
    "CurvatureCallback": "gradmatch.estimators.callback",
    "Gaussian": "gradmatch.estimators.values",
    "from_adam": "gradmatch.estimators.adam",
    "from_ivon": "gradmatch.estimators.ivon",
    "from_laplace": "gradmatch.estimators.laplace",
    "from_operator": "gradmatch.estimators.operators",
    "from_task_vectors": "gradmatch.estimators.task_vectors",
    "to_laplace": "gradmatch.estimators.laplace",
    "ESTIMATORS": "gradmatch.estimators.protocol",
    "check_estimator": "gradmatch.estimators.conformance",
    "estimate": "gradmatch.estimators.estimation",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module 'gradmatch.estimators' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
