"""A merge's options searched on validation examples: an Optuna study that several workers and machines share.

Workers meet in Optuna's storage: an SQLite file beside the stages, or, for many machines, what $GRADMATCH_STORAGE names
(`postgresql://user:password@host/base`, `sqlite:///file`, `journal:file`). It is an environment variable, and not a key of
the config, so that no password comes into a record. The trial of a worker that was killed is taken up by the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.samplers import BaseSampler, GridSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from experiments.files import write_json

if TYPE_CHECKING:
    from experiments.rows import Views

STORAGE = "GRADMATCH_STORAGE"
Space = Mapping[str, Mapping[str, Any]]  # option -> {"values": [...]} or {"low": , "high": , "log": }


def take_part(
    out: Path,
    *,
    worker: int,
    study: str,
    method: str,
    options: Mapping[str, Any],
    space: Space,
    sampler: str,
    trials: int,
    seed: int,
    data: Views,
    domains: list[str],
    **sources: Any,
) -> None:
    """Stage: run trials until the study has `trials` that are complete, then write `out/search.json`.

    `study` is its name in the storage: the same for every worker on every machine, and that of no other search.
    The objective is the negative log-likelihood on validation examples, macro average over `domains`. Where several workers
    run the last trial at once, the first `trials` that were complete count: so all workers write the same, and the test metrics
    of the best.
    """
    from experiments.evaluate import scorer  # a worker that only shares a study needs no torch
    from experiments.merging import merged_model

    on_validation, on_test = (
        scorer(sources["base"], data, domains, split) for split in ("validation", "test")
    )

    def merged(chosen: Mapping[str, Any]) -> Any:
        return merged_model(method, 1.0, {**options, **chosen}, **sources)

    def objective(chosen: Mapping[str, Any]) -> float:
        return on_validation(merged(chosen))["macro"]["nll"]

    url = os.environ.get(STORAGE) or f"sqlite:///{out.parent / study}.sqlite"
    found = run_trials(url, study, objective, space, sampler, trials, seed + 1000 * worker)
    own = counted(found, trials)
    best = min(own, key=lambda one: (one.value, one.number))
    trials_ = [{"number": one.number, "params": one.params, "nll": one.value} for one in own]
    told = {"params": best.params, "nll": best.value, "test": on_test(merged(best.params))}
    write_json(out / "search.json", {"trials": trials_, "best": told})


def run_trials(
    url: str,
    title: str,
    objective: Callable[[Mapping[str, Any]], float],
    space: Space,
    sampler: str,
    trials: int,
    seed: int,
) -> optuna.Study:
    """Take part in a study until it has enough complete trials, or until its grid is used up.

    With `grid`, points that somebody else runs are left to them while others are open, and are run again at the end:
    whoever had them may be dead.
    """
    chosen: BaseSampler
    if sampler == "grid":
        # It numbers the points in an order that its seed shuffles: the same for every worker, or they mean other points.
        chosen = GridSampler({name: list(spec["values"]) for name, spec in space.items()}, seed=0)
    else:
        chosen = TPESampler(seed=seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=open_storage(url), study_name=title, sampler=chosen, direction="minimize", load_if_exists=True
    )
    while len(complete(study)) < trials and not (
        isinstance(chosen, GridSampler) and chosen.is_exhausted(study)
    ):
        study.optimize(lambda trial: objective(suggested(trial, space)), n_trials=1)
    return study


def open_storage(url: str) -> Any:
    """Optuna's storage behind a URL; `journal:file` is its journal. Raises ConnectionError where it cannot be reached."""
    if url.startswith("journal:"):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:  # drivers raise their own
        where = url.split("://")[0]
        raise ConnectionError(
            f"cannot open the {where} storage that ${STORAGE} names: {type(error).__name__}; PostgreSQL needs a server within "
            "reach and a driver (pip install 'psycopg[binary]'; with SQLAlchemy before 2.1, psycopg2-binary); "
            f"without ${STORAGE} an SQLite file is used"
        ) from None  # the message of the driver may hold the password


def suggested(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """The trial's value of each option: one of its `values`, or a number between `low` and `high`."""
    return {
        name: trial.suggest_categorical(name, list(spec["values"]))
        if spec.get("values")
        else trial.suggest_float(name, spec["low"], spec["high"], log=spec["log"])
        for name, spec in space.items()
    }


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have a value."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def counted(study: optuna.Study, trials: int) -> list[FrozenTrial]:
    """The first `trials` that were complete: workers that run the last one at once make more."""
    return sorted(complete(study), key=lambda one: (one.datetime_complete, one.number))[:trials]
