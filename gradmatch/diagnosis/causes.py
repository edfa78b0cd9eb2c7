"""Every finder of causes, and the order in which what they find is told.

Order: first what makes every other number meaningless (BROKEN), then what is not what it claims to be (INPUT: a model, a
curvature, an output, a rule that its floor has turned into another), then what a better setting or better luck with the tasks
would change (CHOICE), and at last what the merge does to the losses whatever the reason (SYMPTOM); within a rank, by cost in nats.
A cause of an earlier rank explains away later ones: a task of another base also looks oversized and in conflict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmatch.diagnosis import (
    causes_broken,
    causes_choice,
    causes_input,
    causes_losses,
    causes_made,
    causes_models,
    causes_places,
    causes_sizes,
)
from gradmatch.diagnosis.cause import Cause, Finder

if TYPE_CHECKING:
    from gradmatch.diagnosis.evidence import Evidence

FINDERS: tuple[Finder, ...] = (
    causes_broken.not_finite,
    causes_broken.outputs_not_finite,
    causes_broken.shapes_differ,
    causes_broken.refused,
    causes_places.rows_moved,
    causes_places.transposed,
    causes_places.layers_swapped,
    causes_models.rescaled,
    causes_models.other_base,
    causes_models.untouched,
    causes_models.copied_layers,
    causes_input.relabelled,
    causes_input.curvature_of_another,
    causes_input.curvature_units,
    causes_input.noisy_curvature,
    causes_made.rounded_away,
    causes_made.no_merge_of_these,
    causes_models.zero_tensors,
    causes_sizes.sizes,
    causes_choice.floor_decides,
    causes_choice.stale_batchnorm,
    causes_choice.tasks_conflict,
)
SYMPTOMS: tuple[Finder, ...] = (causes_losses.worse_than_base, causes_losses.base_forgotten)
# Told by a threshold on cosines, errors or sizes, which long training crosses as well. The other inputs are facts of the files: equal
# values, a permutation, a rounding, a fingerprint.
JUDGED = ("other_base", "noisy_curvature", "curvature_units")


def ranked(causes: Sequence[Cause]) -> list[Cause]:
    """By rank, then by cost; those that cost nothing, or nobody knows what, last and in the order in which they were found.

    What is judged by a threshold (JUDGED) and measured to cost nothing stands behind everything else: it explains nothing.
    """
    return sorted(causes, key=lambda c: (c.name in JUDGED and c.cost == 0, c.rank, -(c.cost or 0.0)))


def find_causes(evidence: Evidence) -> list[Cause]:
    """Ask every finder, and rank what they say. A merge without a finding is healthy as far as can be seen."""
    causes = [cause for finder in FINDERS for cause in finder(evidence)]
    causes = causes or list(causes_losses.far_from_best(evidence))
    if not causes:
        evidence.notes.extend(causes_sizes.undershoot(evidence))
    return ranked([*causes, *(cause for finder in SYMPTOMS for cause in finder(evidence))])
