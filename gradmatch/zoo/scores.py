"""Scores of files of examples: the accuracy or the mean loss of a merge, larger is better."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.measure.data import read
from gradmatch.measure.objective import Objective
from gradmatch.measure.opening import module_of
from gradmatch.models.opening import open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.task import Model

METRICS = ("auto", "accuracy", "loss")


class OnExamples:
    """How well weights do on examples with true labels: mean over the sources, so that each counts the same.

    A merge whose outputs are NaN or infinite anywhere has no score, whatever class that would count as. The module is made once and lent the
    weights of every candidate.

    Args:
        model: whose architecture and tokenizer are used: the base.
        data: files, folders or hub sets with examples (see `gradmatch.measure.data.read`), or lists of batches; a table of them by name.
        metric: "accuracy" (share of predictions that are right), "loss" (minus nats per example), or "auto": accuracy where outputs are classes.
        module: to run in place of what the model's config describes.
        **reading: limit, seed, batch_size, max_length, text, label, split ... of `read`.

    Attributes:
        label: what it is called in logs: the metric and the content of the sources, so that a changed file is another score.
        names: of the sources.

    Raises:
        GradmatchError: an unknown metric, no data, or data that do not fit the model.
        FileNotFoundError: no such file.

    >>> score = OnExamples("base", {"nyt": "nyt.csv"}, limit=200)         # doctest: +SKIP
    >>> score(merge("base", ["a", "b"], method="averaging"))              # doctest: +SKIP
    0.81
    """

    def __init__(
        self,
        model: Model,
        data: Any,
        metric: str = "auto",
        *,
        module: torch.nn.Module | None = None,
        **reading: Any,
    ) -> None:
        choose("metric", metric, METRICS)
        sources = dict(data) if isinstance(data, Mapping) else {"data": data}
        if not sources:
            raise GradmatchError("no data: name a file of examples, or a table of them", "bad_data")
        opened = open_checkpoint(model)
        structure = module or module_of(model, opened)
        self.objectives: dict[str, Objective] = {}
        prints = []
        for name, source in sources.items():
            batches = (
                read(source, model, needs_labels=True, **reading)
                if isinstance(source, (str, os.PathLike))
                else source
            )
            self.objectives[name] = Objective(structure, batches)
            prints.append(f"{name} {_content(source, self.objectives[name])}")
        self.names = list(sources)
        first = next(iter(self.objectives.values()))
        classes = first.first(1).confusion(opened) is not None
        if metric == "accuracy" and not classes:
            raise GradmatchError(
                "metric is 'accuracy', and this model's outputs are no classes (or more than 1,000); choose metric='loss'",
                "bad_choice",
                "metric",
            )
        self.metric = ("accuracy" if classes else "loss") if metric == "auto" else metric
        told = {key: value for key, value in reading.items() if value not in (None, (), [])}
        self.label = f"{self.metric} on {', '.join(prints)}" + (f" {told}" if told else "")
        self._warned = False

    def each(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Source -> its score.

        Raises:
            GradmatchError: outputs that are not finite.
        """
        found = {}
        for name, objective in self.objectives.items():
            losses, counts = objective.evaluate(weights)
            if not bool(torch.isfinite(losses).all()):
                raise GradmatchError(
                    f"its outputs on {name} are NaN or infinite, so it has no score", "not_finite", name
                )
            if self.metric == "loss":
                found[name] = -float(losses.mean())
                continue
            assert counts is not None
            said = counts.sum(0)
            if int((said > 0).sum()) == 1 and int((counts.sum(1) > 0).sum()) > 1 and not self._warned:
                self._warned = True
                warn(f"a candidate calls every example of {name} the same class")
            found[name] = float(counts.diagonal().sum() / counts.sum().clamp(min=1))
        return found

    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        """The mean score over the sources."""
        found = self.each(weights)
        return sum(found.values()) / len(found)

    def __repr__(self) -> str:
        return f"OnExamples({self.label})"


class Each:
    """Every part of a score as an objective of its own: the sources of `OnExamples`, the tasks of `OnTasks`; larger is better in each.

    Args:
        score: one with `each`, which gives its parts by name.

    Attributes:
        names: of the objectives.
    """

    def __init__(self, score: Any) -> None:
        self.score = score
        tasks = getattr(score, "tasks", None)
        self.names = [one.name for one in tasks] if tasks else list(score.names)
        self.signs = [one.weight for one in tasks] if tasks else [1.0] * len(self.names)
        self.label = f"each of {score.label}"

    def __call__(self, weights: Mapping[str, Tensor]) -> list[float]:
        """One number an objective, in the order of `names`."""
        found = self.score.each(weights)
        return [sign * found[name] for name, sign in zip(self.names, self.signs, strict=True)]


def _content(source: Any, objective: Objective) -> str:
    """A short hash of what is scored on."""
    digest = hashlib.sha256()
    if isinstance(source, (str, os.PathLike)) and Path(source).is_file():
        digest.update(Path(source).read_bytes())
    else:
        for batch in objective.batches:
            for value in (*batch.args, *batch.kwargs.values()):
                if isinstance(value, torch.Tensor):
                    digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
