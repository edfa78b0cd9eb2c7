"""Convex problems in float64: losses with exact derivatives, and worlds of a base model with tasks fine-tuned from it.

Losses are in nats, summed over their examples; gradients and Hessians are in closed form, minima are found by Newton's
method to the last digits. Names and numbers of equations as in Daheim et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmatch.estimators import Curvature, estimate


class Squares:
    """1/2 ||x theta - y||^2. x: (n, p), y: (n,), theta: (p,)."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def value(self, theta: Tensor) -> Tensor:
        """In nats."""
        return 0.5 * (self.x @ theta - self.y).square().sum()

    def gradient(self, theta: Tensor) -> Tensor:
        """x' (x theta - y), (p,)."""
        return self.x.T @ (self.x @ theta - self.y)

    def hessian(self, theta: Tensor) -> Tensor:
        """x' x, (p, p)."""
        return self.x.T @ self.x


class Softmax:
    """- sum_n log softmax(W x_n)_{y_n} with theta = vec(W), W: (classes, features). x: (n, features), y: (n,)."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def _logits(self, theta: Tensor) -> Tensor:
        return self.x @ theta.view(-1, self.x.shape[1]).T  # (n, classes)

    def value(self, theta: Tensor) -> Tensor:
        """In nats."""
        return nn.functional.cross_entropy(self._logits(theta), self.y, reduction="sum")

    def gradient(self, theta: Tensor) -> Tensor:
        """vec(sum_n (p_n - e_{y_n}) x_n'), (p,)."""
        residual = self._logits(theta).softmax(-1)
        residual[torch.arange(len(self.y)), self.y] -= 1
        return (residual.T @ self.x).flatten()

    def hessian(self, theta: Tensor) -> Tensor:
        """sum_n (diag(p_n) - p_n p_n') (x) x_n x_n', (p, p)."""
        p = self._logits(theta).softmax(-1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (n, classes, classes)
        return torch.einsum("nab,ni,nj->aibj", inner, self.x, self.x).reshape(len(theta), len(theta))


Loss = Squares | Softmax


@dataclass(frozen=True)
class Objective:
    """sum_t alpha_t l_t(theta) + 1/2 (theta - theta0)' H0 (theta - theta0) (Eqs. 8 and 9). alpha: (T,)."""

    losses: Sequence[Loss]
    alpha: Tensor
    theta0: Tensor
    h0: Tensor

    def value(self, theta: Tensor) -> Tensor:
        """In nats."""
        step = theta - self.theta0
        return sum(a * loss.value(theta) for a, loss in self._parts()) + 0.5 * step @ self.h0 @ step  # type: ignore[no-any-return]

    def newton_step(self, theta: Tensor) -> Tensor:
        """[H0 + sum_t alpha_t H_t(theta)]^-1 [sum_t alpha_t grad l_t(theta) + H0 (theta - theta0)], (p,)."""
        gradient = self.h0 @ (theta - self.theta0) + sum(
            a * loss.gradient(theta) for a, loss in self._parts()
        )
        return torch.linalg.solve(
            self.h0 + sum(a * loss.hessian(theta) for a, loss in self._parts()), gradient
        )

    def refined(self, theta: Tensor) -> Tensor:
        """One Newton step, halved until the objective does not rise, (p,)."""
        direction, size, before = self.newton_step(theta), 1.0, self.value(theta)
        before = before + 1e-14 * before.abs()  # a rise by rounding is none
        while size > 1e-4 and self.value(theta - size * direction) > before:
            size /= 2
        return theta - size * direction

    def minimum(self, start: Tensor, steps: int = 100, tolerance: float = 1e-14) -> Tensor:
        """`refined` until it moves no further than `tolerance`, by default than float64 resolves."""
        theta = start
        for _ in range(steps):
            before, theta = theta, self.refined(theta)
            if (theta - before).norm() <= tolerance * (1 + theta.norm()):
                break
        return theta

    def _parts(self) -> list[tuple[Tensor, Loss]]:
        return list(zip(self.alpha, self.losses, strict=True))


@dataclass(frozen=True)
class World:
    """A base model theta0 (p,) with the curvature h0 (p, p) of its own loss, and T tasks fine-tuned from it by Eq. 8."""

    theta0: Tensor
    h0: Tensor
    losses: tuple[Loss, ...]
    thetas: Tensor  # (T, p)
    data: tuple[tuple[Tensor, Tensor], ...]  # of the base, then of the tasks

    @property
    def tau(self) -> Tensor:
        """(T, p), theta_t - theta0."""
        return self.thetas - self.theta0

    def hessians(self) -> Tensor:
        """(T, p, p), H_t of the summed loss at theta_t."""
        return torch.stack(
            [loss.hessian(theta) for loss, theta in zip(self.losses, self.thetas, strict=True)]
        )

    def target(self, alpha: Tensor) -> Tensor:
        """theta* = argmin sum_t alpha_t l_t(theta) + 1/2 ||theta - theta0||^2_{H0} (Eq. 9). alpha: (T,)."""
        return Objective(self.losses, alpha, self.theta0, self.h0).minimum(self.theta0)

    def arithmetic(self, alpha: Tensor) -> Tensor:
        """TA: theta0 + sum_t alpha_t tau_t."""
        return self.theta0 + alpha @ self.tau


def ridge_world(seed: int, tasks: int = 3, features: int = 12, rows: int = 30) -> World:
    """Linear regressions whose features have scales and truths of their own; the base has a weight decay of 1."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(tasks + 1):
        scale = torch.empty(features, dtype=torch.float64).exponential_(generator=generator) + 0.1
        x = torch.randn(rows, features, generator=generator, dtype=torch.float64) * scale
        truth = torch.randn(features, generator=generator, dtype=torch.float64)
        data.append((x, x @ truth + torch.randn(rows, generator=generator, dtype=torch.float64)))
    return _world(data, Squares, torch.zeros(features, dtype=torch.float64))


def softmax_world(
    seed: int, *, diagonal: bool, tasks: int = 3, features: int = 8, rows: int = 200, classes: int = 3
) -> World:
    """Softmax regressions, as `ridge_world`. diagonal: H0 is the base's Monte-Carlo Fisher diagonal + weight decay."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    shared = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    for _ in range(tasks + 1):
        scale = torch.empty(features, dtype=torch.float64).exponential_(generator=generator) + 0.1
        x = torch.randn(rows, features, generator=generator, dtype=torch.float64) * scale
        truth = shared + torch.randn(classes, features, generator=generator, dtype=torch.float64)
        data.append((x, torch.multinomial((x @ truth.T).softmax(-1), 1, generator=generator).squeeze(-1)))
    world = _world(data, Softmax, torch.zeros(classes * features, dtype=torch.float64))
    if diagonal:
        h0 = torch.diag(
            sampled_fisher(data[0], world.theta0, classes, seed).total("weight").double().flatten() + 1
        )
        world = finetuned(world.theta0, h0, world.losses, data)
    return world


def _world(
    data: Sequence[tuple[Tensor, Tensor]], make: Callable[[Tensor, Tensor], Loss], zero: Tensor
) -> World:
    base, *losses = [make(x, y) for x, y in data]
    one, decay = torch.ones(1, dtype=torch.float64), torch.eye(len(zero), dtype=torch.float64)
    theta0 = Objective([base], one, zero, decay).minimum(zero)
    return finetuned(theta0, base.hessian(theta0) + decay, tuple(losses), data)


def finetuned(
    theta0: Tensor, h0: Tensor, losses: tuple[Loss, ...], data: Sequence[tuple[Tensor, Tensor]]
) -> World:
    """Every task fine-tuned from theta0 by Eq. 8: argmin l_t(theta) + 1/2 ||theta - theta0||^2_{H0}."""
    one = torch.ones(1, dtype=torch.float64)
    thetas = torch.stack([Objective([loss], one, theta0, h0).minimum(theta0) for loss in losses])
    return World(theta0, h0, losses, thetas, tuple(data))


def sampled_fisher(data: tuple[Tensor, Tensor], theta: Tensor, classes: int, seed: int) -> Curvature:
    """Diagonal Monte-Carlo Fisher of a softmax regression, one label per example, by `gradmatch.estimators.estimate`."""
    x, y = data
    model = nn.Linear(x.shape[1], classes, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(theta.view(classes, -1))
    return estimate(model, [(x, y)], method="fisher", seed=seed, progress=False)
