"""Merge fine-tuned networks by their uncertainty, find out why a merge failed, remove what a model should not know."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.api import merge
    from gradmatch.diagnosis import Diagnosis, diagnose
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.heads import load_head
    from gradmatch.models.opening import open_checkpoint
    from gradmatch.models.task import Task
    from gradmatch.output.report import Report
    from gradmatch.rules import RULES, Rule
    from gradmatch.rules.edits import TRANSFORMS
    from gradmatch.subtraction import analogy, subtract

# Where each public name lives; imported on first use, so that a command line that needs no torch does not wait for it.
EXPORTS = {
    "Checkpoint": "gradmatch.models.checkpoint",
    "Diagnosis": "gradmatch.diagnosis",
    "RULES": "gradmatch.rules",
    "Report": "gradmatch.output.report",
    "Rule": "gradmatch.rules",
    "TRANSFORMS": "gradmatch.rules.edits",
    "Task": "gradmatch.models.task",
    "analogy": "gradmatch.subtraction",
    "diagnose": "gradmatch.diagnosis",
    "load_head": "gradmatch.models.heads",
    "merge": "gradmatch.api",
    "open_checkpoint": "gradmatch.models.opening",
    "subtract": "gradmatch.subtraction",
}
__all__ = [
    "RULES",
    "TRANSFORMS",
    "Checkpoint",
    "Diagnosis",
    "Report",
    "Rule",
    "Task",
    "analogy",
    "diagnose",
    "load_head",
    "merge",
    "open_checkpoint",
    "subtract",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
