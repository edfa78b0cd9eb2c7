"""One worker of an evolutionary search: it asks for candidates, tries them, takes over from workers that are gone, and reads the result."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.zoo.forecasts import Forecast
from gradmatch.zoo.judge import Judge, Values
from gradmatch.zoo.selecting import Climb, Selection
from gradmatch.zoo.space import Candidate, Point, Space
from gradmatch.zoo.storage import lost, open_storage, open_study, signs_of_life, worker
from gradmatch.zoo.strategies import STRATEGIES

SIGMA0 = 1 / 6
STALE, SURPLUS = "its worker is gone", "one more than was asked for"  # of trials that do not count


@dataclass(frozen=True)
class Evolution(Selection):
    """What a search found; see `Selection`, and beside it:

    Attributes:
        scores: of the best, one an objective, by name.
        front: with several objectives, the candidates that no other beats in all: weights, options, scores by name.
        trials: how many there were, of all workers.
    """

    scores: dict[str, float] = field(default_factory=dict)
    front: list[dict[str, Any]] = field(default_factory=list)
    trials: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return super().to_dict() | {"scores": self.scores, "front": self.front, "trials": self.trials}

    def figure(self, path: Any) -> None:
        """Draw all trials and the Pareto front of the first two objectives, as the ending of the path says (.svg, .png, .pdf).

        Raises:
            GradmatchError: fewer than two objectives.
        """
        if len(self.scores) < 2:
            raise GradmatchError("a Pareto front needs two objectives; this search has one", "bad_choice")
        from matplotlib.figure import Figure

        names = list(self.scores)[:2]
        drawn = Figure(figsize=(5, 4), layout="constrained")
        axes = drawn.subplots()
        tried = [line["score"] for line in self.history if line.get("score")]
        axes.scatter([s[0] for s in tried], [s[1] for s in tried], s=12, color="0.7", label="trials")
        best = sorted((one["scores"][names[0]], one["scores"][names[1]]) for one in self.front)
        axes.plot([x for x, _ in best], [y for _, y in best], "o-", color="C0", label="Pareto front")
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.legend()
        drawn.savefig(path)


class Search:
    """One worker of a search. `open`, `begin`, `run`, `result`, in this order."""

    def __init__(
        self, judge: Judge, space: Space, method: str, seed: int, population: int | None, sigma0: float
    ) -> None:
        self.judge, self.space, self.method, self.seed = judge, space, method, seed
        self.bounds = space.bounds()
        n = len(self.bounds)
        least = 4 + math.floor(3 * math.log(n)) if n > 1 else 4
        self.population = population or (least if method == "cmaes" else max(10, least))
        if self.population < 2:
            raise GradmatchError(
                f"population is {population}; a generation needs at least 2", "out_of_range", "population"
            )
        self.sigma0 = sigma0
        self.forecast: Forecast | None = None
        self.origin: Point | None = None
        self.spent = 0

    def open(self, storage: Any, name: str) -> None:
        """Open the storage and the study in it."""
        self.storage = open_storage(storage)
        self.count = len(getattr(self.judge.score, "names", ()) or ()) if self.method == "nsga2" else 1
        if self.method == "nsga2" and not self.count:
            first = self.judge(self.space.candidate(self.space.start()).weights)
            self.count = len(first or (0.0, 0.0))
        if self.method == "nsga2" and self.count < 2:
            raise GradmatchError(
                "method is 'nsga2', and the score is one number; return several, or use method='cmaes'",
                "bad_choice",
                "method",
            )
        about = {**self.judge.about, **self.space.told(), "search": self.method, "objectives": self.count}
        self.study, self.made = open_study(
            self.storage, name, json.loads(json.dumps(about)), self.count, None
        )
        states = self.study.get_trials(deepcopy=False)
        own = self.seed
        if not self.made:  # another stream than those that were drawn from already
            own = zlib.crc32(f"{self.seed} {len(states)} {socket.gethostname()} {os.getpid()}".encode())
        self.own = own

    def begin(self, start: Any) -> None:
        """Settle where the search begins: what the study says, else what is asked for."""
        from optuna.samplers import CmaEsSampler, NSGAIISampler

        stored = self.study.user_attrs.get("start")
        if stored is None:
            self.origin = self._start(start)
            stored = self.study.user_attrs.get("start")
            if stored is None:
                self.study.set_user_attr("start", self.origin or {})
                if self.origin is not None:
                    self.study.enqueue_trial(self.origin)
                stored = self.origin
        self.origin = stored or None
        if self.method == "cmaes":
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # x0 and sigma0 stay until Optuna 6, which is not allowed yet
                self.study.sampler = CmaEsSampler(
                    x0=self.origin,
                    sigma0=self.sigma0,
                    popsize=self.population,
                    seed=self.own,
                    warn_independent_sampling=False,
                )
        else:
            self.study.sampler = NSGAIISampler(population_size=self.population, seed=self.own)

    def _start(self, start: Any) -> Point | None:
        if isinstance(start, Selection):
            start = start.weights
        if isinstance(start, Mapping):
            return self.space.start(start)
        choose("start", start, ("uniform", "random", *STRATEGIES))
        if start == "random":
            return None
        if start == "uniform" or self.count > 1:
            return self.space.start()
        climb = Climb(self.judge, STRATEGIES[start], start, lambda: None)
        weights = climb.up().weights
        self.spent = self.judge.spent
        return self.space.start(weights)

    def run(self, trials: int, advance: Callable[[int], object]) -> None:
        """Try candidates until the study has as many as were asked for."""
        shown = 0
        while True:
            self._take_over()
            counted = self._counted()
            ended = sum(trial.state.is_finished() for trial in counted)
            advance(min(ended, trials) - shown)
            shown = max(shown, min(ended, trials))
            if ended >= trials:
                return
            if len(counted) >= trials:  # the last ones run elsewhere
                time.sleep(0.2)
                continue
            self._try(trials)

    def _try(self, trials: int) -> None:
        """One trial, told whatever comes of it but a kill."""
        from optuna.distributions import FloatDistribution
        from optuna.trial import TrialState

        trial = self.study.ask({name: FloatDistribution(*pair) for name, pair in self.bounds.items()})
        self.storage.set_trial_user_attr(trial._trial_id, "worker", worker())
        rank = sum(one.number < trial.number for one in self._counted())
        if rank >= trials:
            trial.set_user_attr("why", SURPLUS)
            self.study.tell(trial, state=TrialState.FAIL)
            return
        try:
            with signs_of_life(self.storage, trial._trial_id):
                values, why, pruned = self._values(trial.params)
        except BaseException:  # interrupted: this process lives on, and nobody would ever take the trial over
            trial.set_user_attr("why", STALE)
            self.study.tell(trial, state=TrialState.FAIL)
            self.study.enqueue_trial(dict(trial.params))
            raise
        if values is None:
            trial.set_user_attr("why", why)
            self.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
        else:
            self.study.tell(trial, list(values))

    def _values(self, point: Point) -> tuple[Values | None, str, bool]:
        """(scores or None, why there are none, whether the forecast spared the evaluation)."""
        try:
            candidate = self.space.candidate(point)
        except GradmatchError as error:
            return None, str(error), False
        if self.forecast is not None and self.origin is not None and point != self.origin:
            now = self.forecast.cost(self.space.candidate(self.origin).weights)
            cost = self.forecast.cost(candidate.weights)
            if cost - now > self.forecast.worse:
                return (
                    None,
                    f"forecast to cost the median task {cost - now:.3g} nats an example more than the start",
                    True,
                )
        values = self.judge.score_of(candidate.weights, candidate.options, candidate.own)
        if isinstance(values, str):
            return None, values, False
        if len(values) != self.count:
            return None, f"its score is {len(values)} numbers, and there are {self.count} objectives", False
        return values, "", False

    def _take_over(self) -> None:
        """Fail the trials of workers that are gone, and queue what they were trying."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            if not lost(trial.user_attrs.get("worker", {}), float(trial.user_attrs.get("beat", begun))):
                continue
            try:
                self.storage.set_trial_user_attr(trial._trial_id, "why", STALE)
                if self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL) is False:
                    continue
            except (RuntimeError, KeyError):  # optuna's: another worker was faster
                continue
            if trial.params:
                self.study.enqueue_trial(dict(trial.params))

    def _counted(self) -> list[Any]:
        """The trials that count: all but those that were lost, that were one too many, or that wait."""
        from optuna.trial import TrialState

        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state != TrialState.WAITING and trial.user_attrs.get("why") not in (STALE, SURPLUS)
        ]

    def result(self, trials: int) -> Evolution:
        """The best of all workers' trials.

        Raises:
            GradmatchError: none has a score; why is told of one.
        """
        from optuna.trial import TrialState

        counted = self._counted()
        complete = [trial for trial in counted if trial.state == TrialState.COMPLETE]
        if not complete:
            why = next((trial.user_attrs.get("why", "") for trial in counted), "none was tried")
            raise GradmatchError(f"none of {len(counted)} trials has a score (the first: {why})", "no_score")
        best = max(complete, key=lambda trial: (sum(trial.values), -trial.number))
        names = list(getattr(self.judge.score, "names", ()) or ())
        names = (
            names
            if len(names) == self.count
            else ["score"]
            if self.count == 1
            else [f"score {n + 1}" for n in range(self.count)]
        )
        chosen = self.space.candidate(best.params)
        tasks = [
            replace(
                self.judge.tasks[name],
                weight=weight,
                name=name,
                options={**self.judge.tasks[name].options, **chosen.own.get(name, {})},
            )
            for name, weight in chosen.weights.items()
        ]
        front = [self._told(trial, names) for trial in self.study.best_trials] if self.count > 1 else []
        notes = [f"{self.spent} evaluations for the start"] if self.spent else []
        pruned = sum(trial.state == TrialState.PRUNED for trial in counted)
        if pruned:
            notes.append(
                f"{pruned} of {len(counted)} trials were not evaluated: the forecast is against them"
            )
        return Evolution(
            base=self.judge.base, tasks=tasks, weights=chosen.weights, score=sum(best.values),
            left_out={name: "its weight is 0" for name in self.judge.tasks if name not in chosen.weights},
            history=list(self._history(counted)), evaluations=len(counted) - pruned + self.spent, complete=len(counted) >= trials,
            strategy=self.method, method=self.space.method, options={**self.judge.options, **chosen.options}, notes=tuple(notes),
            scores=dict(zip(names, best.values, strict=True)), front=front, trials=len(counted),
        )  # fmt: skip

    def _told(self, trial: Any, names: Sequence[str]) -> dict[str, Any]:
        chosen = self.space.candidate(trial.params)
        scores = dict(zip(names, trial.values, strict=True))
        return {
            "number": trial.number,
            "weights": chosen.weights,
            "options": chosen.options,
            "scores": scores,
        }

    def _history(self, counted: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """A line a trial: what it stands for, its scores, or why it has none."""
        for trial in counted:
            try:
                chosen = self.space.candidate(trial.params)
            except GradmatchError:
                chosen = Candidate({})
            values = list(trial.values) if trial.values else None
            seconds = trial.duration.total_seconds() if trial.duration else None
            yield {
                "kind": "trial", "number": trial.number, "weights": chosen.weights, "options": chosen.options, "own": chosen.own,
                "score": values, "state": trial.state.name.lower(), "why": trial.user_attrs.get("why", ""), "seconds": seconds,
            }  # fmt: skip
