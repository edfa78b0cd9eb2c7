"""Refinement: from a merge on towards theta*, by damped Newton steps on Eq. 9 that never raise its objective."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.measure.objective import Objective

Weights = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Refined:
    """Where refinement ended.

    Attributes:
        theta: the weights by name.
        values: the objective of Eq. 9 before the first step and after each, in nats; it never rises.
        sizes: the length of each step, in units of its Newton direction; 0 where none of the lengths tried was no rise.
    """

    theta: dict[str, Tensor]
    values: list[float]
    sizes: list[float]


def refine(
    theta: Weights,
    theta0: Weights,
    losses: Mapping[str, Objective],
    *,
    alpha: Mapping[str, float],
    h0: Weights,
    curvature: Callable[[str, Weights], Weights],
    steps: int = 3,
    damping: float = 0.0,
    halvings: int = 10,
) -> Refined:
    """Re-linearise and repeat: theta <- theta - s Hbar(theta)^-1 [sum_t alpha_t grad l_t(theta) + H0 (theta - theta0)].

    A diagonal Hbar says in which proportions to move, but on a network not how far (it underestimates the curvature along
    a step by orders of magnitude). So the length s is the minimum of the quadratic along the step, with exact GGN products,
    halved until the objective on the data of `losses` does not rise.

    Args:
        theta: the merge to start from; tensors that the losses have no gradient of stay as they are.
        theta0: the base.
        losses: task -> l_t, all of one module.
        alpha: task -> weight.
        h0: diagonal of the base's curvature of the summed loss, floor included, by parameter name.
        curvature: (task, weights) -> diagonal of H_t at these weights, of the summed loss, by parameter name.
        steps: how many at most.
        damping: added to Hbar in the direction of a step alone; the objective and its minimum stay what they are.
        halvings: lengths tried at each step before it is given up, which ends the refinement.

    Raises:
        ValueError: other tasks in `alpha` than in `losses`, none at all, a negative damping, or an Hbar that is not positive.
    """
    if not losses or set(alpha) != set(losses):
        raise GradmatchError(
            f"alpha has weights for {', '.join(sorted(alpha)) or 'no task'}, losses has {', '.join(sorted(losses)) or 'none'}; "
            "both must name the same tasks",
            "bad_request",
        )
    if damping < 0:
        raise GradmatchError(f"damping is {damping}; it must be at least 0", "out_of_range")
    here = dict(theta)
    values, sizes = [objective(here, theta0, losses, alpha, h0)], []
    for _ in range(steps):
        gradient = objective_gradient(here, theta0, losses, alpha, h0)
        hessians = {task: curvature(task, here) for task in losses}
        direction = {
            name: newton_direction(
                name, g, h0[name], [alpha[task] * h[name] for task, h in hessians.items()], damping
            )
            for name, g in gradient.items()
        }
        size = exact_step(here, direction, gradient, losses, alpha, h0)
        moved, value = here, values[-1]
        for _ in range(halvings):
            tried = {**here, **{name: here[name] + size * d for name, d in direction.items()}}
            value = objective(tried, theta0, losses, alpha, h0)
            if value <= values[-1]:  # False for NaN too
                moved = tried
                break
            size /= 2
        if moved is here:
            sizes.append(0.0)
            values.append(values[-1])
            break
        here = moved
        sizes.append(size)
        values.append(value)
    return Refined(here, values, sizes)


def objective(
    theta: Weights,
    theta0: Weights,
    losses: Mapping[str, Objective],
    alpha: Mapping[str, float],
    h0: Weights,
) -> float:
    """sum_t alpha_t l_t(theta) + 1/2 (theta - theta0)' H0 (theta - theta0) (Eq. 9), in nats."""
    fit = sum(alpha[task] * loss.loss(theta) for task, loss in losses.items())
    prior = sum(
        float((h.double() * (theta[name].double() - theta0[name].double()).square()).sum())
        for name, h in h0.items()
    )
    return fit + prior / 2


def objective_gradient(
    theta: Weights,
    theta0: Weights,
    losses: Mapping[str, Objective],
    alpha: Mapping[str, float],
    h0: Weights,
) -> dict[str, Tensor]:
    """sum_t alpha_t grad l_t(theta) + H0 (theta - theta0), the gradient of Eq. 9, by parameter name."""
    total: dict[str, Tensor] = {}
    for task, loss in losses.items():
        for name, g in loss.gradient(theta).items():
            if name not in total:
                total[name] = h0[name] * (theta[name] - theta0[name])
            total[name] = total[name] + alpha[task] * g
    return total


def newton_direction(
    name: str, gradient: Tensor, h0: Tensor, weighted: list[Tensor], damping: float
) -> Tensor:
    """-(H0 + sum_t alpha_t H_t + damping)^-1 gradient, all (*s,); weighted: the alpha_t H_t of the tensor `name`.

    Raises:
        ValueError: the sum is not positive everywhere.
    """
    h_bar = h0 + damping + torch.stack(weighted).sum(0)
    bad = int((h_bar <= 0).sum())
    if bad:
        raise GradmatchError(
            f"{name}: H0 + sum_t alpha_t H_t is not positive on {bad} weights; add a floor to H0 or a damping",
            "not_positive",
            name,
        )
    return -gradient / h_bar


def exact_step(
    theta: Weights,
    direction: Weights,
    gradient: Weights,
    losses: Mapping[str, Objective],
    alpha: Mapping[str, float],
    h0: Weights,
) -> float:
    """s = -g'd / d'(H0 + sum_t alpha_t H_t)d, H_t the exact GGN: the length that minimises the quadratic along d.

    It is 1, Newton's own step, where the direction was made with the whole of that curvature.
    """
    descent = -sum(float((gradient[name].double() * d.double()).sum()) for name, d in direction.items())
    curved = sum(float((h0[name].double() * d.double().square()).sum()) for name, d in direction.items())
    curved += sum(
        alpha[task] * float(loss.ggn_products(theta, [direction])[0, 0]) for task, loss in losses.items()
    )
    return descent / curved if curved > 0 else 1.0


class _CallableModule(ModuleType):
    """`gradmatch.refine` is this module and its function both, whichever of them was imported first."""

    __call__ = staticmethod(refine)


sys.modules[__name__].__class__ = _CallableModule
