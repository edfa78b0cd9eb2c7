"""Everything the causes look at: the models, one scan of their weights, and what their losses on data are.

Costs are counterfactual: the losses of a repaired merge against those of the merge, example by example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gradmatch.diagnosis.scan import STATISTICS
from gradmatch.measure.barrier import interpolate
from gradmatch.rules import Linear, find_rule

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.diagnosis.scan import Scan
    from gradmatch.estimators.curvature import Curvature
    from gradmatch.measure.forecast import Products
    from gradmatch.measure.mismatch import Mismatch
    from gradmatch.measure.objective import Objective
    from gradmatch.measure.redundancy import RedundancyPoint
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.units import Apart

Model = Mapping[str, "Tensor"]

# A repair counts when it gives back a quarter of what fine-tuning had gained over the base: less is the ordinary price of
# merging. And it must stand out of the noise of the examples seen, by three standard errors.
SHARE_OF_GAIN = 0.25
STANDARD_ERRORS = 3.0
LEAST_NATS = 0.02  # per example, where fine-tuning gained next to nothing


@dataclass(frozen=True)
class Saving:
    """What a repair saves: nats summed over all tasks' N examples, and the standard error of that sum."""

    nats: float
    error: float


@dataclass
class Evidence:
    """What is known about one merge.

    Attributes:
        base: theta0; tasks: task -> theta_t; merged: theta or None.
        alpha: task -> weight asked for.
        method: rule that made the merge; delta0 its floor, base_weight the factor on H0.
        refusal: why the merge cannot be made, or "".
        policies: what the recipe chose for tensors that cannot simply be merged: heads, embeddings, missing.
        exact: whether the recipe's update is sum_t alpha_t tau_t to the last digit, so that the merge can be checked against it.
        curvatures: task -> Curvature, as far as given; base_curvature likewise, or a number.
        scan: the pass over the weights.
        fingerprints: (whose curvature) -> the model among those at hand that it was taken at, or "" for none of them.
        units: curvatures whose sizes the numbers of examples do not explain.
        objectives: task -> its loss on data, as far as given; base_objective: the base's, on data of its own.
        losses: model -> task -> (n,) nats of each example; model is "base", a task, or "merged". The base's own data go by "base".
        predictions: task (or "base") -> (n,) predictions of each example, where that is not one each (tokens).
        uniform: task (or "base") -> nats per example of a uniform guess.
        confusions: model -> task -> (C, C) counts, where outputs are classes.
        products: exact products of each task over span{tau}.
        mismatch: gradient mismatch at the merge.
        path: share s -> task -> loss (nats per example) at theta0 + s (theta - theta0).
        batchnorm: layer -> shift of the merge; batchnorm_repair: statistics measured at the merge.
        notes: what could not be looked at, and why.
        gradients: task -> grad l_t(theta_t) by parameter, where it was measured or stored.
        places: task -> its matrix -> the matrix of the base that it resembles instead of its own.
        redundancy: task -> its redundancy curve, loss in nats per example.
        barriers: (task, task) -> height of the loss between the two fine-tunes, nats per example of both.
        overlaps: (task, task) -> overlap of their curvatures in [0, 1].
        weighted_conflicts: (task, task) -> share of their curvature on weights that they moved in opposite directions.
    """

    base: Checkpoint
    tasks: dict[str, Checkpoint]
    merged: Checkpoint | None
    alpha: dict[str, float]
    scan: Scan
    method: str = ""
    delta0: float = 0.0
    base_weight: float = 1.0
    refusal: str = ""
    policies: Mapping[str, str] = field(default_factory=dict)
    exact: bool = False
    curvatures: dict[str, Curvature] = field(default_factory=dict)
    base_curvature: Curvature | float | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    units: list[Apart] = field(default_factory=list)
    objectives: dict[str, Objective] = field(default_factory=dict)
    base_objective: Objective | None = None
    losses: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    uniform: dict[str, float] = field(default_factory=dict)
    confusions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    products: list[Products] = field(default_factory=list)
    mismatch: Mismatch | None = None
    path: dict[float, dict[str, float]] = field(default_factory=dict)
    batchnorm: dict[str, float] = field(default_factory=dict)
    batchnorm_repair: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    redundancy: dict[str, list[RedundancyPoint]] = field(default_factory=dict)
    barriers: dict[tuple[str, str], float] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], float] = field(default_factory=dict)
    weighted_conflicts: dict[tuple[str, str], float] = field(default_factory=dict)
    _pairs: dict[tuple[str, str, float, float], dict[str, Tensor]] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether the merge's losses are known."""
        return "merged" in self.losses

    @property
    def uses_curvature(self) -> bool:
        """Whether the rule weighs by curvature."""
        return "curvature" in find_rule(self.method).needs

    @property
    def searched(self) -> bool:
        """Whether the rule chose among the tasks by a score, so that it says nothing of their weights."""
        rule = find_rule(self.method)
        return isinstance(rule, Linear) and rule.searches

    @property
    def kept(self) -> dict[str, Objective]:
        """Task -> its loss, of the tasks that the merge is to be good at: those that are not taken away."""
        return {task: loss for task, loss in self.objectives.items() if self.alpha[task] >= 0}

    def per(self, task: str, losses: Tensor) -> float:
        """Mean loss of one prediction: nats per token where an example has several, else per example."""
        counts = self.predictions.get(task)
        return float(losses.sum() / (len(losses) if counts is None else counts.sum()))

    def told(self, task: str, losses: Tensor) -> str:
        """The same in words."""
        mean = self.per(task, losses)
        if task not in self.predictions:
            return f"{mean:.3f} nats per example"
        return f"{mean:.3f} nats per token (perplexity {math.exp(min(mean, 700.0)):.4g})"

    def coefficients(self) -> dict[str, float]:
        """Task -> coefficient of tau_t in the merge's update: measured on its weights, else as asked for."""
        return self.alpha if self.merged is None else self.scan.projection()[0]

    def gain(self) -> float:
        """sum_t N_t task_gain(t): nats that fine-tuning had gained, over the kept tasks whose data is known."""
        return sum(max(0.0, self.task_gain(task)) * loss.num_examples for task, loss in self.kept.items())

    def task_gain(self, task: str) -> float:
        """(min(l_t(theta0), l of a uniform guess) - l_t(theta_t)) / N_t: what fine-tuning gained, nats per example.

        A base that is confidently wrong on a task is worse than knowing nothing; that alone is no merit of the fine-tune.
        """
        start = min(float(self.losses["base"][task].mean()), self.uniform.get(task, math.inf))
        return start - float(self.losses[task][task].mean())

    def gained(self, task: str) -> bool:
        """Whether fine-tuning gained something that can be told from the noise of the examples seen, by three standard errors."""
        base, own = self.losses["base"][task], self.losses[task][task]
        ignorant = self.uniform.get(task, math.inf) < float(base.mean())  # see task_gain
        error = error_of_mean(own if ignorant else base - own)
        return self.task_gain(task) > max(0.0, STANDARD_ERRORS * error)

    def rise(self, losses: Mapping[str, Tensor], task: str) -> float:
        """(l_t(theta) - l_t(theta_t)) / N_t, nats per example, for the losses of some model."""
        return float(losses[task].mean() - self.losses[task][task].mean())

    def cost(self) -> float:
        """sum_t l_t(theta) - l_t(theta_t): nats that the merge lost against the fine-tunes."""
        merged = self.losses["merged"]
        return sum(self.rise(merged, task) * objective.num_examples for task, objective in self.kept.items())

    def measure(self, weights: Model) -> dict[str, Tensor]:
        """Task -> (n,) losses of any weights, in nats."""
        return {task: objective.losses(weights) for task, objective in self.objectives.items()}

    def saving(
        self, repaired: Model, tasks: Iterable[str] | None = None, start: Mapping[str, Tensor] | None = None
    ) -> Saving:
        """What the tasks (None: all kept ones) would save if the merge (or what has the losses `start`) were `repaired`.

        Paired over examples, scaled to N. The task "base" is the base's loss on data of its own.
        """
        merged = self.losses["merged"] if start is None else start
        nats = variance = 0.0
        for task in self.kept if tasks is None else tasks:
            objective = self.objectives.get(task) or self.base_objective
            assert objective is not None
            difference = (merged[task] - objective.losses(repaired)).nan_to_num(
                nan=0.0, posinf=1e3, neginf=-1e3
            )
            nats += float(difference.sum()) * objective.scale
            variance += (error_of_mean(difference) * len(difference) * objective.scale) ** 2
        return Saving(nats, math.sqrt(variance))

    def matters(self, saving: Saving) -> bool:
        """Whether a saving is more than the ordinary price of merging, and more than noise."""
        examples = sum(objective.num_examples for objective in self.kept.values())
        return saving.nats > STANDARD_ERRORS * saving.error and saving.nats > max(
            SHARE_OF_GAIN * self.gain(), LEAST_NATS * examples
        )

    def with_changes(self, changes: Mapping[str, float]) -> dict[str, Tensor]:
        """The merge with the coefficients of some task vectors changed: theta + sum_t change_t tau_t."""
        assert self.merged is not None
        moved = self.scan.tensors
        return {
            name: self._added(value.float(), name, changes) if name in moved else value
            for name, value in self.merged.items()
        }

    def _added(self, value: Tensor, name: str, coefficients: Mapping[str, float]) -> Tensor:
        """A tensor with multiples of the task vectors added, in a copy."""
        base, value = self.base[name].float(), value.clone()
        for task, c in coefficients.items():
            value.add_(self.tasks[task][name].float() - base, alpha=c)
        return value

    def at_coefficients(self, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
        """theta0 + sum_t c_t tau_t, with BatchNorm statistics averaged by |c_t|; the rest comes from the merge (or the base)."""
        result, scan = {}, self.scan
        broken = any(part.get("merged") for part in (scan.nonfinite, scan.shapes, scan.missing))
        template = self.base if self.merged is None or broken else self.merged
        total = sum(abs(c) for c in coefficients.values())
        for name in template:
            value = template[name]
            if name in scan.tensors:
                value = self._added(self.base[name].float(), name, coefficients)
            elif name.endswith(STATISTICS) and value.is_floating_point() and total > 0:
                value = torch.zeros_like(value, dtype=torch.float32)
                for task, c in coefficients.items():
                    value.add_(self.tasks[task][name].float(), alpha=abs(c) / total)
            result[name] = value
        return result

    def pair_losses(self, a: str, b: str, first: float, second: float) -> dict[str, Tensor]:
        """The losses of both tasks at theta0 + first tau_a + second tau_b, measured once."""
        key = (a, b, first, second)
        if key not in self._pairs:
            weights = self.at_coefficients({a: first, b: second})
            self._pairs[key] = {task: self.objectives[task].losses(weights) for task in (a, b)}
        return self._pairs[key]

    def along_path(self, share: float, end: Model | None = None) -> dict[str, Tensor]:
        """theta0 + s (theta - theta0), theta the merge or another end."""
        end = self.merged if end is None else end
        assert end is not None
        return interpolate({name: self.base[name] for name in self.scan.tensors}, end, share)

    def other_tasks(self, task: str) -> list[str]:
        """Every task but this one."""
        return [other for other in self.tasks if other != task]


def error_of_mean(values: Tensor) -> float:
    """Standard error of the mean of (n,) values; 0 of a single one."""
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0


def accuracy_of(confusion: Tensor) -> float:
    """Share of examples on the diagonal of a confusion matrix (C, C)."""
    return float(confusion.diagonal().sum() / confusion.sum().clamp(min=1))


def accuracy_of_rows(confusion: Tensor, labels: list[int]) -> float:
    """Share of the examples with these labels that are on the diagonal of a confusion matrix (C, C), row = label."""
    return float(confusion.diagonal()[labels].sum() / confusion[labels].sum().clamp(min=1))


def best_relabelling(confusion: Tensor) -> tuple[list[int], float]:
    """The renaming of classes under which predictions agree best with the labels, and that accuracy.

    All renamings up to 7 classes; beyond, greedily by the largest counts. confusion: (C, C), row = label. Returns
    renaming[predicted] = label.
    """
    from itertools import permutations

    c = len(confusion)
    if c <= 7:
        best = max(permutations(range(c)), key=lambda p: sum(int(confusion[p[k], k]) for k in range(c)))
        renaming = list(best)
    else:
        renaming = [-1] * c
        left = confusion.clone().double()
        for _ in range(c):
            label, predicted = divmod(int(left.argmax()), c)
            renaming[predicted] = label
            left[label, :] = left[:, predicted] = -torch.inf
    right = sum(float(confusion[renaming[k], k]) for k in range(c))
    return renaming, right / max(1.0, float(confusion.sum()))
