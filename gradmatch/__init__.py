"""Merge fine-tuned networks by their uncertainty, find out why a merge failed, remove what a model should not know."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.checkpoint import Checkpoint, open_checkpoint
    from gradmatch.diagnosis import Diagnosis, diagnose
    from gradmatch.inputs.heads import load_head
    from gradmatch.merging import merge
    from gradmatch.output.report import Report
    from gradmatch.rules import RULES
    from gradmatch.subtraction import analogy, subtract
    from gradmatch.task import Task
    from gradmatch.transforms import TRANSFORMS

# Where each public name lives; imported on first use, so that a command line that needs no torch does not wait for it.
EXPORTS = {
    "Checkpoint": "gradmatch.checkpoint",
    "Diagnosis": "gradmatch.diagnosis",
    "RULES": "gradmatch.rules",
    "Report": "gradmatch.output.report",
    "TRANSFORMS": "gradmatch.transforms",
    "Task": "gradmatch.task",
    "analogy": "gradmatch.subtraction",
    "diagnose": "gradmatch.diagnosis",
    "load_head": "gradmatch.inputs.heads",
    "merge": "gradmatch.merging",
    "open_checkpoint": "gradmatch.checkpoint",
    "subtract": "gradmatch.subtraction",
}
__all__ = [
    "RULES",
    "TRANSFORMS",
    "Checkpoint",
    "Diagnosis",
    "Report",
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
