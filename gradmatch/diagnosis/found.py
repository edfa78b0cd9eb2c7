"""What a diagnosis found, as values; `Diagnosis` adds the ways to show it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradmatch.diagnosis.cause import Cause
from gradmatch.diagnosis.evidence import Evidence
from gradmatch.measure.redundancy import RedundancyPoint


@dataclass
class Found:
    """Why a merge is as it is: causes and everything they were found in.

    Attributes:
        causes: ranked; empty for a merge in which nothing was found.
        evidence: what they were found in.
        redundancy: task -> its redundancy curve, loss in nats per example.
        barriers: (task, task) -> height of the loss between the two fine-tunes, nats per example of both.
        overlaps: (task, task) -> overlap of their curvatures in [0, 1].
        weighted_conflicts: (task, task) -> share of their curvature on weights that they moved in opposite directions.
    """

    causes: list[Cause]
    evidence: Evidence
    redundancy: dict[str, list[RedundancyPoint]] = field(default_factory=dict)
    barriers: dict[tuple[str, str], float] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], float] = field(default_factory=dict)
    weighted_conflicts: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether no cause was found."""
        return not self.causes

    @property
    def notes(self) -> list[str]:
        """What else is to be said, and what could not be looked at."""
        return self.evidence.notes
