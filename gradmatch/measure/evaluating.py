"""Models before and after a merge, on data of each task: losses, accuracies, and differences on the same examples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.progress import shown
from gradmatch.estimators.shown import frame, html
from gradmatch.measure.intervals import mean_interval
from gradmatch.measure.objective import Objective
from gradmatch.measure.opening import module_of
from gradmatch.models.opening import open_checkpoint
from gradmatch.output.card import CARD

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.task import Model


@dataclass(frozen=True)
class Score:
    """One model on one task.

    Attributes:
        model, task: their names.
        loss, low, high: nats a unit, with the ends of its 95 % interval (Student's t over examples).
        per: the unit, "example" or "token".
        perplexity: of a language model, exp of the loss; None otherwise.
        accuracy, accuracy_low, accuracy_high: share of right predictions, with Wilson's interval where an example has one prediction.
        difference, difference_low, difference_high: loss less the first model's on the same examples, with its paired interval;
            None of the first model itself, and where the examples are not the same.
        forecast: rise of the loss over the task's own model that the merge's card forecast, nats an example; None without.
        examples: how many were seen.
    """

    model: str
    task: str
    loss: float
    low: float
    high: float
    per: str
    perplexity: float | None
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    forecast: float | None
    examples: int


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Every model on every task.

    Attributes:
        scores: models in the order given, for each the tasks.
    """

    scores: list[Score]

    @property
    def models(self) -> list[str]:
        """Their names, in the order given."""
        return list(dict.fromkeys(score.model for score in self.scores))

    @property
    def tasks(self) -> list[str]:
        """Their names, in the order given."""
        return list(dict.fromkeys(score.task for score in self.scores))

    def of(self, model: str, task: str) -> Score:
        """One score.

        Raises:
            KeyError: no such model or task.
        """
        found = {(score.model, score.task): score for score in self.scores}
        return found[model, task]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: models, tasks, and rows, one a model and task with the fields of `Score`."""
        return {"models": self.models, "tasks": self.tasks, "rows": [asdict(score) for score in self.scores]}

    def to_frame(self) -> Any:
        """The scores as a pandas DataFrame, one row each.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self.to_dict()["rows"])

    def summary(self) -> str:
        """A table a task."""
        first, lines = self.models[0], []
        width = max(len("model"), *map(len, self.models))
        for task in self.tasks:
            rows = [score for score in self.scores if score.task == task]
            unit = rows[0].per
            lines += ["", f"{task}: {rows[0].examples} examples, loss in nats per {unit}"]
            lines.append(
                f"  {'model':<{width}}  {'loss':>8}  {'95 % interval':>17}  {'less ' + first:>24}"
                + ("  perplexity" if rows[0].perplexity is not None else "")
                + ("  accuracy" if rows[0].accuracy is not None else "")
                + ("  forecast rise" if any(row.forecast is not None for row in rows) else "")
            )
            for row in rows:
                between = f"{row.low:.4g} to {row.high:.4g}"
                paired = (
                    ""
                    if row.difference is None
                    else f"{row.difference:+.4g} ({row.difference_low:+.4g} to {row.difference_high:+.4g})"
                )
                lines.append(
                    f"  {row.model:<{width}}  {row.loss:>8.4g}  {between:>17}  {paired:>24}"
                    + (f"  {row.perplexity:>10.4g}" if row.perplexity is not None else "")
                    + (f"  {100 * row.accuracy:>7.1f}%" if row.accuracy is not None else "")
                    + (f"  {row.forecast:>13.4g}" if row.forecast is not None else "")
                )
        return "\n".join(lines[1:])

    def __repr__(self) -> str:
        return f"Evaluation({len(self.models)} models, {len(self.tasks)} tasks)"

    def _repr_html_(self) -> str:
        kept = (
            "model",
            "task",
            "loss",
            "low",
            "high",
            "per",
            "perplexity",
            "accuracy",
            "difference",
            "forecast",
        )
        rows = [{key: row[key] for key in kept} for row in self.to_dict()["rows"]]
        return html(repr(self), rows)


def evaluate(
    models: Mapping[str, Model] | Sequence[str | os.PathLike[str]],
    data: Mapping[str, Any],
    *,
    read: Callable[[Any, Any, str], Iterable[Any]] | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Models on data of each task, say the base, its fine-tunes and their merge: the table that tells what a merge cost.

    Every model is run by itself, so that they may be of different architectures; the first one is what the others are compared with.

    Args:
        models: folders, files or hub ids; or name -> model, also a module or a state dict with the structure of a module before it.
        data: task -> batches with true labels, or a file, folder or hub set as `gradmatch.measure.data.read` takes it.
        read: (source, model, task) -> batches, in place of that function with its defaults.
        progress: show a progress bar; None: on a terminal or in a notebook, unless GRADMATCH_VERBOSITY is quiet.

    Raises:
        ValueError: no models or data, two models of one name, or data that do not fit.
        FileNotFoundError: an input that is not there.

    Example:
        >>> evaluate(["base", "amazon", "merged"], {"amazon": "amazon.csv"}).to_frame()        # doctest: +SKIP
    """
    from tqdm import tqdm

    if isinstance(models, (str, os.PathLike)) or not models or not data:
        raise GradmatchError(
            "give a list of models, and data of one task at least, {task: batches or file}", "bad_data"
        )
    named = dict(models) if isinstance(models, Mapping) else called(models)
    kept = {
        task: source if isinstance(source, (str, os.PathLike)) else list(source)
        for task, source in data.items()
    }
    before: dict[str, tuple[Tensor, Tensor | None]] = {}
    scores: list[Score] = []
    structure: Any = None
    with tqdm(total=len(named) * len(kept), desc="evaluate", disable=not shown(progress)) as bar:
        for name, model in named.items():
            opened = open_checkpoint(model)
            if opened.config is not None or opened.module is not None:
                structure = module_of(model, opened)
            if structure is None:
                raise GradmatchError(
                    f"{name} is weights alone: give a module or a folder with a config.json before it",
                    "bad_model",
                    name,
                )
            told = forecast_of(opened.path)
            for task, source in kept.items():
                batches = source if isinstance(source, list) else (read or by_default)(source, model, task)
                try:
                    objective = Objective(structure, batches)
                    losses, confusion = objective.evaluate(opened)
                except (TypeError, ValueError, RuntimeError, IndexError) as error:
                    raise GradmatchError(
                        f"{name} on the data of {task!r}: {error}", "bad_data", task
                    ) from error
                counts = objective.predictions()
                scores.append(score(name, task, losses, counts, confusion, before.get(task), told.get(task)))
                before.setdefault(task, (losses, counts))
                bar.update()
    return Evaluation(scores)


def by_default(source: Any, model: Any, task: str) -> Iterable[Any]:
    """Batches of a source for a model."""
    from gradmatch.measure.data import read

    batches: Iterable[Any] = read(source, model, needs_labels=True)
    return batches


def called(models: Sequence[str | os.PathLike[str]]) -> dict[str, Model]:
    """Name -> model: the last part of a path, more of it where two are alike.

    Raises:
        ValueError: the same model twice.
    """
    paths = [str(model) for model in models]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise GradmatchError(f"{twice} is given twice", "bad_arguments", twice)
    short = [Path(path.rstrip("/")).name or path for path in paths]
    names = [one if short.count(one) == 1 else path for one, path in zip(short, paths, strict=True)]
    return dict(zip(names, paths, strict=True))


def score(
    model: str,
    task: str,
    losses: Tensor,
    counts: Tensor | None,
    confusion: Tensor | None,
    before: tuple[Tensor, Tensor | None] | None,
    forecast: float | None,
) -> Score:
    """One model on one task; losses (n,) nats of each example, counts (n,) its predictions, confusion (C, C)."""
    loss, low, high = mean_interval(losses, counts)
    apart: tuple[float | None, ...] = (None, None, None)
    if before is not None and len(before[0]) == len(losses) and _alike(before[1], counts):
        apart = mean_interval(losses - before[0], counts)
    right: tuple[float | None, ...] = (None, None, None)
    if confusion is not None:
        right = share(int(confusion.diagonal().sum()), int(confusion.sum()), counts is None)
    perplexity = None if counts is None else math.exp(loss) if loss < 700 else math.inf
    per = "example" if counts is None else "token"
    return Score(
        model, task, loss, low, high, per, perplexity, right[0], right[1], right[2], apart[0], apart[1], apart[2], forecast,
        len(losses),
    )  # fmt: skip


def share(right: int, seen: int, single: bool) -> tuple[float | None, float | None, float | None]:
    """A share with Wilson's 95 % interval; without its ends where predictions belong to one another, as an example's tokens do."""
    from scipy.stats import binomtest

    if not seen:
        return None, None, None
    if not single:
        return right / seen, None, None
    interval = binomtest(right, seen).proportion_ci(method="wilson")
    return right / seen, float(interval.low), float(interval.high)


def forecast_of(path: Path | None) -> dict[str, float]:
    """Task -> forecast rise in nats an example, as a merge's card has it where its weights were chosen by forecast."""
    card = path / CARD if path is not None and path.is_dir() else None
    if card is None or not card.is_file():
        return {}
    found = json.loads(card.read_text(encoding="utf-8")).get("report", {}).get("forecast", {})
    rises = found.get("rises_per_example", {})
    return {str(task): float(rise) for task, rise in rises.items()}


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two models counted the same predictions."""
    if one is None or other is None:
        return one is other
    return bool((one == other).all())
