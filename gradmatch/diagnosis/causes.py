"""A cause: what went wrong, how it shows, what it costs, what to do. And in which order causes are told.

Order: first what makes every other number meaningless (BROKEN), then what is not what it claims to be (INPUT: a model, a
curvature, an output, a rule that its floor has turned into another), then what a better setting or better luck with the tasks would change (CHOICE); within a rank, by cost in nats. A cause
of an earlier rank explains away later ones: a task of another base also looks oversized and in conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradmatch.diagnosis.evidence import Evidence, Saving

BROKEN, INPUT, CHOICE = 0, 1, 2


@dataclass(frozen=True)
class Cause:
    """One finding.

    Attributes:
        name: of the kind, e.g. "not_finite".
        subject: the task, model or layer that it is about.
        evidence: one sentence with its numbers.
        remedy: the one change that helps most.
        rank: BROKEN, INPUT or CHOICE.
        cost: nats that the repair saves over all tasks' examples (inf: the merge is useless); None: not known.
        source: "measured" (losses of the repaired merge), "forecast" (quadratic), or "" where there is no cost.
        numbers: the evidence as values.
    """

    name: str
    subject: str
    evidence: str
    remedy: str
    rank: int
    cost: float | None = None
    source: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


Finder = Callable[["Evidence"], list[Cause]]


def ranked(causes: Sequence[Cause]) -> list[Cause]:
    """By rank, then by cost; those that cost nothing, or nobody knows what, last and in the order in which they were found."""
    return sorted(causes, key=lambda c: (c.rank, -(c.cost or 0.0)))


def find_causes(evidence: Evidence) -> list[Cause]:
    """Ask every finder, and rank what they say. A merge without a finding is healthy as far as can be seen."""
    from gradmatch.diagnosis.causes_broken import BROKEN_FINDERS
    from gradmatch.diagnosis.causes_choice import CHOICE_FINDERS
    from gradmatch.diagnosis.causes_input import INPUT_FINDERS
    from gradmatch.diagnosis.causes_models import MODEL_FINDERS
    from gradmatch.diagnosis.causes_sizes import SIZE_FINDERS, undershoot

    finders = (*BROKEN_FINDERS, *MODEL_FINDERS, *INPUT_FINDERS, *SIZE_FINDERS, *CHOICE_FINDERS)
    causes = ranked([cause for finder in finders for cause in finder(evidence)])
    if not causes:
        evidence.notes.extend(undershoot(evidence))
    return causes


def priced(saving: Saving | None) -> tuple[float | None, str]:
    """(cost, source) of a measured saving; never negative."""
    return (None, "") if saving is None else (max(0.0, saving.nats), "measured")
