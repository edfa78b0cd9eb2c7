"""Merge fine-tuned networks by their uncertainty, find out why a merge failed, remove what a model should not know."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.api import estimate, forecast, merge
    from gradmatch.diagnosis import Diagnosis, diagnose
    from gradmatch.estimators.adam import from_adam
    from gradmatch.estimators.callback import CurvatureCallback
    from gradmatch.estimators.curvature import Curvature
    from gradmatch.estimators.errors import GradmatchError
    from gradmatch.measure.evaluating import evaluate
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.heads import load_head
    from gradmatch.models.opening import open_checkpoint
    from gradmatch.models.task import Task
    from gradmatch.output.report import Report
    from gradmatch.posterior.unmerging import unmerge
    from gradmatch.refine import refine
    from gradmatch.removal.limits import budget
    from gradmatch.rules import RULES, Rule
    from gradmatch.rules.after import AFTER
    from gradmatch.rules.edits import TRANSFORMS
    from gradmatch.sharing import push
    from gradmatch.subtraction import analogy, subtract

# Where each public name lives; imported on first use, so that a command line that needs no torch does not wait for it.
EXPORTS = {
    "AFTER": "gradmatch.rules.after",
    "Checkpoint": "gradmatch.models.checkpoint",
    "Curvature": "gradmatch.estimators.curvature",
    "CurvatureCallback": "gradmatch.estimators.callback",
    "Diagnosis": "gradmatch.diagnosis",
    "GradmatchError": "gradmatch.estimators.errors",
    "RULES": "gradmatch.rules",
    "Report": "gradmatch.output.report",
    "Rule": "gradmatch.rules",
    "TRANSFORMS": "gradmatch.rules.edits",
    "Task": "gradmatch.models.task",
    "analogy": "gradmatch.subtraction",
    "budget": "gradmatch.removal.limits",
    "diagnose": "gradmatch.diagnosis",
    "estimate": "gradmatch.api",
    "evaluate": "gradmatch.measure.evaluating",
    "forecast": "gradmatch.api",
    "from_adam": "gradmatch.estimators.adam",
    "load_head": "gradmatch.models.heads",
    "merge": "gradmatch.api",
    "open_checkpoint": "gradmatch.models.opening",
    "push": "gradmatch.sharing",
    "refine": "gradmatch.refine",
    "subtract": "gradmatch.subtraction",
    "unmerge": "gradmatch.posterior.unmerging",
}
__all__ = [
    "AFTER",
    "RULES",
    "TRANSFORMS",
    "Checkpoint",
    "Curvature",
    "CurvatureCallback",
    "Diagnosis",
    "GradmatchError",
    "Report",
    "Rule",
    "Task",
    "analogy",
    "budget",
    "diagnose",
    "estimate",
    "evaluate",
    "forecast",
    "from_adam",
    "load_head",
    "merge",
    "open_checkpoint",
    "push",
    "refine",
    "subtract",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "__version__":
        from importlib.metadata import version

        return version("gradmatch")
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
