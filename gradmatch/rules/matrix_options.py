"""Options of the rules of the family, for matrices whose curvature files hold Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules.options import Options, option
from gradmatch.rules.system import ITERATIONS, TOLERANCE

STRUCTURES = ("diagonal", "kronecker")
SOLVERS = ("eigenbasis", "exact")


@dataclass(frozen=True)
class MatrixOptions(Options):
    """What the curvature of a matrix is taken as, and how its system is solved."""

    structure: str | None = option(
        None,
        kind="",
        choices=STRUCTURES,
        help="of the curvature: its diagonal, or the Kronecker factors that its files hold",
    )
    solver: str | None = option(
        None, kind="", choices=SOLVERS,
        help="of matrices with factors: every curvature by its diagonal in their common eigenbasis (default), or exact, "
        "by conjugate gradients (default where iterations or tolerance are given)",
    )  # fmt: skip
    iterations: int | None = option(
        None, "[1, inf]", kind=1, help=f"exact: conjugate gradients stop after so many (default {ITERATIONS})"
    )
    tolerance: float | None = option(
        None,
        "[0, inf]",
        kind=1.0,
        help=f"exact: or where the residual is this share of the right side (default {TOLERANCE:g})",
    )
    conv1d: bool | None = option(
        None, kind=True, help="whether square matrices are stored [in, out] (default: as the config says)"
    )

    def __post_init__(self) -> None:
        """Check that no option is given which another makes idle.

        Raises:
            ValueError: how to solve beside structure="diagonal", or when to stop beside solver="eigenbasis".
        """
        super().__post_init__()
        given = [name for name in ("solver", "iterations", "tolerance") if getattr(self, name) is not None]
        idle = given if self.structure == "diagonal" else given[1:] if self.solver == "eigenbasis" else []
        if idle:
            by = "structure='diagonal'" if self.structure == "diagonal" else "solver='eigenbasis'"
            raise GradmatchError(
                f"{idle[0]} plays no role with {by}; leave one of the two out", "bad_setting", idle[0]
            )


def is_exact(options: Mapping[str, Any]) -> bool:
    """Whether the options ask for the exact solution."""
    given = options.get("iterations") is not None or options.get("tolerance") is not None
    return options.get("solver") == "exact" or (options.get("solver") is None and given)
