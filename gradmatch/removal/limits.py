"""The largest alpha within a budget: of nats on what must stay, and of clamped coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradmatch.estimators.errors import GradmatchError
from gradmatch.removal.forecast import AlphaPath, Point, check_alphas
from gradmatch.removal.problem import Problem
from gradmatch.rules import RULES

BISECTIONS = 4
MOST_BISECTIONS = 10  # while nothing fits yet


@dataclass(frozen=True)
class Budget:
    """The largest alpha found within a budget.

    Attributes:
        alpha: to be used; 0 where even the smallest tried costs too much.
        nats: the budget, nats per example on what must stay; by name where they differ.
        bound: what stopped it: "collateral", "measured collateral", "measured rise on ...", "clamped share", or "largest" (nothing did).
        path: the points tried, by alpha, each as far as it had to be known: data to be removed are not asked.
    """

    alpha: float
    nats: float | Mapping[str, float]
    bound: str
    path: tuple[Point, ...]

    @property
    def nearest(self) -> tuple[float, float] | None:
        """Where nothing fits: (alpha, nats), the gentlest that was tried and the least budget on everything that would allow it; else None."""
        if self.alpha or not self.path:
            return None
        point = self.path[0]
        rises = [point.collateral, point.measured_collateral, *point.beside.values()]
        known = [rise for rise in rises if rise is not None]
        return (point.alpha, max(known)) if known and all(map(math.isfinite, known)) else None


def budget(
    problem: Problem | AlphaPath,
    nats: float | Mapping[str, float],
    *,
    share: float = 0.01,
    largest: float = 2.0,
    steps: int | Sequence[float] = 8,
) -> Budget:
    """The largest alpha whose collateral, forecast and (with retain data) measured, stays within `nats` per example.

    Alphas are tried upwards, so that a rise in between is not jumped over by more than one step; between the last that fits
    and the first that does not, the interval is halved four times; up to ten times while none fits.

    Args:
        problem: what to remove, from what, how; with `retain` where data is at hand. An `AlphaPath` keeps points it knows.
        nats: allowed rise of the loss on what must stay, nats per example; by name ("retain" and those beside it) where they differ.
        share: allowed share of clamped coordinates.
        largest: no alpha above this is tried.
        steps: number of equal steps; or the alphas to try, of which those within `share` and `largest` are, and then that limit.

    Raises:
        ValueError: numbers that are not positive, or alphas that are no path.
    """
    least = min(nats.values()) if isinstance(nats, Mapping) else nats
    if not (least > 0 and largest > 0 and share >= 0 and (not isinstance(steps, int) or steps > 0)):
        raise GradmatchError(
            f"nats, largest and steps must be positive and share at least 0, got {nats}, {largest}, {steps} and {share}",
            "out_of_range",
        )
    if not isinstance(steps, int):
        check_alphas(steps)
    path = problem if isinstance(problem, AlphaPath) else AlphaPath(problem)
    top, bound = largest, "largest"
    if RULES[path.problem.method].guarded and (limit := path.problem.largest_alpha(share)) < largest:
        top, bound = limit, "clamped share"
    if top == 0.0:
        return Budget(0.0, nats, bound, ())
    if isinstance(steps, int):
        grid = [top * step / steps for step in range(1, steps + 1)]
    else:
        grid = [*sorted({alpha for alpha in steps if 0 < alpha < top}), top]
    found, tried, fails = 0.0, [], None
    halvings = BISECTIONS * path.passes([math.nan])  # as many passes as an alpha that nobody knows
    with path.working(path.passes(grid) + halvings, "budget"):
        for alpha in grid:
            point, excess = path.excess(alpha, nats)
            tried.append(point)
            if excess is not None:
                fails, bound = alpha, excess
                break
            found = alpha
        for halving in range(MOST_BISECTIONS if fails is not None else 0):
            assert fails is not None
            if halving >= BISECTIONS and found > 0:
                break
            middle = (found + fails) / 2
            point, excess = path.excess(middle, nats)
            tried.append(point)
            if excess is not None:
                fails, bound = middle, excess
            else:
                found = middle
    if not found:  # what the gentlest costs on everything is told
        gentlest = min(tried, key=lambda point: point.alpha)
        tried[tried.index(gentlest)] = path.excess(gentlest.alpha, nats, whole=True)[0]
    return Budget(found, nats, bound, tuple(sorted(tried, key=lambda point: point.alpha)))
