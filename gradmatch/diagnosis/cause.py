"""One cause: what went wrong, how it shows, what it costs, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradmatch.diagnosis.evidence import Evidence, Saving

BROKEN, INPUT, CHOICE, SYMPTOM = 0, 1, 2, 3


@dataclass(frozen=True)
class Cause:
    """One finding.

    Attributes:
        name: of the kind, e.g. "not_finite".
        subject: the task, model or layer that it is about.
        evidence: one sentence with its numbers.
        remedy: the one change that helps most.
        rank: BROKEN, INPUT, CHOICE, or SYMPTOM: what the merge does, whatever the reason.
        cost: nats that the repair saves over all examples of the tasks and, of an INPUT, of the base's own data (inf: the merge is
            useless); None: not known.
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


Finder = Callable[["Evidence"], Iterable[Cause]]


def cause(
    name: str,
    subject: str,
    evidence: str,
    remedy: str,
    rank: int,
    saving: Saving | None = None,
    /,
    **numbers: float,
) -> Cause:
    """A cause that costs what its repair saves, never less than nothing; None where no repair was measured."""
    cost, source = (None, "") if saving is None else (max(0.0, saving.nats), "measured")
    return Cause(name, subject, evidence, remedy, rank, cost, source, numbers)


def plural(count: int, one: str = "is", many: str = "are") -> str:
    """The word for so many.

    >>> plural(1), plural(2), plural(2, "matrix", "matrices")
    ('is', 'are', 'matrices')
    """
    return one if count == 1 else many
