"""`weights: auto`: the weights of a merge chosen by forecast, before any merge is evaluated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.common.layers import layer_group
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.shown import frame, html
from gradmatch.measure.forecast import BestWeights, Products, best_coefficients
from gradmatch.measure.products import (
    curvature_products,
    load_products,
    measure_products,
    preconditioned_vectors,
    split_by_group,
    task_vector,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.estimators.curvature import Curvature
    from gradmatch.measure.objective import Objective

Model = Mapping[str, "Tensor"]
SPANS = ("tau", "preconditioned")
PLACE = "tau:"  # prefix of directions that only say where a fine-tune is


@dataclass(frozen=True)
class AutoWeights:
    """Weights that the forecast chose.

    Attributes:
        weights: task -> coefficient of its direction; with groups: "task@group" -> coefficient.
        span: "tau" (task vectors) or "preconditioned" (terms of Eq. 12).
        best: the programme's answer, with forecast rises and whether they can be trusted.
        products: what it was computed from; keep them with `save_products`.
        directions: the vectors that the weights multiply: theta = theta0 + sum_k weight_k direction_k.
    """

    weights: dict[str, float]
    span: str
    best: BestWeights
    products: list[Products]
    directions: dict[str, Mapping[str, Tensor]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: weights, span, trusted, and by task the forecast rise and the loss at its fine-tune, nats per example."""
        tasks = {
            p.task: {
                "rise": self.best.rises[p.task] / p.num_examples,
                "loss": p.loss / p.num_examples,
                "num_examples": p.num_examples,
                "examples_seen": p.examples_seen,
                "curvature": p.kind,
            }
            for p in self.products
        }
        return {"weights": self.weights, "span": self.span, "trusted": self.best.trusted, "tasks": tasks}

    def to_frame(self) -> Any:
        """The tasks as a pandas DataFrame, one row each: weight (without groups), forecast rise, loss, N.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = self.to_dict()["tasks"]
        return frame([{"task": task, "weight": self.weights.get(task), **row} for task, row in rows.items()])

    def _repr_html_(self) -> str:
        rows = [
            {"task": task, "weight": self.weights.get(task), **row}
            for task, row in self.to_dict()["tasks"].items()
        ]
        doubt = (
            ""
            if self.best.trusted
            else "outside the region where the quadratic can hold: measure before you trust it"
        )
        return html(f"Forecast, best weights in the span of the {self.span} directions", rows, doubt)

    def model(self, base: Model) -> dict[str, Tensor]:
        """theta0 + sum_k weight_k direction_k; tensors without a direction are the base's."""
        result: dict[str, Tensor] = {}
        for name in base:
            value = base[name]
            moving = [
                (c, self.directions[k][name]) for k, c in self.weights.items() if name in self.directions[k]
            ]
            if moving:
                value = value.to(moving[0][1]).clone()
                for c, direction in moving:
                    value.add_(direction, alpha=c)
            result[name] = value
        return result


def auto_weights(
    base: Model,
    tasks: Mapping[str, Model],
    objectives: Mapping[str, Objective] | None = None,
    *,
    products: Sequence[Products] | str | os.PathLike[str] | None = None,
    curvatures: Mapping[str, Curvature] | None = None,
    base_curvature: Curvature | float | None = None,
    base_objective: Objective | None = None,
    base_weight: float = 0.0,
    span: str = "tau",
    groups: Sequence[str] = (),
    alpha: Mapping[str, float] | None = None,
    curvature_weight: float = 1.0,
    delta0: float = 1e-6,
    importance: Mapping[str, float] | None = None,
    lower: float = 0.0,
    upper: float = math.inf,
) -> AutoWeights:
    """The weights in the span of a few directions that the forecast likes best: one small quadratic programme.

    H_t comes from exact GGN products on data (`objectives`), from stored `products`, or, where there is no data, from
    Kronecker factors or diagonals of `curvatures` (a diagonal drops every cross term: its weights are poor).

    Args:
        base: theta0 by name.
        tasks: task -> theta_t by name.
        objectives: task -> its loss on data.
        products: measured before, over the same directions.
        curvatures: task -> Curvature: for the preconditioned span, and for products without data.
        base_curvature: H0 of the preconditioned span.
        base_objective: the base's own data, to be kept as well with weight `base_weight`.
        base_weight: importance of the base's mean loss beside each task's (0: it does not count).
        span: "tau": task vectors; "preconditioned": the terms Hbar^-1 (H0 + H_t) tau_t of Eq. 12.
        groups: layer groups (see `layer_group`) that get weights of their own; the rest shares one.
        alpha: weights inside Hbar of the preconditioned span; None: 1 each.
        curvature_weight: factor on H0 in the preconditioned span.
        delta0: floor of the preconditioned span.
        importance: task -> weight of its summed loss; None: every task's mean loss counts the same.
        lower: smallest weight.
        upper: largest weight.

    Raises:
        ValueError: an unknown span or group, or nothing to forecast from.
    """
    directions, positions = make_directions(
        base,
        tasks,
        span=span,
        groups=groups,
        curvatures=curvatures,
        base_curvature=base_curvature,
        alpha=alpha,
        curvature_weight=curvature_weight,
        delta0=delta0,
    )
    measured = _products(base, tasks, objectives, products, curvatures, base_objective, directions, positions)
    if importance is None and base_objective is not None:
        importance = {p.task: (base_weight if p.task == "base" else 1.0) / p.num_examples for p in measured}
    free = [name for name in directions if not name.startswith(PLACE)]
    best = best_coefficients(measured, importance, free=free, lower=lower, upper=upper)
    moving = {name: directions[name] for name in best.coefficients}
    return AutoWeights(best.coefficients, span, best, measured, moving)


def make_directions(
    base: Model,
    tasks: Mapping[str, Model],
    *,
    span: str = "tau",
    groups: Sequence[str] = (),
    curvatures: Mapping[str, Curvature] | None = None,
    base_curvature: Curvature | float | None = None,
    alpha: Mapping[str, float] | None = None,
    curvature_weight: float = 1.0,
    delta0: float = 1e-6,
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, dict[str, float]]]:
    """Directions by name, and the coordinates of every fine-tune over them.

    In the preconditioned span the fine-tunes are no combination of the directions: the task vectors "tau:<task>" are added,
    as places to expand at; they get no weight. See `auto_weights` for the arguments.

    Raises:
        ValueError: an unknown span or group, or a preconditioned span without curvatures.
    """
    if span not in SPANS:
        raise GradmatchError(f"unknown span {span!r}; known: {', '.join(SPANS)}", "unknown_name")
    taus = {task: task_vector(base, model) for task, model in tasks.items()}
    known = {layer_group(name) for tau in taus.values() for name in tau}
    unknown = [group for group in groups if group not in known]
    if unknown:
        raise GradmatchError(
            f"no layer group {unknown[0]!r}; this model has {', '.join(sorted(known))}",
            "unknown_name",
            unknown[0],
        )
    terms: Mapping[str, Mapping[str, Tensor]] = taus
    if span == "preconditioned":
        if not curvatures or base_curvature is None:
            raise GradmatchError(
                "the preconditioned span needs curvatures of the tasks and base_curvature (a Curvature or a number)",
                "bad_choice",
            )
        terms = preconditioned_vectors(
            taus,
            curvatures,
            base_curvature,
            alpha or dict.fromkeys(tasks, 1.0),
            base_weight=curvature_weight,
            delta0=delta0,
        )
    directions: dict[str, Mapping[str, Tensor]] = {}
    for task, term in terms.items():
        if groups:
            directions |= {f"{task}@{group}": part for group, part in split_by_group(term, groups).items()}
        else:
            directions[task] = term
    if span == "tau":
        positions = {task: {d: 1.0 for d in directions if d.split("@")[0] == task} for task in tasks}
    else:
        directions |= {PLACE + task: tau for task, tau in taus.items()}
        positions = {task: {PLACE + task: 1.0} for task in tasks}
    return directions, positions


def _products(
    base: Model,
    tasks: Mapping[str, Model],
    objectives: Mapping[str, Objective] | None,
    products: Sequence[Products] | str | os.PathLike[str] | None,
    curvatures: Mapping[str, Curvature] | None,
    base_objective: Objective | None,
    directions: Mapping[str, Mapping[str, Tensor]],
    positions: Mapping[str, Mapping[str, float]],
) -> list[Products]:
    """Stored, exact, or from curvature files, in this order of preference."""
    if isinstance(products, str | os.PathLike):
        return load_products(products)
    if products is not None:
        return list(products)
    if objectives:
        found = [measure_products(t, o, tasks[t], directions, positions[t]) for t, o in objectives.items()]
        if base_objective is not None:
            found.append(measure_products("base", base_objective, base, directions, {}))
        return found
    if curvatures:
        return [curvature_products(t, c, directions, positions[t]) for t, c in curvatures.items()]
    raise GradmatchError(
        "nothing to choose weights from: give data (objectives), stored products, or curvatures", "bad_choice"
    )


def forecast_objectives(
    module: Any,
    data: Mapping[str, Iterable[Any]],
    num_examples: Mapping[str, int] | None = None,
    likelihood: str | Any = "auto",
) -> dict[str, Objective]:
    """An `Objective` for every task's data."""
    from gradmatch.measure.objective import Objective

    sizes = num_examples or {}
    return {task: Objective(module, batches, sizes.get(task), likelihood) for task, batches in data.items()}
