"""Selective merging: one greedy climb, and the strategies that say which candidates it tries (Model-GLUE, Zhao et al. 2024).

A merge is a set of weights over the models that sum to 1. The climb starts from the best single model; in each round a strategy proposes
mixtures of what stands with one more model, and the best of them is taken where the score does not fall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Task
from gradmatch.zoo.finding import Models, find
from gradmatch.zoo.forecasts import Forecast, forecasts
from gradmatch.zoo.judge import Judge, OutOfBudget, Score
from gradmatch.zoo.pairs import aligned, compare
from gradmatch.zoo.strategies import STRATEGIES, Likeness, Strategy, Weights

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model


@dataclass(frozen=True)
class Selection:
    """What a search chose.

    Attributes:
        tasks: the chosen models with their weights, as `merge` takes them.
        weights: name -> weight of the same; they sum to 1.
        score: of their merge; larger is better.
        left_out: name -> why a model takes no part.
        history: every evaluation and choice, as in the log.
        evaluations: how many there were, those of earlier runs over the log included.
        complete: whether the search came to its end, or the budget to its own.
        strategy: its name.
        method: the rule of the merges.
        options: of the rule, where the search chose some.
        notes: what else is to be known.
    """

    base: Checkpoint = field(repr=False)
    tasks: list[Task]
    weights: Weights
    score: float
    left_out: dict[str, str]
    history: list[dict[str, Any]] = field(repr=False)
    evaluations: int
    complete: bool
    strategy: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def merge(self, out: Any = None, **options: Any) -> Mapping[str, Any]:
        """The chosen merge, in memory or written to a folder. Further arguments as of `gradmatch.merge`."""
        from gradmatch.merging import merge

        notes = [
            f"chosen by gradmatch zoo ({self.strategy}, {self.evaluations} evaluations): score {self.score:g}"
        ]
        given = {"notes": notes, "method": self.method, **self.options, **options}
        return merge(self.base, self.tasks, out=out, **given)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        told = (
            "strategy",
            "method",
            "options",
            "weights",
            "score",
            "left_out",
            "evaluations",
            "complete",
            "notes",
        )
        return {name: getattr(self, name) for name in told}

    def summary(self) -> str:
        """The choice as text."""
        end = "" if self.complete else ", where the budget ended"
        lines = [f"{self.strategy}: score {self.score:.6g} after {self.evaluations} evaluations{end}"]
        lines += [f"  {name}: {weight:.4g}" for name, weight in self.weights.items()]
        lines += [f"  left out {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join([*lines, *self.notes])


def select(
    base: Model,
    tasks: Models,
    score: Score,
    strategy: str = "average",
    *,
    budget: int | None = None,
    method: str = "linear",
    log: Any = None,
    forecast: bool | None = None,
    worse: float = 0.05,
    allow_pickle: bool = False,
    progress: bool = False,
    **options: Any,
) -> Selection:
    """Choose which models to merge, and with what weights, by the score of their merges.

    Args:
        base: the model that they were fine-tuned from.
        tasks: the candidates: tasks, models by name, folders of models.
        score: state dict -> a number, larger is better, on data that nothing else is reported on. See `gradmatch.zoo.scores` for scores of files
            of examples and of lm-eval's tasks.
        strategy: "average" (best first alone, mean of those that were taken; the greedy soup of Wortsman et al. 2022 by another name, "greedy_soup"),
            "coefficient" (best first, and the share of what stands is tried from .1 to .9), "most_similar" and "least_similar" (the next candidate by the
            cosine of its task vector with that of what stands), "exhaustive" (every round tries all that are left: n (n + 1) / 2 evaluations at most).
        budget: how many evaluations there may be; when they are used up, what stands is the answer.
        method: the rule of the merges, whose weights are searched.
        log: a file of JSON lines with every score, choice and price; a search that was stopped goes on where it is given the same one.
        forecast: use the tasks' curvature files: singles are ordered by forecast instead of being evaluated, of the shares of "coefficient" the one
            that the forecast likes best is evaluated, and candidates that are forecast to cost more than `worse` are not. None: where every task
            has one.
        worse: nats per example of the median task, from which a candidate is forecast to do harm.
        allow_pickle: read .bin and .pt files too.
        progress: show a progress bar.
        **options: of the rule, and policies of `gradmatch.merge`.

    Returns:
        The chosen tasks and weights with their score, history, and why the others were left out.

    Raises:
        GradmatchError: an unknown strategy, a budget below 1, a log of another search, or no candidate that has a score.
        TypeError: a score that cannot be called.

    >>> import torch
    >>> base, target = {"w": torch.zeros(2)}, torch.tensor([1.0, 1.0])
    >>> zoo = {"a": {"w": torch.tensor([2.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}, "c": {"w": torch.tensor([-9.0, 9.0])}}
    >>> found = select(base, zoo, lambda merged: -float((merged["w"] - target).norm()))
    >>> found.weights, list(found.left_out)
    ({'a': 0.5, 'b': 0.5}, ['c'])
    """
    choose("strategy", strategy, STRATEGIES)
    opened = open_checkpoint(base, allow_pickle=allow_pickle)
    found = find(tasks, opened, allow_pickle=allow_pickle)
    given = {name: replace(task, model=found.opened[name]) for name, task in found.tasks.items()}
    judge = Judge(
        opened, given, score, method=method, options=options, budget=budget, log=log,
        about={"search": "select", "strategy": strategy},
    )  # fmt: skip
    try:
        with _bar(len(given), budget, progress) as advance:
            climb = Climb(judge, STRATEGIES[strategy], strategy, advance)
            if forecast or (forecast is None and all(task.curvature is not None for task in given.values())):
                climb.forecast = Forecast(
                    forecasts(opened, aligned(found.opened, opened), found.tasks), worse
                )
            return climb.up()
    finally:
        judge.journal.close()


class Climb:
    """One greedy climb. `up` returns what it came to."""

    def __init__(self, judge: Judge, strategy: Strategy, name: str, advance: Callable[[], object]) -> None:
        self.judge, self.strategy, self.name, self.advance = judge, strategy, name, advance
        self.forecast: Forecast | None = None
        self.left_out: dict[str, str] = {}
        self.tried: dict[str, str] = {}
        self.weights: Weights = {}
        self.score = -np.inf
        self.complete = True

    def up(self) -> Selection:
        """Climb to the end, or to that of the budget."""
        names = list(self.judge.tasks)
        try:
            order = self._alone(names)
            self._rounds(order)
        except OutOfBudget:
            self.complete = False
        if not self.weights:
            why = (
                "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()) or "the budget ended"
            )
            raise GradmatchError(f"no candidate has a score ({why})", "no_score")
        for name in names:
            if name not in self.weights:
                self.left_out.setdefault(name, self.tried.get(name, "the budget ended before it was tried"))
        tasks = [
            replace(self.judge.tasks[name], weight=weight, name=name) for name, weight in self.weights.items()
        ]
        self.judge.journal.add(
            "result", weights=self.weights, score=self.score, complete=self.complete, left_out=self.left_out
        )
        return Selection(
            self.judge.base, tasks, self.weights, self.score, self.left_out, self.judge.journal.lines, self.judge.spent,
            self.complete, self.name, self.judge.method,
        )  # fmt: skip

    def _one(self, weights: Weights) -> float | None:
        """One evaluation.

        Raises:
            GradmatchError: several scores.
        """
        values = self.judge(weights)
        self.advance()
        if values is not None and len(values) > 1:
            raise GradmatchError(
                f"the score is {len(values)} numbers; a selection climbs by one, use the sum, or `evolve` with method='nsga2'",
                "bad_choice",
            )
        return None if values is None else values[0]

    def _alone(self, names: Sequence[str]) -> list[str]:
        """The candidates in their order, best first; the first of them stands."""
        if self.forecast is not None:
            order = sorted(names, key=lambda name: (self.forecast.cost({name: 1.0}), name))  # type: ignore[union-attr]
            for name in order:
                score = self._one({name: 1.0})
                if score is not None:
                    self._stand({name: 1.0}, score, name)
                    break
                self.left_out[name] = self.judge.why({name: 1.0})
            return [name for name in order if name not in self.weights and name not in self.left_out]
        scores: dict[str, float] = {}
        for name in names:
            try:
                score = self._one({name: 1.0})
            except OutOfBudget:
                self.complete = False
                break
            if score is None:
                self.left_out[name] = self.judge.why({name: 1.0})
            else:
                scores[name] = score
        order = sorted(scores, key=lambda name: (-scores[name], name))
        if order:
            self._stand({order[0]: 1.0}, scores[order[0]], order[0])
        if not self.complete:
            raise OutOfBudget
        return order[1:]

    def _rounds(self, left: list[str]) -> None:
        alike = self._likeness() if self.strategy.likens else lambda _, __: 0.0
        while left:
            tried = list(self.strategy.order(left, self.weights, alike))
            best: tuple[float, Weights, str] | None = None
            for name in tried:
                for weights in self._promising(name):
                    score = self._one(weights)
                    if score is not None and (best is None or score > best[0]):
                        best = score, weights, name
                    told = "refused: " + self.judge.why(weights) if score is None else ""
                    if score is not None and score < self.score:
                        told = f"the score falls from {self.score:.6g} to {score:.6g}"
                    self.tried[name] = told
            if best is not None and best[0] >= self.score:
                self._stand(best[1], best[0], best[2])
                left = (
                    [name for name in left if name != best[2]]
                    if self.strategy.again
                    else [n for n in left if n not in tried]
                )
            elif self.strategy.again:
                return
            else:
                self.judge.journal.add(
                    "choice", model=tried[0], taken=False, why=self.tried.get(tried[0], "")
                )
                left = [name for name in left if name not in tried]

    def _stand(self, weights: Weights, score: float, name: str) -> None:
        self.weights, self.score = weights, score
        self.judge.journal.add(
            "choice", model=name, taken=True, weights=weights, score=score, spent=self.judge.spent
        )

    def _promising(self, name: str) -> Iterator[Weights]:
        """The mixtures of a round that are evaluated: all, or where there is a forecast, the best of them if it does no harm."""
        proposed = self.strategy.mixtures(self.weights, len(self.weights), name)
        if self.forecast is None:
            yield from proposed
            return
        costs = [self.forecast.cost(weights) for weights in proposed]
        best = int(np.argmin(costs))
        now = self.forecast.cost(self.weights)
        if costs[best] - now > self.forecast.worse:
            self.tried[name] = (
                f"it is forecast to cost the median task {costs[best] - now:.3g} nats an example more, and was not evaluated"
            )
            self.judge.journal.add("forecast", model=name, weights=proposed[best], cost=costs[best], now=now)
            return
        yield proposed[best]

    def _likeness(self) -> Likeness:
        """Cosine of the task vector of a mixture with that of a model, from products of all pairs: no mixture is made for it."""
        models = {name: task.model for name, task in self.judge.tasks.items()}
        pairs = compare(aligned(models, self.judge.base), self.judge.base)  # type: ignore[arg-type]
        assert pairs.tau_dot is not None
        gram, place = pairs.tau_dot, {name: n for n, name in enumerate(pairs.names)}

        def alike(standing: Weights, name: str) -> float:
            c = np.zeros(len(place))
            for own, weight in standing.items():
                c[place[own]] = weight
            scale = np.sqrt(max(c @ gram @ c, 0.0) * gram[place[name], place[name]])
            return float(gram[place[name]] @ c / scale) if scale > 0 else 0.0

        return alike


def _bar(count: int, budget: int | None, shown: bool) -> Any:
    """A progress bar over evaluations; as a context a function that moves it by one."""
    from contextlib import contextmanager

    @contextmanager
    def bar() -> Any:
        if not shown:
            yield lambda: None
            return
        from tqdm import tqdm

        with tqdm(total=budget, unit="merge", desc=f"choosing among {count}") as one:
            yield lambda: one.update(1)

    return bar()
