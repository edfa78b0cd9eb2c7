"""The path of a removal: alpha -> forgetting, collateral, clamped share; forecast, and measured where data is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.checkpoint import open_checkpoint
from gradmatch.diagnosis.products import dot
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


@dataclass(frozen=True)
class Expansion:
    """A loss around the weights that minimised it, from data: theta0 for what must stay, theta_t for what is to go.

    Attributes:
        objective: the loss.
        at: the weights it is expanded at.
        tau: theta_t - theta0 where it is expanded at theta_t, else empty.
        gradient: of the summed loss there.
        own: tau'H tau, the same for every alpha.
        base_loss: the summed loss at theta0.
    """

    objective: Objective
    at: Mapping[str, Tensor]
    tau: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    own: float
    base_loss: float

    def rise(self, moved: Mapping[str, Tensor]) -> float:
        """Forecast of l(theta0 + d) - l(theta0) by exact GGN products, nats per example.

        g'd + 1/2 d'Hd at theta0; g'd + 1/2 (d - tau)'H(d - tau) - 1/2 tau'H tau at theta_t. One forward-mode derivative.
        """
        away = {name: d - self.tau[name] if name in self.tau else d for name, d in moved.items()}
        bend = 0.5 * (float(self.objective.ggn_products(self.at, [away])) - self.own)
        return (dot(moved, self.gradient) + bend) / self.objective.num_examples

    def measured(self, there: Mapping[str, Tensor]) -> float:
        """l(there) - l(theta0), nats per example."""
        return (self.objective.loss(there) - self.base_loss) / self.objective.num_examples


class AlphaPath:
    """Points of one problem's path, each alpha computed once; so is what the data says about the start."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[float, Point] = {}
        self.base: dict[str, Tensor] = {}
        self.kept = self.gone = None
        if problem.retain is not None or problem.remove is not None:
            self.base = {
                n: value for n, value in open_checkpoint(problem.base).items() if value.is_floating_point()
            }
        if problem.retain is not None:
            self.kept = self._expand(problem.retain, {})
        if problem.remove is not None:
            self.gone = self._expand(problem.remove, {piece.name: piece.tau for piece in problem.pieces()})

    def point(self, alpha: float) -> Point:
        """Forecast one alpha, and measure it where data is given."""
        if alpha not in self._known:
            self._known[alpha] = self._compute(alpha)
        return self._known[alpha]

    def _compute(self, alpha: float) -> Point:
        problem, moved = self.problem, {}
        collateral = forgetting = 0.0
        clamped = total = 0
        for piece in problem.pieces():
            d = problem.displacement(piece, alpha)
            if self.kept is None:
                collateral += taylor(d, piece.mean0, piece.gradient0)
            if self.gone is None:
                forgetting += taylor(d - piece.tau, piece.mean, piece.gradient)
                forgetting -= taylor(-piece.tau, piece.mean, piece.gradient)
            clamped += problem.clamped(piece, alpha)
            total += d.numel()
            if self.base:
                moved[piece.name] = d
        there = {name: value + moved[name] if name in moved else value for name, value in self.base.items()}
        return Point(
            alpha,
            self.gone.rise(moved) if self.gone else forgetting,
            self.kept.rise(moved) if self.kept else collateral,
            clamped / total,
            "ggn" if self.gone else "diagonal",
            "ggn" if self.kept else "diagonal",
            self.gone.measured(there) if self.gone else None,
            self.kept.measured(there) if self.kept else None,
        )

    def _expand(self, objective: Objective, tau: Mapping[str, Tensor]) -> Expansion:
        at = {name: value + tau[name] if name in tau else value for name, value in self.base.items()}
        own = float(objective.ggn_products(at, [tau])) if tau else 0.0
        return Expansion(objective, at, tau, objective.gradient(at), own, objective.loss(self.base))


def alpha_path(problem: Problem | AlphaPath, alphas: Sequence[float]) -> list[Point]:
    """The path alpha -> forecast forgetting, forecast collateral, clamped share; with data also what was measured.

    An `AlphaPath` instead of its problem keeps the points for a `budget` after it.

    Without data one pass over the files an alpha, tensor by tensor; with data also one forward-mode derivative and one
    forward pass over each set of it, with the model in memory, after one backward pass over each to begin with.

    Raises:
        ValueError: no alpha, or one that is negative or no finite number.
    """
    if not alphas or not all(math.isfinite(alpha) and alpha >= 0 for alpha in alphas):
        raise ValueError(f"alphas must be finite and not negative, at least one; got {list(alphas)}")
    path = problem if isinstance(problem, AlphaPath) else AlphaPath(problem)
    return [path.point(alpha) for alpha in alphas]


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
