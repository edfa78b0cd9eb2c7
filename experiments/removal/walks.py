"""Every way to remove as a direction, and one walk along it: strengths that cost what must stay the same, at equally many looks.

A direction is an update of the weights; a strength multiplies it. What a strength costs is the rise of the loss on validation texts
that must stay, or on those of another domain, whichever is larger, in nats a token. Fine-tuned competitors give the update of their
whole run, which is scaled like every other (strength 1 is their published form), so that all are compared at equal cost.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from experiments.removal import language
from experiments.removal.competitors import fine_tuned, token_loss
from experiments.removal.names import CLOSED
from experiments.tasks import texts
from gradmatch import Task, subtract
from gradmatch.estimators import Curvature
from gradmatch.models.curvatures import Factors

CURVATURE = "curvature.safetensors"
MOST = 4.0  # times the published update of a fine-tuning: where it costs nothing there is no end to what a budget allows
START = {
    "removal": 0.5,
    "ewr": 0.1,
}  # the strength at which a method that is not linear in it gives its direction
Update = dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """What a way to remove may use, as folders of stages, and how texts are read.

    Attributes:
        base: the model that is edited.
        task: the bad model.
        guard: KFAC of the base on what must stay.
        gradient: Fisher and gradient of the base on what is to go.
        own: Fisher of the bad model.
        data: the texts.
        max_length: tokens a text.
        seed: of every draw.
        end: whether a text's last token is the tokenizer's end.
    """

    base: Path
    task: Path
    guard: Path
    gradient: Path
    own: Path
    data: Path
    max_length: int
    seed: int
    end: bool = False

    def feed(self, tokenizer: Any, side: str, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches of the training texts of a side without an end, in orders that the seed draws."""
        rows = texts.load(self.data / side / "train.jsonl")
        generator = np.random.default_rng(seed)
        while True:
            order = generator.permutation(len(rows)).tolist()
            for _, batch in language.batches(
                rows, tokenizer, max_length=self.max_length, batch_size=batch_size, order=order, end=self.end
            ):
                yield batch


def direction(name: str, given: Given, options: Mapping[str, Any]) -> Update:
    """The update of one way to remove at strength 1 (a method of CLOSED or TRAINED, "perta" or "kfac_penalised")."""
    if name in CLOSED:
        return closed(name, given, options)
    model, tokenizer = language.load(given.base / "model")
    own = dict(options)
    if name == "perta":
        return rescaled(given, _gradients(model, tokenizer, given, int(own.get("batches", 8))))
    steps, size = int(own.pop("steps")), int(own.pop("batch_size", 8))
    rate = float(own.pop("learning_rate"))
    go = given.feed(tokenizer, "remove", size, given.seed)
    if name == "kfac_penalised":
        return penalised(model, go, given, steps=steps, learning_rate=rate, **own)
    stay = given.feed(tokenizer, "keep", size, given.seed + 1)
    return fine_tuned(model, name, go, stay, steps=steps, learning_rate=rate, options=own, seed=given.seed)


def closed(name: str, given: Given, options: Mapping[str, Any]) -> Update:
    """By `gradmatch.subtract`."""
    base, h0 = str(given.base / "model"), str(given.guard / CURVATURE)
    kept: dict[str, Any] = {} if name == "negation" else {"base_curvature": h0}
    task: Any = None
    if name == "ascent":
        kept["gradient"] = str(given.gradient / CURVATURE)
    else:
        own = None if name in ("negation", "guarded") else str(given.own / CURVATURE)
        task = Task(str(given.task / "model"), own, name="remove")
    unit = START.get(name, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clamped weights: the direction is scaled down
        made: Any = subtract(base, task, method=name, weight=unit, **kept, **options)
    before = language.load(given.base / "model")[0].state_dict()
    return {step.name: made[step.name] - before[step.name] for step in made.made.steps if step.merged}


def _gradients(model: nn.Module, tokenizer: Any, given: Given, batches: int) -> tuple[Update, Update]:
    """Gradients of the mean token loss on what is to go and on what must stay, over so many batches of eight."""
    found = []
    for side in ("remove", "keep"):
        for _, batch in zip(range(batches), given.feed(tokenizer, side, 8, given.seed), strict=False):
            (token_loss(model, batch) / batches).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    return found[0], found[1]


def rescaled(given: Given, gradients: tuple[Update, Update]) -> Update:
    """Negation with every weight times |g_go| / (|g_go| + |g_stay|), as PerTA rescales task vectors by what needs the weight."""
    away = closed("negation", given, {})
    go, stay = gradients
    return {
        name: value
        * (go[name].abs() / (go[name].abs() + stay[name].abs()).clamp(min=1e-30) if name in go else 1.0)
        for name, value in away.items()
    }


def penalised(
    model: Any,
    go: Iterator[Mapping[str, Tensor]],
    given: Given,
    *,
    steps: int,
    learning_rate: float,
    penalty: float = 1.0,
) -> Update:
    """Minus the task vector of a fine-tuning on what is to go that is held by penalty/2 tau' F0 tau, F0 the base's KFAC per example.

    Such a task vector disturbs what must stay less when it is negated (KFAC-regularised task arithmetic).
    """
    curvature = Curvature.load(given.guard / CURVATURE)
    factors = Factors.of(curvature)
    products = {}
    for name, _ in model.named_parameters():
        if name in curvature:
            products[name] = factors.read(name, torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _, batch in zip(range(steps), go, strict=False):
        optimizer.zero_grad()
        token_loss(model, batch).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                tau = parameter - before[name]
                for a, b in products.get(name, ()):
                    parameter.grad += penalty * ((tau if b is None else b @ tau) @ a)
                if name in products and not products[name]:
                    parameter.grad += penalty * curvature.mean(name) * tau
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


@dataclass(frozen=True)
class Look:
    """One look at validation texts: strength, and what it costs (nats a token, the larger rise)."""

    strength: float
    cost: float


def walk(
    cost: Callable[[float], float],
    budgets: Sequence[float],
    looks: int,
    start: float = 1.0,
    most: float = math.inf,
) -> list[Look]:
    """`looks` looks along a direction, towards the largest budget first and then the others; the cost grows about as its square.

    most: no strength beyond it. Returns the looks by strength.
    """
    found: list[Look] = []
    targets = sorted(budgets, reverse=True)
    aim = 0
    strength = start
    for _ in range(looks):
        value = cost(strength)
        found.append(Look(strength, value))
        if math.isfinite(value) and abs(value - targets[aim]) <= 0.15 * targets[aim]:
            aim = (aim + 1) % len(targets)
        strength = min(most, next_strength(found, targets[aim]))
    return sorted(found, key=lambda look: look.strength)


def next_strength(found: Sequence[Look], budget: float) -> float:
    """Where a budget is met, by the looks: between two of them in their logarithms, else from the nearest by its square root."""
    known = [look for look in found if math.isfinite(look.cost)]
    if not known:
        return min(look.strength for look in found) / 16
    below = [look for look in known if 0 < look.cost <= budget]
    above = [look for look in known if look.cost > budget]
    if below and above:
        low, high = max(below, key=lambda one: one.strength), min(above, key=lambda one: one.strength)
        if low.strength < high.strength:
            share = math.log(budget / low.cost) / math.log(high.cost / low.cost)
            return float(low.strength * (high.strength / low.strength) ** share)
    near = max(known, key=lambda one: one.strength) if not above else min(above, key=lambda one: one.strength)
    factor = math.sqrt(budget / near.cost) if near.cost > 0 else 8.0
    return float(near.strength * min(8.0, max(1 / 8, factor)))


def strengths(found: Sequence[Look], budgets: Sequence[float], most: float = math.inf) -> list[float]:
    """The strength for each budget after a walk, by what the looks have seen."""
    return [min(most, next_strength(found, budget)) for budget in sorted(budgets)]
