"""Drawings of what results say, one on each pair of axes: `plot_*(result, ax=None)` returns matplotlib's Axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradmatch.common.layers import layer_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradmatch.choosing.auto import AutoWeights
    from gradmatch.diagnosis import Diagnosis
    from gradmatch.estimators.curvature import Curvature
    from gradmatch.measure.evaluating import Evaluation
    from gradmatch.output.report import Report

__all__ = ["plot_cosines", "plot_curvature", "plot_evaluation", "plot_forecast", "plot_losses", "plot_moved"]


def plot_losses(diagnosis: Diagnosis, ax: Axes | None = None) -> Axes:
    """Each task's loss at the base, at its own fine-tune and at the merge, nats per example; nothing without data.

    Example:
        >>> plot_losses(diagnose("base", tasks, "merged", data=data))                     # doctest: +SKIP
    """
    losses = diagnosis.evidence.losses
    tasks = [task for task in diagnosis.evidence.tasks if task in losses.get("merged", {})]
    ax = _axes(ax)
    heights = {
        "base": [_mean(losses.get("base", {}).get(task)) for task in tasks],
        "own": [_mean(losses.get(task, {}).get(task)) for task in tasks],
        "merged": [_mean(losses["merged"][task]) for task in tasks],
    }
    for place, (kind, found) in enumerate(heights.items()):
        ax.bar([n + (place - 1) * 0.27 for n in range(len(tasks))], found, 0.27, label=kind)
    ax.set_xticks(range(len(tasks)), tasks)
    ax.set_ylabel("nats per example")
    ax.legend()
    return ax


def plot_cosines(diagnosis: Diagnosis, ax: Axes | None = None) -> Axes:
    """Cosines between task vectors, -1 to 1.

    Example:
        >>> plot_cosines(diagnose("base", tasks))                                         # doctest: +SKIP
    """
    told = diagnosis.to_dict()
    names = list(diagnosis.evidence.tasks)
    ax = _axes(ax)
    ax.imshow([[float(value) for value in row] for row in told["cosines"]], cmap="RdBu_r", vmin=-1, vmax=1)
    for i, row in enumerate(told["cosines"]):
        for j, value in enumerate(row):
            ax.text(j, i, f"{float(value):.2f}", ha="center", va="center")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set_title("cosines of task vectors")
    return ax


def plot_forecast(
    forecast: AutoWeights, ax: Axes | None = None, *, upper: float = 1.5, points: int = 31
) -> Axes:
    """Forecast rise of each task's loss as the chosen weights are scaled from 0 to `upper`, nats per example; dotted where it cannot hold.

    Example:
        >>> plot_forecast(forecast("base", tasks, data=data))                             # doctest: +SKIP
    """
    import numpy as np

    ax = _axes(ax)
    scales = [upper * n / (points - 1) for n in range(points)]
    for p in forecast.products:
        weights = np.array([forecast.best.coefficients.get(name, 0.0) for name in p.directions])
        rises = [p.rise(scale * weights) / p.num_examples for scale in scales]
        held = [
            rise if p.trusted(scale * weights) else math.nan
            for scale, rise in zip(scales, rises, strict=True)
        ]
        (line,) = ax.plot(scales, held, label=p.task)
        ax.plot(scales, rises, color=line.get_color(), ls=":")
    ax.axvline(1.0, color="#97a3b0", lw=0.8)
    ax.set(xlabel="scale of the chosen weights", ylabel="forecast rise, nats per example")
    ax.legend()
    return ax


def plot_evaluation(evaluation: Evaluation, ax: Axes | None = None) -> Axes:
    """Every model's loss on every task with its 95 % interval, nats an example or token.

    Example:
        >>> plot_evaluation(evaluate(["base", "a", "merged"], {"a": "a.csv"}))            # doctest: +SKIP
    """
    ax = _axes(ax)
    for shift, model in enumerate(evaluation.models):
        scores = [evaluation.of(model, task) for task in evaluation.tasks]
        places = [n + 0.12 * shift for n in range(len(scores))]
        errors = [[s.loss - s.low for s in scores], [s.high - s.loss for s in scores]]
        ax.errorbar(places, [s.loss for s in scores], errors, fmt="o", capsize=3, label=model)
    ax.set_xticks(range(len(evaluation.tasks)), evaluation.tasks)
    ax.set_ylabel(f"nats per {evaluation.scores[0].per}")
    ax.legend()
    return ax


def plot_moved(report: Report, ax: Axes | None = None) -> Axes:
    """How far a merge moved each group of layers from the base: the norm of its update.

    Example:
        >>> plot_moved(merge("base", tasks).report)                                       # doctest: +SKIP
    """
    return _by_group(
        {name: told["norm"] ** 2 for name, told in report.moved.items()},
        "norm of the update",
        _axes(ax),
        root=True,
    )


def plot_curvature(curvature: Curvature, ax: Axes | None = None) -> Axes:
    """Trace of the curvature in each group of layers, per example.

    Example:
        >>> plot_curvature(Curvature.from_pretrained("me/model"))                         # doctest: +SKIP
    """
    return _by_group(
        {name: float(curvature.mean(name).sum()) for name in curvature}, "trace, nats per example", _axes(ax)
    )


def _by_group(values: dict[str, float], label: str, ax: Axes, *, root: bool = False) -> Axes:
    """Sums by group of layers as horizontal bars, the first layer on top."""
    sums: dict[str, float] = {}
    for name, value in values.items():
        group = layer_group(name)
        sums[group] = sums.get(group, 0.0) + value
    ax.barh(list(sums), [math.sqrt(value) if root else value for value in sums.values()])
    ax.invert_yaxis()
    ax.set_xlabel(label)
    return ax


def _axes(ax: Axes | None) -> Axes:
    """Axes of one's own, or new ones."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    made: Axes = Figure(constrained_layout=True).subplots()
    return made


def _mean(losses: Any) -> float:
    """Mean over examples; nan where nothing was measured."""
    return math.nan if losses is None else float(losses.double().mean())
