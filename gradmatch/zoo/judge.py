"""Candidates merged in memory and scored: each once, within a budget, and none that breaks ends the search."""

from __future__ import annotations

import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint
from gradmatch.estimators.names import first_line
from gradmatch.merging import merge
from gradmatch.zoo.journal import Journal

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Task

Score = Callable[["Mapping[str, Tensor]"], Any]
Values = tuple[float, ...]


class OutOfBudget(Exception):
    """No evaluation is left."""


class Judge:
    """Merges weights of a zoo's models in memory and scores the result; larger is better.

    A candidate whose merge is refused, or whose score raises or is no finite number, is refused: it is logged with the reason, costs one
    evaluation, and the search goes on. Random states of the caller are what they were, whatever the score does with them.

    Args:
        base: opened.
        tasks: name -> task; their models are opened.
        score: state dict -> a number, or several.
        method: the rule of every merge.
        options: of the rule, and policies of `merge`.
        budget: how many evaluations there may be in all, those of earlier runs over the same log included; None: any number.
        log: JSON lines; None: in memory.
        about: what else tells one search from another.

    Raises:
        GradmatchError: a budget below 1, or a log of another search.
        TypeError: a score that cannot be called.
    """

    def __init__(
        self,
        base: Checkpoint,
        tasks: Mapping[str, Task],
        score: Score,
        *,
        method: str = "linear",
        options: Mapping[str, Any] | None = None,
        budget: int | None = None,
        log: Any = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(score):
            raise TypeError(f"score must be a function of a state dict, not {type(score).__name__}")
        if budget is not None and (isinstance(budget, bool) or budget < 1):
            raise GradmatchError(
                f"budget is {budget}, and a search needs at least one evaluation; leave it out for any number",
                "out_of_range",
                "budget",
            )
        self.base, self.tasks, self.score = base, dict(tasks), score
        self.method, self.options, self.budget = method, dict(options or {}), budget
        prints = {name: model_print(task.model) for name, task in self.tasks.items()}
        self.about = {
            **(about or {}),
            "models": prints,
            "base": model_print(base),
            "score": label_of(score),
            "method": method,
            "options": json.loads(json.dumps(self.options, default=str)),
        }
        self.journal = Journal(log, self.about)
        self.known = {line["key"]: line for line in self.journal.of("evaluation")}

    @property
    def spent(self) -> int:
        """Evaluations so far, of earlier runs too."""
        return len(self.known)

    def __call__(
        self, weights: Mapping[str, float], options: Mapping[str, Any] | None = None
    ) -> Values | None:
        """The score of a candidate; None where it is refused.

        Args:
            weights: name -> alpha; models that are not named, or have 0, take no part.
            options: of the rule, over those of the search.

        Raises:
            OutOfBudget: it was never evaluated, and no evaluation is left.
        """
        chosen = {
            name: weight
            for name, weight in weights.items()
            if weight != 0 or not isinstance(weight, (int, float))
        }
        key = json.dumps([sorted(chosen.items()), sorted((options or {}).items())])
        if key not in self.known:
            if self.budget is not None and self.spent >= self.budget:
                raise OutOfBudget
            started = time.perf_counter()
            found = self.score_of(chosen, options or {})
            values, why = (None, found) if isinstance(found, str) else (found, "")
            line = {
                "weights": chosen,
                "options": dict(options or {}),
                "score": list(values) if values else None,
                "why": why,
            }
            self.journal.add("evaluation", key=key, **line, seconds=round(time.perf_counter() - started, 3))
            self.known[key] = self.journal.lines[-1]
        stored = self.known[key]["score"]
        return None if stored is None else tuple(stored)

    def why(self, weights: Mapping[str, float]) -> str:
        """Why a candidate was refused; "" where it was not."""
        key = json.dumps([sorted(weights.items()), []])
        return str(self.known.get(key, {}).get("why", ""))

    def merged(
        self, weights: Mapping[str, Any], options: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, Tensor]:
        """The merge of a candidate, in memory; `own` are options of single models."""
        tasks = [
            replace(
                self.tasks[name],
                weight=weight,
                name=name,
                options={**self.tasks[name].options, **own.get(name, {})},
            )
            for name, weight in weights.items()
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is said of every merge is said of the one that is chosen
            return merge(self.base, tasks, method=self.method, **{**self.options, **options})

    def score_of(
        self,
        weights: Mapping[str, Any],
        options: Mapping[str, Any],
        own: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Values | str:
        """A candidate's scores, or why it has none, which is warned of; neither counted nor logged."""
        try:
            merged = self.merged(weights, options, own or {})
            if not any(bool(value.any()) for value in merged.values()):
                raise GradmatchError("all its weights are 0", "not_finite")
            with undisturbed():
                return values_of(self.score(merged))
        except Exception as error:
            told = (
                first_line(error)
                if isinstance(error, GradmatchError)
                else f"{type(error).__name__}: {first_line(error)}"
            )
            warn(f"a candidate is refused ({named(weights)}): {told}")
            return told


def values_of(given: Any) -> Values:
    """What a score function returned, as finite numbers.

    Raises:
        GradmatchError: none, or something else.

    >>> values_of(0.5), values_of([1, 2])
    ((0.5,), (1.0, 2.0))
    """
    try:
        found = tuple(float(one) for one in given) if isinstance(given, Sequence) else (float(given),)
    except (TypeError, ValueError):
        raise GradmatchError(f"its score is {given!r:.60}, which is no number", "not_finite") from None
    for value in found:
        if not math.isfinite(value):
            raise GradmatchError(
                f"its score is {'NaN' if math.isnan(value) else value}; scores must be finite numbers that compare",
                "not_finite",
            )
    if not found:
        raise GradmatchError("its score is empty, which is no number", "not_finite")
    return found


@contextmanager
def undisturbed() -> Iterator[None]:
    """The random states of Python, numpy and torch are put back, whatever seeds are set in here."""
    import numpy as np
    import torch

    python, numeric, drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)  # noqa: NPY002
        torch.set_rng_state(drawn)


def label_of(score: Any) -> str:
    """What a score is called in a log: its own `label`, or where its function stands."""
    own = getattr(score, "label", None)
    if own:
        return str(own)
    one = score if hasattr(score, "__qualname__") else type(score)
    return f"{one.__module__}.{one.__qualname__}"


def model_print(model: Any) -> str:
    """A short fingerprint of a model's names, shapes and some of its values, so that a changed folder is another model."""
    return fingerprint(list(model.original), model.original.sample)[:16]


def named(weights: Mapping[str, Any]) -> str:
    """Weights in words: "a 0.5, b 0.5"."""
    return ", ".join(
        f"{name} {weight:.4g}" if isinstance(weight, (int, float)) else f"{name} {weight}"
        for name, weight in weights.items()
    )
