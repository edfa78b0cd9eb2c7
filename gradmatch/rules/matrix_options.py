"""Options of the rules of the family, for matrices whose curvature files hold Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules.options import Options, option
from gradmatch.rules.system import ITERATIONS, QUICK, TOLERANCE

STRUCTURES = ("diagonal", "kronecker")
SOLVERS = ("fast", "exact", "eigenbasis")


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
        help=f"of matrices with factors: fast, a few conjugate gradients in the models' precision, until {QUICK:.0%} of the system are "
        "left (default); exact, in float64 (default where iterations or tolerance are given); or eigenbasis, every curvature by its "
        "diagonal in a common basis",
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
        other = self.solver not in (None, "exact")
        idle = given if self.structure == "diagonal" else given[1:] if other else []
        if idle:
            by = "structure='diagonal'" if self.structure == "diagonal" else f"solver={self.solver!r}"
            raise GradmatchError(
                f"{idle[0]} plays no role with {by}; leave one of the two out", "bad_setting", idle[0]
            )


def solver(options: Mapping[str, Any]) -> str:
    """One of `SOLVERS`, as the options name it or imply it."""
    given = options.get("iterations") is not None or options.get("tolerance") is not None
    return options.get("solver") or ("exact" if given else "fast")


def is_exact(options: Mapping[str, Any]) -> bool:
    """Whether the options ask for the exact solution."""
    return solver(options) == "exact"


def allowed_residual(options: Mapping[str, Any]) -> float:
    """What may be left of a system that is solved by iterations, as a share of its right side."""
    if not is_exact(options):
        return QUICK
    tolerance = options.get("tolerance")
    return TOLERANCE if tolerance is None else float(tolerance)
