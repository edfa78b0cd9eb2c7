"""The path of a removal: alpha -> forgetting, collateral, clamped share; forecast, and measured where data is given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.removal.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.measure.objective import Objective

SIDES = ("retain", "remove")
DERIVATIVE = 3  # what a forward-mode derivative costs, in forward passes: counted by the progress bar


@dataclass(frozen=True)
class Point:
    """What removing with one alpha does, forecast and (with data) measured. Losses in nats per example over the base's.

    Attributes:
        alpha: strength of the removal.
        forgetting: forecast rise of the loss on what is removed, or None where it was not asked for.
        collateral: forecast rise of the loss on what must stay, or None where the measured one settled it.
        clamped: share of coordinates where the guard replaced H0 - alpha H_t by keep * H0 (0 for other methods).
        forgetting_by, collateral_by: what the forecast used, "ggn" or "diagonal".
        measured_forgetting, measured_collateral: the same rises measured on the data, or None without data.
        beside: measured rises on other data that must stay, by name.
    """

    alpha: float
    forgetting: float | None
    collateral: float | None
    clamped: float
    forgetting_by: str
    collateral_by: str
    measured_forgetting: float | None = None
    measured_collateral: float | None = None
    beside: Mapping[str, float] = field(default_factory=dict)


def taylor(displacement: Tensor, h: Tensor, gradient: Tensor | None) -> float:
    """g'd + 1/2 d'Hd, the second-order rise of a loss along d, with a diagonal H and g = 0 where it is None.

    All of one shape; nats in the loss's units.
    """
    import torch

    d = displacement
    slope = 0.0 if gradient is None else float((gradient * d).sum(dtype=torch.float64))
    return slope + 0.5 * float((h * d).mul_(d).sum(dtype=torch.float64))


class Expansion:
    """A loss around the weights that minimised it, from data: theta0 for what must stay, theta_t for what is to go.

    Args:
        objective: the loss.
        base: theta0 by name.
        tau: theta_t - theta0 where it is expanded at theta_t, else empty.
    """

    def __init__(self, objective: Objective, base: Mapping[str, Tensor], tau: Mapping[str, Tensor]) -> None:
        self.objective, self.tau = objective, tau
        self.at = {name: value + tau[name] if name in tau else value for name, value in base.items()}
        self.base_loss = objective.loss(base)
        self._start = objective.expand(self.at, tau)[1:] if tau else (0.0, 0.0)

    def rise(self, moved: Mapping[str, Tensor]) -> float:
        """Forecast of l(theta0 + d) - l(theta0) by exact GGN products, nats per example.

        g'd + 1/2 d'Hd at theta0; g'd + 1/2 (d - tau)'H(d - tau) - 1/2 tau'H tau at theta_t. One forward-mode derivative,
        along u = d - tau, so that g'd = g'u + g'tau.
        """
        away = {name: d - self.tau[name] if name in self.tau else d for name, d in moved.items()}
        _, slope, bend = self.objective.expand(self.at, away)
        slope0, bend0 = self._start
        return (slope + slope0 + 0.5 * (bend - bend0)) / self.objective.num_examples

    def measured(self, there: Mapping[str, Tensor]) -> float:
        """l(there) - l(theta0), nats per example."""
        return (self.objective.loss(there) - self.base_loss) / self.objective.num_examples


class AlphaPath:
    """Points of one problem's path, each number computed once; so is what the data says about the start.

    Every alpha is the model that `gradmatch.subtract` makes; its losses are an `Objective`'s, its forecasts second-order expansions.

    Args:
        problem: what is removed from what, and how; everything that its headers tell is checked first.
        progress: show a progress bar, with the time that is left.

    Raises:
        ValueError: see `Problem.plan`; data on a module that does not have the tensors that move.
    """

    def __init__(self, problem: Problem, *, progress: bool = False) -> None:
        self.problem, self.progress = problem, progress
        self._bar: Any = None
        self._known: dict[float, Point] = {}
        self._diagonal: dict[float, dict[str, float | None]] = {}
        self._clamped: dict[float, float] = {}
        self._forecast: dict[tuple[str, float], float] = {}
        self._measured: dict[tuple[str, float], float] = {}
        self._last: tuple[float | None, dict[str, Tensor]] = (None, {})
        self._sides: dict[str, Expansion] = {}
        self._moving = [step.name for step in problem.plan.steps if step.merged]
        self.base: dict[str, Tensor] = {}
        self._data = problem.sides
        if self._data:
            base = problem.plan.inputs.base
            self.base = {name: base[name] for name in base if base.spec(name).floating}
        for side, objective in self._data.items():
            unknown = sorted(set(self._moving) - {name for name, _ in objective.module.named_parameters()})
            if unknown:
                raise GradmatchError(
                    f"the data to {side} runs through a {type(objective.module).__name__} without a parameter {unknown[0]!r}, which "
                    "the removal moves; build the objective on the base's own module",
                    "bad_request",
                    unknown[0],
                )

    def point(self, alpha: float) -> Point:
        """Forecast one alpha, and measure it where data is given."""
        return self.points([alpha])[0]

    def points(self, alphas: Sequence[float]) -> list[Point]:
        """Forecast every alpha, and measure it where data is given."""
        new = [alpha for alpha in dict.fromkeys(alphas) if alpha not in self._known]
        with self.working(self.passes(new, self._data), "path of alpha"):
            for alpha in new:
                numbers = {side: (self.forecast(side, alpha), self.measured(side, alpha)) for side in SIDES}
                (kept, kept_measured), (gone, gone_measured) = numbers["retain"], numbers["remove"]
                for name in self.problem.beside:
                    self.measured(name, alpha)
                self._known[alpha] = self._point(alpha, gone, kept, gone_measured, kept_measured)
        return [self._known[alpha] for alpha in alphas]

    def excess(
        self, alpha: float, nats: float | Mapping[str, float], *, whole: bool = False
    ) -> tuple[Point, str | None]:
        """Whether one alpha costs what must stay more than so many nats: the point, as far as that had to be known, and why.

        nats: for all data that must stay, or by name. The measured rises are asked first, which takes one forward pass each; the
        forecast only where they fit, unless the `whole` is asked for. A number that is not finite exceeds every budget.
        """
        limit = nats if isinstance(nats, Mapping) else dict.fromkeys(("retain", *self.problem.beside), nats)
        measured = self.measured("retain", alpha)
        bound = "measured collateral" if measured is not None and not measured <= limit["retain"] else None
        for name in self.problem.beside:
            rise = None if bound and not whole else self.measured(name, alpha)
            if not bound and rise is not None and not rise <= limit[name]:
                bound = f"measured rise on {name}"
        collateral = self._forecast.get(("retain", alpha)) if bound else self.forecast("retain", alpha)
        if collateral is not None and not collateral <= limit["retain"]:
            bound = bound or "collateral"
        forgetting = None if "remove" in self._data else self.forecast("remove", alpha)
        return self._known.get(alpha) or self._point(alpha, forgetting, collateral, None, measured), bound

    def forecast(self, side: str, alpha: float) -> float | None:
        """Forecast rise of one side's loss ("retain" or "remove"), nats per example: by its data, else by the diagonal, if there is one."""
        if side not in self._data:
            return self._of_diagonal(alpha)[side]
        if (side, alpha) not in self._forecast:
            there, expansion = self.tensors(alpha), self._side(side)
            self._forecast[side, alpha] = expansion.rise({n: there[n] - self.base[n] for n in self._moving})
            self._advance(DERIVATIVE)
        return self._forecast[side, alpha]

    def measured(self, side: str, alpha: float) -> float | None:
        """Measured rise of one side's loss, nats per example, or None without data."""
        if side not in self._data:
            return None
        if (side, alpha) not in self._measured:
            self._measured[side, alpha] = self._side(side).measured({**self.base, **self.tensors(alpha)})
            self._advance(1)
        return self._measured[side, alpha]

    def _point(
        self,
        alpha: float,
        forgetting: float | None,
        collateral: float | None,
        measured_forgetting: float | None,
        measured_collateral: float | None,
    ) -> Point:
        by = {side: "ggn" if side in self._data else "diagonal" for side in SIDES}
        if alpha not in self._clamped:
            self.tensors(alpha)
        clamped = self._clamped[alpha]
        beside = {
            name: self._measured[name, alpha]
            for name in self.problem.beside
            if (name, alpha) in self._measured
        }
        return Point(
            alpha, forgetting, collateral, clamped, by["remove"], by["retain"], measured_forgetting, measured_collateral, beside
        )  # fmt: skip

    def _of_diagonal(self, alpha: float) -> dict[str, float | None]:
        """Side -> forecast rise by the diagonal curvatures, nats per example: around theta0, or around theta_t; None without one."""
        if alpha not in self._diagonal:
            there = self.tensors(alpha)
            kept: float | None = 0.0
            gone: float | None = 0.0 if len(self.problem.tasks) == 1 else None
            for piece in self.problem.pieces():
                d = there[piece.name].to(piece.theta0) - piece.theta0
                if kept is not None:
                    kept = None if piece.mean0 is None else kept + taylor(d, piece.mean0, piece.gradient0)
                if gone is not None and piece.mean is not None:
                    gone += taylor(d - piece.tau, piece.mean, piece.gradient)
                    gone -= taylor(-piece.tau, piece.mean, piece.gradient)
                else:
                    gone = None
            self._diagonal[alpha] = {"retain": kept, "remove": gone}
        return self._diagonal[alpha]

    def tensors(self, alpha: float) -> dict[str, Tensor]:
        """The tensors that move, at one alpha; the last alpha's are kept."""
        if self._last[0] != alpha:
            self._last = (None, {})  # freed before the next is made
            made = self.problem.at(alpha)
            self._clamped[alpha] = made.report.clamped_share or 0.0
            self._last = (alpha, {name: made[name] for name in self._moving})
        return self._last[1]

    def _side(self, side: str) -> Expansion:
        """The expansion of one side's loss, made when it is first asked for."""
        if side not in self._sides:
            at_task = side == "remove" and len(self.problem.tasks) == 1 and self.problem.task is not None
            tau = {piece.name: piece.tau for piece in self.problem.pieces()} if at_task else {}
            self._sides[side] = Expansion(self._data[side], self.base, tau)
        return self._sides[side]

    def passes(self, alphas: Sequence[float], sides: Iterable[str] | None = None) -> int:
        """Forward passes over data, counted so, that all numbers of these alphas still take on these sides (by default what must stay)."""
        wanted = [side for side in self._data if side != "remove"] if sides is None else sides
        asked = [(side, alpha) for side in wanted if side in self._data for alpha in alphas]
        return sum(
            DERIVATIVE * (key[0] in SIDES and key not in self._forecast) + (key not in self._measured)
            for key in asked
        )

    @contextmanager
    def working(self, passes: int, title: str) -> Iterator[None]:
        """A progress bar over so many passes at most."""
        if not (self.progress and passes):
            yield
            return
        from tqdm import tqdm

        with tqdm(total=passes, desc=title, unit="pass") as self._bar:
            yield
            self._bar.total = self._bar.n  # fewer may have been enough
        self._bar = None

    def _advance(self, passes: int) -> None:
        if self._bar is not None:
            self._bar.update(passes)


def alpha_path(problem: Problem | AlphaPath, alphas: Sequence[float]) -> list[Point]:
    """The path alpha -> forecast forgetting, forecast collateral, clamped share; with data also what was measured.

    An `AlphaPath` instead of its problem keeps the points for a `budget` after it.

    Each alpha is one merge in memory; with data, also one forward-mode derivative and one forward pass over each set of it, with the
    model in memory four times.

    Raises:
        ValueError: no alpha, or one that is negative or no finite number.
    """
    check_alphas(alphas)
    path = problem if isinstance(problem, AlphaPath) else AlphaPath(problem)
    return path.points(alphas)


def check_alphas(alphas: Sequence[float]) -> None:
    """Refuse what is no path.

    Raises:
        ValueError: no alpha, or one that is negative or no finite number.
    """
    if not alphas or not all(math.isfinite(alpha) and alpha >= 0 for alpha in alphas):
        raise GradmatchError(
            f"alphas must be finite and not negative, at least one; got {list(alphas)}",
            "out_of_range",
            "alphas",
        )


def path_table(points: Sequence[Point]) -> str:
    """The path as text: one line an alpha; measured rises in brackets."""

    def cell(value: float | None, by: str, measured: float | None) -> str:
        forecast = f"{'-':>12}" if value is None else f"{value:12.4f}"
        return forecast + (f" [{measured:10.4f}]" if measured is not None else " " * 13) + f" {by:8}"

    lines = [
        f"{'alpha':>8} {'forgetting':>12}{'[measured]':>13} {'by':8} {'collateral':>12}{'[measured]':>13} {'by':8} clamped"
    ]
    for p in points:
        gone = cell(p.forgetting, p.forgetting_by, p.measured_forgetting)
        kept = cell(p.collateral, p.collateral_by, p.measured_collateral)
        also = "".join(f", {name} [{rise:.4f}]" for name, rise in p.beside.items())
        lines.append(f"{p.alpha:8.3f} {gone} {kept} {p.clamped:7.2%}{also}")
    return "\n".join(lines) + "\nrises of the loss over the base's, nats per example"
