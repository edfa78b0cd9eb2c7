"""What a merge will cost each task before it is evaluated, and the weights that cost least.

Around its fine-tune every loss is a quadratic; on the span of a few directions (the task vectors) it is a tiny one:
with theta = theta0 + sum_k c_k u_k all that counts are the slopes U'g_t and the products U'H_t U. `products.py` measures
those; here they are used. numpy only, float64; K directions, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradmatch.estimators.errors import GradmatchError

Array = NDArray[np.float64]
NATS_TOO_FAR = 1.0  # nats per example, where the number of classes is not known; see Products.limit


@dataclass(frozen=True)
class Products:
    """One task's loss on the span of the directions, expanded at its fine-tune.

    Attributes:
        task: its name.
        directions: names of the K directions u_k.
        position: (K,) coordinates of theta_t: theta_t = theta0 + sum_k position_k u_k.
        slope: (K,) u_k' grad l_t(theta_t), nats.
        curvature: (K, K) u_i' H_t u_j, nats.
        loss: l_t(theta_t) in nats, or nan where it was not measured.
        num_examples: N that the loss sums over.
        examples_seen: how many were used.
        kind: what H_t is: "ggn" (exact), "kronecker" or "diagonal".
        limit: nats per example of a uniform guess (log C): a forecast above it cannot be right.
    """

    task: str
    directions: tuple[str, ...]
    position: Array
    slope: Array
    curvature: Array
    loss: float = math.nan
    num_examples: int = 1
    examples_seen: int = 0
    kind: str = "ggn"
    limit: float = NATS_TOO_FAR

    def rise(self, coefficients: Array) -> float:
        """l_t(theta) - l_t(theta_t) ~ g'd + 1/2 d'H_t d, d = U (c - position): nats, summed over N examples.

        Source: second-order Taylor expansion of l_t at theta_t, with the measured gradient g.
        """
        d = np.asarray(coefficients, dtype=np.float64) - self.position
        return float(self.slope @ d + 0.5 * d @ self.curvature @ d)

    def distance(self, coefficients: Array) -> float:
        """1/2 d'H_t d in nats per example: how far from the fine-tune, in units of the loss."""
        d = np.asarray(coefficients, dtype=np.float64) - self.position
        return float(0.5 * d @ self.curvature @ d) / self.num_examples

    def trusted(self, coefficients: Array) -> bool:
        """Whether the quadratic can hold there: its curvature term stays below the loss of a uniform guess."""
        return self.distance(coefficients) <= self.limit


@dataclass(frozen=True)
class BestWeights:
    """Weights that the forecast likes best.

    Attributes:
        coefficients: direction -> c.
        rises: task -> forecast rise in nats (summed over its N).
        trusted: whether every task's forecast holds there.
        objective: the minimised value.
    """

    coefficients: dict[str, float]
    rises: dict[str, float]
    trusted: bool
    objective: float


@dataclass(frozen=True)
class Calibration:
    """How forecasts of one task compared with measured losses.

    Attributes:
        scale: least-squares factor: measured ~ scale * forecast.
        error: root mean square of (measured - scale * forecast), in nats per example.
        region: the largest distance (nats per example, `Products.distance`) up to which every probe's measured rise was
            within `tolerance` of scale * forecast; forecasts beyond it are flagged.
    """

    scale: float
    error: float
    region: float


def best_coefficients(
    products: Sequence[Products],
    importance: Mapping[str, float] | None = None,
    *,
    free: Sequence[str] | None = None,
    lower: float = 0.0,
    upper: float = math.inf,
    ridge: float = 1e-9,
) -> BestWeights:
    """argmin_c sum_t w_t rise_t(c) with lower <= c <= upper: a quadratic programme in K numbers.

    Args:
        products: one per task (and one for the base's own data where it should be kept).
        importance: task -> w_t; None: 1/N_t, so that every task's mean loss counts the same.
        free: directions that get a coefficient, the others stay at 0; None: all.
        lower: smallest coefficient.
        upper: largest coefficient.
        ridge: relative Tikhonov term; it settles directions that no task's loss can see.

    Raises:
        ValueError: no products, products on different directions, bounds in the wrong order, or a product that is not
            finite.
    """
    directions = check_products(products)
    if lower > upper:
        raise GradmatchError(f"lower bound {lower} is above the upper bound {upper}", "out_of_range")
    if importance is None:
        importance = {p.task: 1.0 / p.num_examples for p in products}
    k = len(directions)
    hessian, linear = np.zeros((k, k)), np.zeros(k)
    for p in products:
        w = importance.get(p.task, 0.0)
        hessian += w * p.curvature
        linear += w * (p.slope - p.curvature @ p.position)
    moving = [i for i, name in enumerate(directions) if free is None or name in free]
    hessian = ((hessian + hessian.T) / 2)[np.ix_(moving, moving)]
    hessian += np.eye(len(moving)) * (ridge * np.trace(hessian) / len(moving) + np.finfo(float).tiny)
    c = np.zeros(k)
    c[moving] = solve_box(hessian, linear[moving], lower, upper)
    rises = {p.task: p.rise(c) for p in products}
    return BestWeights(
        {directions[i]: float(c[i]) for i in moving},
        rises,
        all(p.trusted(c) for p in products),
        sum(importance.get(p.task, 0.0) * rises[p.task] for p in products),
    )


def solve_box(hessian: Array, linear: Array, lower: float, upper: float, sweeps: int = 10_000) -> Array:
    """argmin_c 1/2 c'Hc + b'c with lower <= c <= upper, by exact coordinate descent (H positive definite).

    hessian: (K, K), linear: (K,). Returns (K,). Converges to the only minimum; stops when no coordinate moves.
    """
    free = np.asarray(np.linalg.solve(hessian, -linear), dtype=np.float64)
    if (free >= lower).all() and (free <= upper).all():
        return free
    c: Array = np.clip(free, lower, upper)
    diagonal = np.diag(hessian)
    for _ in range(sweeps):
        before = c.copy()
        for i in range(len(c)):
            rest = linear[i] + hessian[i] @ c - diagonal[i] * c[i]
            c[i] = np.clip(-rest / diagonal[i], lower, upper)
        if np.abs(c - before).max() <= 1e-13 * (1 + np.abs(c).max()):
            break
    return c


def pareto_front(
    products: Sequence[Products], points: int = 21, *, lower: float = 0.0, upper: float = math.inf
) -> list[BestWeights]:
    """The weights that no other weights beat for every task: minima of all convex combinations of the mean losses.

    Args:
        products: of two or three tasks; convex quadratics, so that weighted sums reach the whole front.
        points: how finely the importance of each task is varied.
        lower: smallest coefficient.
        upper: largest coefficient.

    Raises:
        ValueError: not two or three tasks.
    """
    if len(products) not in (2, 3):
        raise GradmatchError(
            f"a Pareto front is drawn for two or three tasks, got {len(products)}", "bad_products"
        )
    front = []
    steps = points - 1
    for first in range(points):
        for second in range(points - first):
            shares = [first / steps, second / steps, (steps - first - second) / steps]
            if len(products) == 2:
                if second != steps - first:
                    continue
                shares = shares[:2]
            importance = {
                p.task: max(share, 1e-6) / p.num_examples for p, share in zip(products, shares, strict=True)
            }
            front.append(best_coefficients(products, importance, lower=lower, upper=upper))
    return front


def calibrate(
    product: Products, probes: Sequence[tuple[Array, float]], tolerance: float = 0.5
) -> Calibration:
    """Compare one task's forecasts with a few measured losses.

    Args:
        product: of the task.
        probes: (coefficients (K,), measured rise in nats summed over N) pairs, e.g. at the base and at the average.
        tolerance: relative error of scale * forecast up to which a probe counts as well forecast.

    Raises:
        ValueError: no probes.
    """
    if not probes:
        raise GradmatchError("no probes: measure the loss at one merge at least", "bad_products")
    forecasts = np.array([product.rise(c) for c, _ in probes])
    measured = np.array([m for _, m in probes])
    scale = float(forecasts @ measured / max(forecasts @ forecasts, 1e-300))
    error = (measured - scale * forecasts) / product.num_examples
    region = 0.0
    # A hundredth of a nat per example is noise of any loss; below it a relative error says nothing.
    allowed = np.maximum(tolerance * np.abs(measured) / product.num_examples, 0.01)
    for distance, fine in sorted(
        (product.distance(c), bool(abs(e) <= a)) for (c, _), e, a in zip(probes, error, allowed, strict=True)
    ):
        if not fine:
            break
        region = distance
    return Calibration(scale, float(np.sqrt(np.mean(error**2))), region)


def check_products(products: Sequence[Products]) -> tuple[str, ...]:
    """The directions that all products share.

    Raises:
        ValueError: none given, directions that differ, or values that are not finite (task named).
    """
    if not products:
        raise GradmatchError(
            "no products: measure them with data (`gradmatch forecast`) or give curvature files",
            "bad_products",
        )
    directions = products[0].directions
    for p in products:
        if p.directions != directions:
            raise GradmatchError(
                f"task {p.task!r} has directions {list(p.directions)}, {products[0].task!r} has {list(directions)}; "
                "measure all products together",
                "bad_products",
                p.task,
            )
        if not (np.isfinite(p.slope).all() and np.isfinite(p.curvature).all()):
            raise GradmatchError(
                f"the products of task {p.task!r} are not finite; a weight or the loss is NaN or Inf",
                "not_finite",
                p.task,
            )
    return directions
