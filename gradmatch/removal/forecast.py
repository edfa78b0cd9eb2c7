"""The path of a removal: alpha -> forgetting, collateral, clamped share; forecast, and measured where data is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.checkpoint import open_checkpoint
from gradmatch.removal.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.diagnosis.objective import Objective


@dataclass(frozen=True)
class Point:
    """What removing with one alpha does, forecast and (with data) measured. Losses in nats per example over the base's.

    Attributes:
        alpha: strength of the removal.
        forgetting: forecast rise of the loss on what is removed.
        collateral: forecast rise of the loss on what must stay.
        clamped: share of coordinates where the guard replaced H0 - alpha H_t by keep * H0 (0 for other methods).
        forgetting_by, collateral_by: what the forecast used, "ggn" or "diagonal".
        measured_forgetting, measured_collateral: the same rises measured on the data, or None without data.
    """

    alpha: float
    forgetting: float
    collateral: float
    clamped: float
    forgetting_by: str
    collateral_by: str
    measured_forgetting: float | None = None
    measured_collateral: float | None = None


def taylor(displacement: Tensor, h: Tensor, gradient: Tensor | None) -> float:
    """g'd + 1/2 d'Hd, the second-order rise of a loss along d, with a diagonal H and g = 0 where it is None.

    All of one shape; nats in the loss's units.
    """
    d = displacement.double()
    slope = 0.0 if gradient is None else float((gradient.double() * d).sum())
    return slope + 0.5 * float((h.double() * d.square()).sum())


def alpha_path(problem: Problem, alphas: Sequence[float]) -> list[Point]:
    """The path alpha -> forecast forgetting, forecast collateral, clamped share; with data also what was measured.

    Without data one pass over the files, tensor by tensor; with data one forward-mode derivative and one forward pass over
    it for each alpha, with the model in memory.

    Raises:
        ValueError: no alpha, or one that is negative or no finite number.
    """
    if not alphas or not all(math.isfinite(alpha) and alpha >= 0 for alpha in alphas):
        raise ValueError(f"alphas must be finite and not negative, at least one; got {list(alphas)}")
    collateral, forgetting, clamped = ([0.0] * len(alphas) for _ in range(3))
    total = 0
    for piece in problem.pieces():
        total += piece.tau.numel()
        at_base = taylor(-piece.tau, piece.mean, piece.gradient)
        for index, alpha in enumerate(alphas):
            d = problem.displacement(piece, alpha)
            collateral[index] += taylor(d, piece.mean0, piece.gradient0)
            forgetting[index] += taylor(d - piece.tau, piece.mean, piece.gradient) - at_base
            if problem.method == "removal":
                clamped[index] += int((piece.h0 - alpha * piece.h < problem.keep * piece.h0).sum())
    points = []
    for index, alpha in enumerate(alphas):
        kept, kept_by, measured_kept = _with_data(problem, alpha, problem.retain, at_task=False)
        gone, gone_by, measured_gone = _with_data(problem, alpha, problem.remove, at_task=True)
        points.append(
            Point(
                alpha,
                forgetting[index] if gone is None else gone,
                collateral[index] if kept is None else kept,
                clamped[index] / total,
                gone_by,
                kept_by,
                measured_gone,
                measured_kept,
            )
        )
    return points


def _with_data(
    problem: Problem, alpha: float, objective: Objective | None, *, at_task: bool
) -> tuple[float | None, str, float | None]:
    """(forecast, what it used, measured rise) on data, in nats per example; (None, "diagonal", None) without data.

    The loss is expanded where it was minimised: at theta0 for what must stay, at theta_t for what is removed.
    """
    if objective is None:
        return None, "diagonal", None
    base = {name: value for name, value in open_checkpoint(problem.base).items() if value.is_floating_point()}
    moved = {piece.name: problem.displacement(piece, alpha) for piece in problem.pieces()}
    tau = {piece.name: piece.tau for piece in problem.pieces()} if at_task else {}
    at = {name: value + tau[name] if name in tau else value for name, value in base.items()}
    directions = [moved, tau] if at_task else [moved]
    products = objective.ggn_products(at, directions) / objective.num_examples
    gradient = objective.gradient(at)
    slope = sum(
        float((gradient[name].double() * d.double()).sum()) for name, d in moved.items() if name in gradient
    )
    forecast = slope / objective.num_examples + 0.5 * float(products[0, 0])
    if at_task:  # (d - tau)'H(d - tau) - tau'H tau = d'Hd - 2 d'H tau
        forecast -= float(products[0, 1])
    there = {name: value + moved[name] if name in moved else value for name, value in base.items()}
    measured = (objective.loss(there) - objective.loss(base)) / objective.num_examples
    return forecast, "ggn", measured


def path_table(points: Sequence[Point]) -> str:
    """The path as text: one line an alpha; measured rises in brackets."""

    def cell(value: float, by: str, measured: float | None) -> str:
        return f"{value:12.4f}" + (f" [{measured:10.4f}]" if measured is not None else " " * 13) + f" {by:8}"

    lines = [
        f"{'alpha':>8} {'forgetting':>12}{'[measured]':>13} {'by':8} {'collateral':>12}{'[measured]':>13} {'by':8} clamped"
    ]
    for p in points:
        gone = cell(p.forgetting, p.forgetting_by, p.measured_forgetting)
        kept = cell(p.collateral, p.collateral_by, p.measured_collateral)
        lines.append(f"{p.alpha:8.3f} {gone} {kept} {p.clamped:7.2%}")
    return "\n".join(lines) + "\nrises of the loss over the base's, nats per example"
