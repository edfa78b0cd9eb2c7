"""Evolutionary search of merges: CMA-ES for one score, NSGA-II for several, shared by any number of workers through Optuna's storage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.models.opening import open_checkpoint
from gradmatch.zoo.finding import Found, Models, find
from gradmatch.zoo.forecasts import Forecast, forecasts
from gradmatch.zoo.judge import Judge, Score
from gradmatch.zoo.pairs import aligned
from gradmatch.zoo.search import SIGMA0, Evolution, Search
from gradmatch.zoo.space import Space

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

METHODS = ("cmaes", "nsga2")


def evolve(
    base: Model,
    tasks: Models,
    score: Score,
    method: str = "cmaes",
    *,
    trials: int = 200,
    storage: str | os.PathLike[str] | None = None,
    seed: int = 0,
    name: str = "zoo",
    merge_method: str = "linear",
    groups: int = 0,
    search: Mapping[str, tuple[float, float]] | None = None,
    start: Any = "average",
    population: int | None = None,
    sigma0: float = SIGMA0,
    forecast: bool | None = None,
    worse: float = 0.05,
    space: Space | None = None,
    allow_pickle: bool = False,
    progress: bool = False,
    **options: Any,
) -> Evolution:
    """Search the weights of a merge (and options of its rule) by the scores of candidates, which are merged in memory and never written.

    Call it again with the same storage, from here or another machine, to take part in the search or to go on with one that was stopped: `trials`
    is the number of all workers together. The trial of a worker that was killed is done again by another.

    Args:
        base: the model that they were fine-tuned from.
        tasks: the models: tasks, models by name, folders of models.
        score: state dict -> a number, larger is better; for "nsga2" several numbers (a sequence), each larger is better. A `names` attribute calls them.
        method: "cmaes" (one score; needs at least two numbers to search) or "nsga2".
        trials: how many candidates are tried in all. Those whose score is NaN or raises count: they were paid for.
        storage: None: memory; a path: a journal file, or SQLite where it ends in .db; a URL of PostgreSQL. See `gradmatch.zoo.storage`.
        seed: of the search. One worker with the same seed tries the same candidates; workers that join draw others.
        name: of the study in the storage.
        merge_method: the rule of the merges.
        groups: 0: a weight a model; n: one in each of n groups of layers, and in embeddings, final norm and head.
        search: option of the rule -> (lowest, highest), searched beside the weights: {"density": (0.1, 1.0)}.
        start: where the search begins: a strategy of `select`, which is run first, a `Selection`, weights by name, "uniform", or "random".
        population: candidates a generation; None: 4 + 3 ln n for n numbers (at least 10 with "nsga2").
        sigma0: first spread of CMA-ES, as a share of the bounds.
        forecast: leave candidates unevaluated that the curvature files forecast to cost the median task more than `worse` nats an example beyond
            the start; None: where every task has a curvature file and there is one weight a model.
        worse: see `forecast`.
        space: in place of merge_method, groups and search.
        allow_pickle: read .bin and .pt files too.
        progress: show a progress bar.
        **options: of the rule, and policies of `gradmatch.merge`.

    Returns:
        The best candidate, as `select` returns it, with the Pareto front where there are several scores. Of several, the best has the largest sum.

    Raises:
        GradmatchError: an unknown method, a study of another search in that storage, a single number to search by CMA-ES, or no trial with a score.
        ConnectionError: a storage that cannot be reached.
        ImportError: Optuna or cmaes is not installed.

    >>> import torch
    >>> zoo = {"a": {"w": torch.tensor([2.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    >>> found = evolve({"w": torch.zeros(2)}, zoo, lambda merged: -float((merged["w"] - 0.8).norm()), merge_method="task_arithmetic",
    ...                trials=20, start="uniform")
    >>> found.score > found.history[0]["score"][0], found.trials
    (True, 20)
    """
    choose("method", method, METHODS)
    if isinstance(trials, bool) or trials < 1:
        raise GradmatchError(f"trials is {trials}; a search needs at least one", "out_of_range", "trials")
    if find_spec("optuna") is None or (method == "cmaes" and find_spec("cmaes") is None):
        lacking = "optuna" if find_spec("optuna") is None else "cmaes"
        raise ImportError(f"{lacking} is not installed; pip install 'gradmatch[zoo]'")
    opened = open_checkpoint(base, allow_pickle=allow_pickle)
    found = find(tasks, opened, allow_pickle=allow_pickle)
    given = {name: replace(task, model=found.opened[name]) for name, task in found.tasks.items()}
    space = space or Space.of(opened, list(given), merge_method, groups=groups, options=search or {})
    if method == "cmaes" and len(space.bounds()) < 2:
        raise GradmatchError(
            "CMA-ES needs at least two numbers to search, and there is one; add models, groups or search options",
            "bad_choice",
        )
    judge = Judge(opened, given, score, method=space.method, options=options)
    one = Search(judge, space, method, seed, population, sigma0)
    one.open(storage, name)
    one.begin(start)
    _forecast(one, found, opened, forecast, worse)
    with _bar(trials, progress) as advance:
        one.run(trials, advance)
    return one.result(trials)


def _forecast(one: Search, found: Found, base: Checkpoint, asked: bool | None, worse: float) -> None:
    """Set the search's forecast where it is wanted and can be had."""
    able = (
        not one.space.groups
        and not one.space.filters
        and one.space.method in ("linear", "weighted", "task_arithmetic")
    )
    if asked and not able:
        raise GradmatchError(
            "a forecast is of one weight a model, merged linearly; leave groups out, or forecast=False",
            "bad_choice",
            "forecast",
        )
    if asked or (asked is None and able and all(task.curvature is not None for task in found.tasks.values())):
        one.forecast = Forecast(forecasts(base, aligned(found.opened, base), found.tasks), worse)


@contextmanager
def _bar(trials: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over trials."""
    if not shown:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=trials, unit="trial", desc="evolving") as bar:
        yield bar.update
