"""`weights="auto"`: the forecast's best weights, as the tasks and options that a merge then runs with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gradmatch.choosing.auto import PLACE, auto_weights, forecast_objectives
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint
from gradmatch.measure.forecast import BestWeights, Products, best_coefficients
from gradmatch.measure.opening import check_tasks, module_of, open_models
from gradmatch.measure.products import load_products
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.curvatures import open_curvature
from gradmatch.models.task import Task
from gradmatch.plan.opened import task_names

if TYPE_CHECKING:
    from gradmatch.models.task import Model

AUTO = "auto"
SPAN_OF = {"task_arithmetic": "tau", "gradient_matching": "preconditioned"}
LOWER, UPPER = 0.0, 2.0  # of a chosen weight: a task is added, at most twice over
HBAR_WEIGHT = 1.0  # of every task inside Hbar, while the weights outside are chosen
SETTINGS = (
    "method",
    "base_curvature",
    "base_weight",
    "delta0",
    "allow_pickle",
)  # of a merge that the choice depends on
FIXED = (
    "transforms",
    "after",
    "scale",
    "normalize",
    "hbar_weight",
)  # what would change the directions under the weights


@dataclass(frozen=True)
class Choice:
    """What the merge runs with.

    Attributes:
        tasks: with the chosen weights.
        options: that belong to the choice.
        forecast: weights and forecast rises (nats per example), for the card.
        notes: the same in words.
    """

    tasks: list[Task]
    options: dict[str, Any]
    forecast: dict[str, Any]
    notes: list[str]


def check_choice(
    *,
    weights: str | None,
    tasks: Sequence[Task],
    method: str,
    data: Any,
    products: Any,
    **options: Any,
) -> None:
    """Refuse what cannot be chosen, before anything is opened.

    Raises:
        ValueError: another word than "auto", a method without a span, neither data nor products or both, weights that are
            given as well, or options that change what the weights multiply.
    """
    if weights is None:
        raise GradmatchError(
            "data and products choose weights: say weights='auto' with them, or leave them out",
            "bad_choice",
            "weights",
        )
    if weights != AUTO:
        raise GradmatchError(
            f"weights is {weights!r}; it can only be 'auto' (numbers belong to the tasks)",
            "bad_choice",
            "weights",
        )
    if method not in SPAN_OF:
        raise GradmatchError(
            f"weights='auto' chooses weights for {' and '.join(SPAN_OF)}, not for {method!r}: only they are linear in them",
            "bad_choice",
            method,
        )
    if (data is None) == (products is None):
        raise GradmatchError(
            "weights='auto' needs data (a few hundred examples of every task) or products (stored by `gradmatch forecast --save`)"
            + (", not both" if data is not None else ""),
            "bad_choice",
        )
    for name, task in zip(task_names(tasks), tasks, strict=True):
        if task.weight != 1.0:
            raise GradmatchError(
                f"weights='auto' chooses the weight of {name!r}, which is given as {task.weight}: leave one out",
                "bad_choice",
                name,
            )
    given = [name for name in FIXED if options.get(name)]
    if given:
        raise GradmatchError(
            f"weights='auto' forecasts task vectors as they are; leave {given[0]} out, or give weights",
            "bad_choice",
            given[0],
        )


def choose_weights(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    *,
    method: str,
    data: Mapping[str, Iterable[Any]] | None = None,
    products: Sequence[Products] | str | os.PathLike[str] | None = None,
    base_curvature: Curvature | str | os.PathLike[str] | float | None = None,
    base_weight: float = 1.0,
    delta0: float = 1e-6,
    allow_pickle: bool = False,
) -> Choice:
    """The best weights in the span of a method's directions.

    Args:
        base: as for `merge`.
        tasks: as for `merge`.
        method: task_arithmetic (span of the task vectors) or gradient_matching (span of the terms of Eq. 12, every task
            with weight 1 inside Hbar).
        data: task -> batches with true labels.
        products: stored or measured before, in their place.
        base_curvature: as for `merge`.
        base_weight: as for `merge`.
        delta0: as for `merge`.
        allow_pickle: as for `merge`.

    Raises:
        ValueError: data of other tasks than these or not of all, products of other weights, directions or settings.
        FileNotFoundError: a products file that is not there.
    """
    theta0, models, _, curvatures = open_models(
        base, tasks, data=data is not None, base_curvature=base_curvature, allow_pickle=allow_pickle
    )
    names, span = list(models), SPAN_OF[method]
    if data is not None:
        check_tasks("data", data, names)
        missing = [name for name in names if name not in data]
        if missing:
            raise GradmatchError(
                f"weights='auto' needs data of every task; there is none of {missing[0]!r}",
                "bad_choice",
                missing[0],
            )
        sizes = {name: curvature.num_examples for name, curvature in curvatures.items()}
        objectives = forecast_objectives(module_of(base, theta0), {name: data[name] for name in names}, sizes)
        h0 = base_curvature
        found = auto_weights(
            theta0,
            dict(models),
            objectives,
            curvatures=curvatures,
            base_curvature=open_curvature(h0) if isinstance(h0, str | os.PathLike) else h0,
            span=span,
            alpha=dict.fromkeys(names, HBAR_WEIGHT),
            curvature_weight=base_weight,
            delta0=delta0,
            lower=LOWER,
            upper=UPPER,
        )
        best, measured = found.best, found.products
    else:
        assert products is not None
        if isinstance(products, str | os.PathLike):
            prints, settings = fingerprints(theta0, models), settings_of(span, base_weight, delta0)
            measured = load_products(products, prints, settings)
        else:
            measured = list(products)
        check_directions(measured, names, span)
        best = best_coefficients(measured, free=names, lower=LOWER, upper=UPPER)
    return _choice(tasks, names, span, best, measured)


def _choice(
    tasks: Sequence[Task], names: Sequence[str], span: str, best: BestWeights, products: Sequence[Products]
) -> Choice:
    weights = {name: round(best.coefficients[name], 6) for name in names}
    rises = {p.task: best.rises[p.task] / p.num_examples for p in products}
    seen, kinds = min(p.examples_seen for p in products), sorted({p.kind for p in products})
    forecast = {
        "span": span,
        "weights": weights,
        "rises_per_example": rises,
        "trusted": best.trusted,
        "curvature": kinds,
        "examples": seen,
    }
    doubt = "" if best.trusted else "; outside the region where the forecast can be trusted"
    notes = [
        f"weights chosen by forecast in the span of the {'task vectors' if span == 'tau' else 'terms of Eq. 12'} "
        f"({', '.join(kinds)} curvature, {seen} examples a task): " + _listed(weights),
        f"forecast rise of each task's loss over its own fine-tune, nats per example: {_listed(rises)}{doubt}",
    ]
    options = {} if span == "tau" else {"hbar_weight": HBAR_WEIGHT}
    chosen = [replace(task, weight=weights[name], name=name) for task, name in zip(tasks, names, strict=True)]
    return Choice(chosen, options, forecast, notes)


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def fingerprints(base: Checkpoint, tasks: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Fingerprint of every model by name, "base" first: whose products a file holds."""
    return {
        role: fingerprint(list(model.original), model.original.sample)
        for role, model in {"base": base, **tasks}.items()
    }


def settings_of(span: str, base_weight: float, delta0: float) -> dict[str, float]:
    """What the directions of a span depend on, beside models and curvatures."""
    return {} if span == "tau" else {"base_weight": base_weight, "delta0": delta0}


def check_directions(products: Sequence[Products], names: Sequence[str], span: str) -> None:
    """Compare what products were measured on with what the weights will multiply.

    Raises:
        ValueError: other tasks, or another span.
    """
    wanted = set(names) if span == "tau" else {*names, *(PLACE + name for name in names)}
    for p in products:
        if set(p.directions) != wanted:
            raise GradmatchError(
                f"the products of {p.task!r} are over the directions {', '.join(p.directions)}; these tasks and method need "
                f"{', '.join(sorted(wanted))} (`gradmatch forecast --span {span} --save`)",
                "bad_products",
                p.task,
            )
    missing = set(names) - {p.task for p in products}
    if missing:
        raise GradmatchError(
            f"no products of task {min(missing)!r}; measure every task's together",
            "bad_products",
            min(missing),
        )
