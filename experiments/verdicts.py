"""Rows of the table of claims: what was measured against which threshold, the verdict, and the table itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from experiments.records import Record

HOLDS, REFUTED, NOT_SHOWN, REPORTED = "holds", "refuted", "not shown", "reported"
FEWEST_SEEDS = 3  # of a claim on accuracies: with fewer it is not shown
RULE = (
    "A part holds where the measured value meets the threshold (5, 8 b, 8 c and the batch bias of 9: where the whole interval does), is "
    "refuted where it does not and the interval excludes it, and is not shown otherwise; a part without a threshold is reported."
)


@dataclass(frozen=True)
class Row:
    """One part of a claim. `source`: the study whose records it was computed from."""

    claim: int
    part: str
    statement: str
    threshold: str
    measured: str
    interval: str
    seeds: int
    verdict: str
    source: str


@dataclass(frozen=True)
class Part:
    """What a part of a claim says, before anything is measured."""

    claim: int
    part: str
    statement: str
    threshold: str
    source: str

    def row(self, measured: str, interval: str, seeds: int, verdict: str) -> Row:
        """What came out."""
        said = (self.claim, self.part, self.statement, self.threshold)
        return Row(*said, measured, interval, seeds, verdict, self.source)

    def missing(self) -> Row:
        """No record tells of it."""
        return self.row("no records", "", 0, NOT_SHOWN)


def judge(
    value: float, low: float, high: float, *, least: float | None = None, most: float | None = None
) -> str:
    """Verdict on `value >= least` or `value <= most`, with the interval from low to high."""
    if least is not None:
        return HOLDS if value >= least else REFUTED if high < least else NOT_SHOWN
    assert most is not None
    return HOLDS if value <= most else REFUTED if low > most else NOT_SHOWN


def verdict_of(parts: Sequence[str]) -> str:
    """A claim's verdict from its parts': refuted where one is, holds where all do that have a threshold."""
    return REFUTED if REFUTED in parts else HOLDS if set(parts) - {REPORTED} == {HOLDS} else NOT_SHOWN


def summary(found: Sequence[Mapping[str, object]]) -> str:
    """One sentence: which claims hold, which are refuted, which were not shown."""
    claims = list(dict.fromkeys(row["claim"] for row in found))
    verdicts = {n: verdict_of([str(row["verdict"]) for row in found if row["claim"] == n]) for n in claims}
    parts = []
    for verdict in (HOLDS, REFUTED, NOT_SHOWN):
        own = [str(number) for number, judged in verdicts.items() if judged == verdict]
        parts.append(f"{verdict}: {', '.join(own) or 'none'}")
    return "Claims as a whole (a claim is refuted where one of its parts is): " + "; ".join(parts) + "."


COLUMNS = ("claim", "statement", "threshold", "measured", "interval", "seeds", "verdict")


def cells(row: Mapping[str, object]) -> list[str]:
    """The row as text, for tables."""
    part = f" {row['part']}" if row["part"] else ""
    return [f"{row['claim']}{part}", *(str(row[name]) for name in COLUMNS[1:])]


def as_records(found: Sequence[Row]) -> list[Record]:
    """Rows as records of kind `verdict`."""
    return [{"kind": "verdict", **asdict(row)} for row in found]


def markdown(found: Sequence[Mapping[str, object]], origins: Mapping[str, str]) -> str:
    """The table in Markdown, which records each study was read from, and the summary."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in found:
        *text, verdict = cells(row)
        lines.append("| " + " | ".join([*text, f"**{verdict}**"]) + " |")
    read = "; ".join(f"{name} from {where}" for name, where in origins.items())
    return "\n".join([*lines, "", summary(found), RULE, f"Read: {read}."])
