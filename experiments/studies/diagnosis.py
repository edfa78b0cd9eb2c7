"""Does the diagnosis name the true cause? Merges that fail on purpose, and healthy ones, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from experiments.config import Seeds, Study
from experiments.diagnosis.cases import CASES, HEALTHY, VARIANTS
from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record, of_kind
from experiments.studies.cells import Cells
from experiments.studies.sources import read_source

KNOWN = {**CASES, **VARIANTS}


class Config(Study):
    """Keys of the config: which seeds the rules were set on, which they are checked on, and which cases (empty: all)."""

    experiment: Literal["diagnosis"]
    development: Seeds = (0, 1, 2)
    seeds: Seeds = (10, 11, 12)
    cases: tuple[str, ...] = ()
    sentiment: Path | None = None  # config of fine-tuned encoders that the faults are built into as well
    encoders: Seeds = ()  # seeds of those; none given: all
    development_encoders: Seeds = (0,)  # of those, the ones that the rules were looked at on
    examples: int = Field(default=96, gt=1)  # of each task, for those

    @field_validator("cases")
    @classmethod
    def _known(cls, cases: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [case for case in cases if case not in KNOWN]
        if unknown:
            raise ValueError(f"unknown case {unknown[0]!r}; known: {', '.join(KNOWN)}")
        return cases

    @model_validator(mode="after")
    def _has_seeds(self) -> Config:
        if not (self.development or self.seeds or self.sentiment):
            raise ValueError("no seeds and no sentiment config: there is nothing to diagnose")
        both = [seed for seed in self.seeds if seed in self.development]
        if both:
            raise ValueError(
                f"seed {both[0]} is in `development` and in `seeds`, which are checked as seeds that no rule was set on"
            )
        if self.sentiment:
            seeds = (*self.encoders, *self.development_encoders)
            read_source(self.sentiment, seeds, kinds=("sentiment",))
        elif self.encoders:
            raise ValueError(f"`encoders` has {list(self.encoders)}, but no config `sentiment` trains them")
        return self


def stages(config: Config) -> list[Stage]:
    """One per seed; what the encoders' stages read comes with them."""
    return [*cells(config).values(), *encoder_cells(config).values()]


def cells(config: Config) -> dict[int, Stage]:
    """Seed -> its stage."""
    function, cases = "experiments.diagnosis.confusion:diagnose_cases", list(config.cases or KNOWN)
    return {
        seed: Stage(
            f"diagnosis/seed{seed}", function, {"seed": seed, "cases": cases}, seconds=1.5 * len(cases)
        )
        for seed in (*config.development, *config.seeds)
    }


def encoder_cells(config: Config) -> dict[int, Stage]:
    """Seed of the sentiment config -> the stage on its fine-tunes."""
    if config.sentiment is None:
        return {}
    source = read_source(config.sentiment, kinds=("sentiment",))
    made = Cells(source)
    return {
        seed: made.stage(
            f"diagnosis/encoder-seed{seed}",
            "diagnosis.encoder:diagnose_encoder",
            {"seed": seed, "count": config.examples},
            600,
            **made.sources(seed, source.data.tasks),
        )
        for seed in config.encoders or source.seeds
    }


def records(config: Config, store: Path) -> list[Record]:
    """One record per case and seed."""
    found = []
    for kind, made, looked_at in (
        ("", cells(config), config.development),
        ("encoder", encoder_cells(config), config.development_encoders),
    ):
        for seed, stage in made.items():
            split = " ".join(
                filter(None, (kind, "development" if seed in looked_at else "" if kind else "check"))
            )
            if is_done(stage, store):
                own = {"kind": "case", "seed": seed, "split": split, **origin(stage, store)}
                found += [{**own, **row} for row in result(stage, store, "cases.json")]
    return found


def report(found: list[Record]) -> str:
    """The confusion table: seeds that the rules were set on, seeds that they were not, and variants that came later."""
    cases = of_kind(found, "case")
    parts = [
        (
            "seeds that the rules were set on",
            [r for r in cases if r["split"] == "development" and not r["variant"]],
        ),
        ("other seeds", [r for r in cases if r["split"] == "check" and not r["variant"]]),
        ("other strengths, same seeds", [r for r in cases if r["split"] == "development" and r["variant"]]),
        ("other strengths, other seeds", [r for r in cases if r["split"] == "check" and r["variant"]]),
        ("fine-tuned encoders, looked at", [r for r in cases if r["split"] == "encoder development"]),
        ("fine-tuned encoders, other seeds", [r for r in cases if r["split"] == "encoder"]),
    ]
    return "\n\n".join(
        f"{what} ({', '.join(str(seed) for seed in sorted({row['seed'] for row in rows}))})\n{confusion_table(rows)}"
        for what, rows in parts
        if rows
    )


def confusion_table(rows: list[Record]) -> str:
    """Case by case: how often the true cause came first, and what came first instead."""
    width = max(len(row["case"]) for row in rows)
    lines = [f"{'case':<{width}}  {'true cause':<28}right  told first instead"]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        wrong = [row["found"] or "nothing" for row in mine if not row["right"]]
        right = f"{len(mine) - len(wrong)}/{len(mine)}"
        lines.append(
            f"{case:<{width}}  {mine[0]['expected'] or '(healthy)':<28}{right:<7}{', '.join(wrong)}".rstrip()
        )
    failures = [row for row in rows if row["expected"] != HEALTHY]
    healthy = [row for row in rows if row["expected"] == HEALTHY]
    first = sum(row["right"] for row in failures)
    blamed = sum(row["right"] and row["right_subject"] for row in failures)
    if failures:
        lines.append(
            f"true cause first in {first} of {len(failures)} failures ({first / len(failures):.0%}), "
            f"with the right task or model in {blamed}"
        )
    if healthy:
        lines.append(
            f"false alarms in {sum(not row['right'] for row in healthy)} of {len(healthy)} healthy merges"
        )
    return "\n".join(lines)
