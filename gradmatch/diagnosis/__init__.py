"""Why a merge failed, and what another one would cost: gradient mismatch, forecasts, causes, and a report.

gathering   source  scan (weights alone, a range at a time)  moved (rows and matrices in other places)  recipes (what rules make of weights)
            evidence (weights, curvature, losses)  measuring (losses)  diagnosing (everything)
judging     causes (all of them, and their order)  causes_*  repairs (what a cost is measured on)
telling     text  report (JSON)  page (HTML)  charts (SVG)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.diagnosis.cause import Cause
    from gradmatch.diagnosis.diagnosing import Diagnosis, diagnose
    from gradmatch.measure.forecast import Products, best_coefficients, pareto_front
    from gradmatch.measure.mismatch import Mismatch, gradient_mismatch
    from gradmatch.measure.objective import Objective

EXPORTS = {
    "Cause": "gradmatch.diagnosis.cause",
    "Diagnosis": "gradmatch.diagnosis.diagnosing",
    "Mismatch": "gradmatch.measure.mismatch",
    "Objective": "gradmatch.measure.objective",
    "Products": "gradmatch.measure.forecast",
    "auto_weights": "gradmatch.choosing.auto",
    "best_coefficients": "gradmatch.measure.forecast",
    "diagnose": "gradmatch.diagnosis.diagnosing",
    "gradient_mismatch": "gradmatch.measure.mismatch",
    "pareto_front": "gradmatch.measure.forecast",
}
__all__ = [
    "Cause",
    "Diagnosis",
    "Mismatch",
    "Objective",
    "Products",
    "auto_weights",
    "best_coefficients",
    "diagnose",
    "gradient_mismatch",
    "pareto_front",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)
