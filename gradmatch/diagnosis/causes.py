"""Every finder of causes, and the order in which what they find is told.

Order: first what makes every other number meaningless (BROKEN), then what is not what it claims to be (INPUT: a model, a
curvature, an output, a rule that its floor has turned into another), then what a better setting or better luck with the tasks would change (CHOICE), and at last what the
merge does to the losses whatever the reason (SYMPTOM); within a rank, by cost in nats. A cause
of an earlier rank explains away later ones: a task of another base also looks oversized and in conflict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmatch.diagnosis.cause import Cause
from gradmatch.diagnosis.causes_broken import BROKEN_FINDERS
from gradmatch.diagnosis.causes_choice import CHOICE_FINDERS
from gradmatch.diagnosis.causes_input import INPUT_FINDERS
from gradmatch.diagnosis.causes_losses import SYMPTOM_FINDERS, far_from_best
from gradmatch.diagnosis.causes_models import MODEL_FINDERS
from gradmatch.diagnosis.causes_sizes import SIZE_FINDERS, undershoot

if TYPE_CHECKING:
    from gradmatch.diagnosis.evidence import Evidence


def ranked(causes: Sequence[Cause]) -> list[Cause]:
    """By rank, then by cost; those that cost nothing, or nobody knows what, last and in the order in which they were found."""
    return sorted(causes, key=lambda c: (c.rank, -(c.cost or 0.0)))


def find_causes(evidence: Evidence) -> list[Cause]:
    """Ask every finder, and rank what they say. A merge without a finding is healthy as far as can be seen."""
    finders = (*BROKEN_FINDERS, *MODEL_FINDERS, *INPUT_FINDERS, *SIZE_FINDERS, *CHOICE_FINDERS)
    causes = [cause for finder in finders for cause in finder(evidence)] or far_from_best(evidence)
    if not causes:
        evidence.notes.extend(undershoot(evidence))
    return ranked([*causes, *(cause for finder in SYMPTOM_FINDERS for cause in finder(evidence))])
