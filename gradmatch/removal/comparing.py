"""Which strength and damping to use within a budget on everything that must stay, and what the other methods do with the same budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gradmatch.removal.forecast import AlphaPath, Point
from gradmatch.removal.limits import Budget, budget
from gradmatch.removal.numbers import Loss, measured_loss
from gradmatch.removal.problem import Problem
from gradmatch.rules import RULES

if TYPE_CHECKING:
    from gradmatch.models.task import Task

DAMPINGS = (0.1,)


@dataclass(frozen=True)
class Choice:
    """What one method does within a budget.

    Attributes:
        problem: the method with the option that was chosen.
        budget: the strength, and what stopped it.
        damping: lambda as a share of the mean of H0's diagonal; None where the method has none.
        before, after: the loss on each data set that was given, of the base and of the edited model.
        tried: damping -> (alpha, measured or forecast rise on what is to go, nats an example).
        point: all that is known at the strength; None where nothing fits.
    """

    problem: Problem
    budget: Budget
    damping: float | None
    before: Mapping[str, Loss]
    after: Mapping[str, Loss]
    tried: Mapping[float, tuple[float, float | None]]
    point: Point | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        losses = {
            name: {"before": told(self.before[name]), "after": told(after)}
            for name, after in self.after.items()
        }
        return {
            "method": self.problem.method,
            "alpha": self.budget.alpha,
            "bound": self.budget.bound,
            "damping": self.damping,
            "tried": [
                {"damping": damping, "alpha": alpha, "forgetting": rise}
                for damping, (alpha, rise) in self.tried.items()
            ],
            "losses": losses,
        }


def told(loss: Loss) -> dict[str, Any]:
    """A loss for JSON, which has no infinity."""
    return {key: value if math.isfinite(value or 0) else None for key, value in asdict(loss).items()} | {
        "perplexity": loss.perplexity if loss.tokens and math.isfinite(loss.perplexity) else None
    }


def choose(
    problem: Problem,
    nats: float | Mapping[str, float],
    *,
    dampings: Sequence[float] = DAMPINGS,
    share: float = 0.01,
    steps: int | Sequence[float] = 4,
    largest: float = 2.0,
    path: AlphaPath | None = None,
    progress: bool = False,
) -> Choice:
    """The largest alpha within a budget, for the damping that then forgets most (measured where data to remove is given).

    Args:
        problem: what is removed, from what and how.
        nats: as for `budget`.
        dampings: lambdas to try, for methods that have one.
        share: as for `budget`.
        steps: as for `budget`.
        largest: as for `budget`; of "ascent", whose alpha has no natural scale, it is raised tenfold while it fits.
        path: of this problem, whose points are then not computed again.
        progress: show a progress bar.

    Raises:
        ValueError: as `budget`.
    """
    rule = RULES[problem.method]
    best: tuple[float, Budget, AlphaPath, float | None] | None = None
    tried: dict[float, tuple[float, float | None]] = {}
    for damping in dampings if rule.damped else (None,):
        own = (
            problem if damping is None else replace(problem, options={**problem.options, "damping": damping})
        )
        walked = path if path and own.options == path.problem.options else AlphaPath(own, progress=progress)
        found = widened(walked, nats, share, largest, steps)
        rise = None
        if found.alpha:
            rise = walked.measured("remove", found.alpha)
            rise = walked.forecast("remove", found.alpha) if rise is None else rise
        if damping is not None:
            tried[damping] = (found.alpha, rise)
        worth = -math.inf if not found.alpha else found.alpha if rise is None else rise
        if best is None or worth > best[0]:
            best = worth, found, walked, damping
    assert best is not None  # there is a damping, or None in its place
    _, found, walked, damping = best
    before, after = losses(walked, found.alpha)
    point = walked.point(found.alpha) if found.alpha else None
    return Choice(walked.problem, found, damping, before, after, tried, point)


def widened(
    path: AlphaPath,
    nats: float | Mapping[str, float],
    share: float,
    largest: float,
    steps: int | Sequence[float],
) -> Budget:
    """`budget`; of an ascent, whose alpha has no natural scale, up to strengths that the budget stops."""
    found = budget(path, nats, share=share, largest=largest, steps=steps)
    if "gradient" not in RULES[path.problem.method].needs:
        return found
    for _ in range(8):
        if found.alpha and found.bound == "largest":
            largest *= 10
        elif not found.alpha:
            largest /= 1000
        else:
            break
        found = budget(path, nats, share=share, largest=largest, steps=4)
    return found


def losses(path: AlphaPath, alpha: float) -> tuple[dict[str, Loss], dict[str, Loss]]:
    """Every data set's loss before and after, with intervals."""
    sides = path.problem.sides
    if not sides:
        return {}, {}
    edited = {**path.base, **path.tensors(alpha)} if alpha else path.base
    before = {name: measured_loss(one, path.base) for name, one in sides.items()}
    return before, {name: measured_loss(one, edited) for name, one in sides.items()}


def possible(problem: Problem, tasks: Sequence[Task], gradient: object) -> list[str]:
    """The methods for which everything is there, negation first."""
    has = {
        "curvature": all(task.curvature is not None for task in tasks),
        "base_curvature": problem.base_curvature is not None,
        "gradient": gradient is not None,
    }
    names = ("negation", "guarded", "ascent", "removal", "ewr", "fisher_negation")
    return [
        name
        for name in names
        if all(has[need] for need in RULES[name].needs) and (tasks or "gradient" in RULES[name].needs)
    ]


def compared(
    problem: Problem,
    nats: float | Mapping[str, float],
    *,
    tasks: Sequence[Task] = (),
    gradient: Any = None,
    but: Sequence[Choice] = (),
    **how: Any,
) -> list[Choice]:
    """Every method that is possible, within the same budget; negation first.

    Args:
        problem: the data, the base's curvature, and what all methods share.
        nats: as for `budget`.
        tasks: of the methods that go by a task; none: the problem's own.
        gradient: of "ascent"; None: the problem's own.
        but: what is known already.
        **how: as for `choose`.
    """
    found = []
    known = {choice.problem.method: choice for choice in but}
    own = list(tasks) or ([] if problem.task is None else problem.tasks)
    gradient = problem.gradient if gradient is None else gradient
    for method in possible(problem, own, gradient):
        if method in known:
            found.append(known[method])
            continue
        climbs = "gradient" in RULES[method].needs
        options = {key: value for key, value in problem.options.items() if key in RULES[method].options}
        other = replace(
            problem, method=method, options=options, task=None if climbs else own, gradient=gradient if climbs else None
        )  # fmt: skip
        found.append(choose(other, nats, **{**how, "path": None}))
    return found


def comparison_table(choices: Sequence[Choice]) -> str:
    """One line a method: strength, and every data set's rise and perplexity."""
    names = list(choices[0].after)
    head = f"{'method':16} {'alpha':>9} {'damping':>8}" + "".join(
        f" {name + ' rise':>16} {'ppl':>8}" for name in names
    )
    lines = [head]
    for choice in choices:
        damping = "" if choice.damping is None else f"{choice.damping:g}"
        line = f"{choice.problem.method:16} {choice.budget.alpha:9.4g} {damping:>8}"
        for name in names:
            before, after = choice.before[name], choice.after[name]
            line += (
                f" {after.mean - before.mean:+16.4f} {after.perplexity if after.tokens else math.nan:8.2f}"
            )
        lines.append(line + ("" if choice.budget.alpha else "  nothing fits"))
    unit = "token" if names and choices[0].after[names[0]].tokens else "example"
    return (
        "\n".join(lines)
        + f"\nrises of the loss over the base's, nats a{'n' if unit == 'example' else ''} {unit}"
    )
