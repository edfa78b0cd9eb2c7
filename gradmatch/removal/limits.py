"""The largest alpha within a budget: of nats on what must stay, and of clamped coordinates."""

from __future__ import annotations

from dataclasses import dataclass

from gradmatch.removal.forecast import AlphaPath, Point
from gradmatch.removal.problem import Problem

BISECTIONS = 4
MOST_BISECTIONS = 10  # while nothing fits yet


@dataclass(frozen=True)
class Budget:
    """The largest alpha found within a budget.

    Attributes:
        alpha: to be used; 0 where even the smallest tried costs too much.
        nats: the budget, nats per example on what must stay.
        bound: what stopped it: "collateral", "measured collateral", "clamped share", or "largest" (nothing did).
        path: the points tried, by alpha.
    """

    alpha: float
    nats: float
    bound: str
    path: tuple[Point, ...]


def budget(
    problem: Problem | AlphaPath, nats: float, *, share: float = 0.01, largest: float = 2.0, steps: int = 8
) -> Budget:
    """The largest alpha whose collateral, forecast and (with retain data) measured, stays within `nats` per example.

    Alphas are tried upwards in equal steps, so that a rise in between is not jumped over by more than one step; between the
    last that fits and the first that does not, the interval is halved four times; up to ten times while none fits.

    Args:
        problem: what to remove, from what, how; with `retain` where data is at hand. An `AlphaPath` keeps points it knows.
        nats: allowed rise of the loss on what must stay, nats per example.
        share: allowed share of clamped coordinates.
        largest: no alpha above this is tried.
        steps: number of equal steps.

    Raises:
        ValueError: a budget that is not positive.
    """
    if not (nats > 0 and largest > 0 and steps > 0):
        raise ValueError(f"nats, largest and steps must be positive, got {nats}, {largest} and {steps}")
    top, bound = largest, "largest"
    asked = problem.problem if isinstance(problem, AlphaPath) else problem
    if asked.method == "removal" and (limit := asked.largest_alpha(share)) < largest:
        top, bound = limit, "clamped share"
    if top == 0.0:
        return Budget(0.0, nats, bound, ())
    path = problem if isinstance(problem, AlphaPath) else AlphaPath(problem)
    found, tried, fails = 0.0, [], None
    for step in range(1, steps + 1):
        point = path.point(top * step / steps)
        tried.append(point)
        if (excess := _excess(point, nats)) is not None:
            fails, bound = point.alpha, excess
            break
        found = point.alpha
    for halving in range(MOST_BISECTIONS if fails is not None else 0):
        assert fails is not None
        if halving >= BISECTIONS and found > 0:
            break
        point = path.point((found + fails) / 2)
        tried.append(point)
        if (excess := _excess(point, nats)) is not None:
            fails, bound = point.alpha, excess
        else:
            found = point.alpha
    return Budget(found, nats, bound, tuple(sorted(tried, key=lambda point: point.alpha)))


def _excess(point: Point, nats: float) -> str | None:
    """Which rise exceeds the budget, or None. A number that is not finite exceeds it."""
    if not point.collateral <= nats:
        return "collateral"
    if point.measured_collateral is not None and not point.measured_collateral <= nats:
        return "measured collateral"
    return None
