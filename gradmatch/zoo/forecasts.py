"""Forecasts from curvature files: what a set of weights will cost each task, before any merge is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gradmatch.estimators.errors import GradmatchError
from gradmatch.measure.forecast import Products
from gradmatch.measure.products import curvature_products, task_vector
from gradmatch.models.curvatures import open_curvature
from gradmatch.models.task import Task
from gradmatch.models.views import as_module, like
from gradmatch.zoo.pairs import Array

if TYPE_CHECKING:
    from gradmatch.estimators.curvature import Curvature
    from gradmatch.models.checkpoint import Checkpoint


def curvatures_of(tasks: Mapping[str, Task]) -> dict[str, Curvature]:
    """Every task's curvature, opened.

    Raises:
        GradmatchError: a task without one, named.
    """
    lacking = [name for name, task in tasks.items() if task.curvature is None]
    if lacking:
        raise GradmatchError(
            f"{lacking[0]} has no curvature file to forecast by; pass Task(model, curvature=...), from `gradmatch estimate`",
            "bad_curvature",
            lacking[0],
        )
    return {
        name: open_curvature(task.curvature) for name, task in tasks.items() if task.curvature is not None
    }


def forecasts(
    base: Checkpoint, models: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
) -> dict[str, Products]:
    """Task -> its loss over the span of all task vectors, by its curvature file: Kronecker factors where it holds them, else diagonals.

    All task vectors are held in memory. Diagonals rank merges but make their cost far too small (see `gradmatch.measure.products`).

    Raises:
        GradmatchError: a task without a curvature.
    """
    curvatures = curvatures_of(tasks)
    if any(name not in base for curvature in curvatures.values() for name in curvature):
        base = as_module(base)
    directions = {name: task_vector(base, like(model, base)) for name, model in models.items()}
    return {name: curvature_products(name, curvatures[name], directions, {name: 1.0}) for name in models}


class Forecast:
    """What weights are forecast to cost the median task: robust against tasks whose own data do harm.

    Args:
        products: of `forecasts`.
        worse: nats per example from which a candidate is not worth an evaluation.
    """

    def __init__(self, products: Mapping[str, Products], worse: float) -> None:
        self.products, self.worse = dict(products), worse

    def cost(self, weights: Mapping[str, float]) -> float:
        """Median over the tasks of rise_t / N_t in nats per example; a rise that cannot be right counts as the largest that can.

        weights: name -> coefficient of its task vector.
        """
        rises = []
        for one in self.products.values():
            c = np.array([weights.get(name, 0.0) for name in one.directions])
            rises.append(min(one.rise(c) / one.num_examples, one.limit))
        return float(np.median(rises))


def pairwise(base: Checkpoint, models: Mapping[str, Checkpoint], tasks: Mapping[str, Task]) -> Array:
    """(K, K): exp(-r_ij), r_ij the mean of both tasks' forecast rises, in nats per example, at (theta_i + theta_j) / 2; at most 1."""
    products = forecasts(base, models, tasks)
    names = list(models)
    matrix = np.ones((len(names), len(names)))
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            half = np.zeros(len(names))
            half[[i, j]] = 0.5
            rise = sum(products[t].rise(half) / products[t].num_examples for t in (one, other)) / 2
            matrix[i, j] = matrix[j, i] = np.exp(-max(rise, 0.0))
    return matrix
