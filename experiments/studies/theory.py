"""The paper's equations on convex problems, where every quantity is exact: claims 1, 2, 3, 4 and 10."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from experiments.config import Study
from experiments.pipeline import Stage, is_done, origin, result
from experiments.records import Record
from experiments.studies.sentiment_cells import MERGING

CLAIMS = ("exactness", "identities", "special_cases", "closer", "refinement")
CODE = (
    "experiments.convex",
    "gradmatch.estimators",
    "experiments.statistics",
    *MERGING,
)


class Config(Study):
    """Keys of a theory config."""

    experiment: Literal["theory"]
    seeds: int = Field(default=40, gt=1)


def stages(config: Config) -> list[Stage]:
    """One stage per claim."""
    seeds = list(range(config.seeds))
    return [
        Stage(
            f"theory/{claim}",
            f"experiments.theory:{claim}",
            {"seeds": seeds},
            code=CODE,
            seconds=0.1 * config.seeds,
        )
        for claim in CLAIMS
    ]


def records(config: Config, store: Path) -> list[Record]:
    """One record per claim; stages that failed are left out."""
    found = []
    for stage in stages(config):
        if is_done(stage, store):
            common = {"experiment": config.experiment, "name": config.name, "kind": "claim"}
            found.append({**common, **result(stage, store, "claim.json"), **origin(stage, store)})
    return found


def report(found: list[Record]) -> str:
    """The claims with their thresholds, measured values and verdicts."""
    from experiments.report import claims_report

    return claims_report(found)
