"""The paper's equations on convex problems, where every quantity is exact: claims 1, 2, 3, 4 and 10."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from experiments.config import Study
from experiments.pipeline import Stage, recorded
from experiments.records import Record

CLAIMS = ("exactness", "identities", "special_cases", "closer", "refinement")


class Config(Study):
    """Keys of a theory config."""

    experiment: Literal["theory"]
    seeds: int = Field(default=40, gt=1)


def stages(config: Config) -> list[Stage]:
    """One stage per claim."""
    settings, seconds = {"seeds": list(range(config.seeds))}, 0.1 * config.seeds
    return [
        Stage(f"theory/{claim}", f"experiments.theory:{claim}", settings, seconds=seconds) for claim in CLAIMS
    ]


def records(config: Config, store: Path) -> list[Record]:
    """One record per claim; stages that failed are left out."""
    return [row for stage in stages(config) for row in recorded(stage, store, "claim", "claim.json")]


def report(found: list[Record]) -> str:
    """The claims with their thresholds, measured values and verdicts."""
    from experiments.report import claims_report

    return claims_report(found)
