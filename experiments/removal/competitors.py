"""Removal by fine-tuning: the losses that the field compares with, by their published formulas, and one loop that follows them.

Every loss takes a model, a batch of what must go and a batch of what must stay, and returns a number to be lowered. log p is the
log-likelihood of a text's counted tokens (labels; a question that it answers does not count).

| name | loss | source |
|---|---|---|
| gradient_difference | mean token loss(stay) - mean token loss(go) | Liu et al. 2022 |
| npo | -(2 / beta) mean log sigmoid(-beta (log p - log p0)) + loss(stay), log p summed over tokens | Zhang et al. 2024 |
| simnpo | -(2 / beta) mean log sigmoid(beta (-log p / tokens - delta)), no p0, times its coefficient, + loss(stay) | Fan et al. 2024 |
| rmu | MSE(h(go), c u) + weight MSE(h(stay), h0(stay)), u uniform in [0, 1) over its norm, three down projections alone | Li et al. 2024 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, mse_loss

Batch = Mapping[str, Tensor]
IGNORED = -100


def log_likelihoods(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """((B,) log p of each text summed over its counted tokens, (B,) how many they are), next-token, padding and contexts left out."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    log_probs = model(**given).logits[:, :-1].float().log_softmax(-1)
    picked = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * counted).sum(-1), counted.sum(-1)


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of a token of the batch, nats."""
    summed, tokens = log_likelihoods(model, batch)
    return -summed.sum() / tokens.sum()


def npo_term(log_p: Tensor, log_p0: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(-beta (log p - log p0)) of each text; both (B,), summed over its tokens.

    Example:
        >>> npo_term(torch.tensor([-3.0]), torch.tensor([-3.0]), beta=0.1)  # 20 log 2 where nothing has changed
        tensor([13.8629])
    """
    return -2 / beta * logsigmoid(-beta * (log_p - log_p0))


def simnpo_term(log_p: Tensor, tokens: Tensor, beta: float, delta: float) -> Tensor:
    """-(2 / beta) log sigmoid(beta (-log p / tokens - delta)) of each text: the margin is taken off the token loss, before beta.

    Example:
        >>> simnpo_term(torch.tensor([-2.0, -20.0]), torch.tensor([2, 20]), beta=2.5, delta=0.0)  # length plays no role
        tensor([0.0631, 0.0631])
    """
    return -2 / beta * logsigmoid(beta * (-log_p / tokens - delta))


@dataclass(frozen=True)
class Trained:
    """One way to remove by fine-tuning.

    Attributes:
        loss: (model, go, stay, state, options) -> a number; `state` is what `start` gave.
        start: what is fixed before the first step, from the model and the options.
        trains: which parameters move, by name.
        defaults: of its options, as published.
    """

    loss: Callable[..., Tensor]
    defaults: Mapping[str, float]
    start: Callable[..., Any] = lambda model, options, generator: None
    trains: Callable[[str, Mapping[str, float]], bool] = lambda name, options: True


def _gradient_difference(model: nn.Module, go: Batch, stay: Batch, state: Any, options: Any) -> Tensor:
    return options["retain"] * token_loss(model, stay) - token_loss(model, go)


def _npo(model: nn.Module, go: Batch, stay: Batch, state: Any, options: Any) -> Tensor:
    """`log_p0`, of the model before the removal, comes with the batch: its rows are drawn again and again."""
    log_p, _ = log_likelihoods(model, {k: v for k, v in go.items() if k != "log_p0"})
    term = npo_term(log_p, go["log_p0"], options["beta"]).mean()
    return term + options["retain"] * token_loss(model, stay)


def _simnpo(model: nn.Module, go: Batch, stay: Batch, state: Any, options: Any) -> Tensor:
    log_p, tokens = log_likelihoods(model, go)
    term = simnpo_term(log_p, tokens, options["beta"], options["delta"]).mean()
    return options["coefficient"] * term + options["retain"] * token_loss(model, stay)


def hidden(model: nn.Module, batch: Batch, layer: int) -> Tensor:
    """The outputs of one block, (tokens that are no padding, width)."""
    found = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    )
    chosen: Tensor = found.hidden_states[layer + 1][batch["attention_mask"].bool()]
    return chosen


def steering(width: int, generator: torch.Generator) -> Tensor:
    """RMU's direction: uniform in [0, 1), so all positive, over its norm. (width,)."""
    drawn = torch.rand(width, generator=generator)
    return drawn / drawn.norm()


def _rmu_start(model: Any, options: Any, generator: torch.Generator) -> Tensor:
    return options["c"] * steering(model.config.hidden_size, generator)


def _rmu(model: nn.Module, go: Batch, stay: Batch, state: Tensor, options: Any) -> Tensor:
    layer = int(options["layer"])
    moved = hidden(model, go, layer)
    kept = mse_loss(hidden(model, stay, layer), stay["frozen"])
    return mse_loss(moved, state.to(moved).expand_as(moved)) + options["weight"] * kept


def _rmu_trains(name: str, options: Mapping[str, float]) -> bool:
    last = int(options["layer"])
    return any(f".layers.{layer}.mlp.down_proj" in name for layer in range(last - 2, last + 1))


TRAINED: dict[str, Trained] = {
    "gradient_difference": Trained(_gradient_difference, {"retain": 1.0}),
    "npo": Trained(_npo, {"beta": 0.1, "retain": 1.0}),
    "simnpo": Trained(_simnpo, {"beta": 2.5, "delta": 0.0, "coefficient": 0.1375, "retain": 1.0}),
    "rmu": Trained(_rmu, {"c": 20.0, "weight": 100.0, "layer": 7}, _rmu_start, _rmu_trains),
}


def fine_tuned(
    model: nn.Module,
    name: str,
    go: Iterable[Batch],
    stay: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    options: Mapping[str, float],
    seed: int,
    weight_decay: float = 0.01,
) -> dict[str, Tensor]:
    """The update theta - theta0 after `steps` steps of AdamW on a loss of TRAINED; the model is given back as it was.

    go, stay: endless batches. A loss of 0 is followed like any other: gradient difference begins there.

    Raises:
        ValueError: a loss that is no number, or weights that have not moved: there is nothing to score then.
    """
    way = TRAINED[name]
    options = {**way.defaults, **options}
    generator = torch.Generator().manual_seed(seed)
    state = way.start(model, options, generator)
    moving = {n: p for n, p in model.named_parameters() if way.trains(n, options)}
    if not moving:
        raise ValueError(f"{name}: no parameter of this model is one that it trains (options {options})")
    before = {n: p.detach().clone() for n, p in moving.items()}
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.requires_grad_(n in moving)
    optimizer = torch.optim.AdamW(moving.values(), lr=learning_rate, weight_decay=weight_decay)
    frozen = Frozen(model, name, options)
    try:
        for step, one, other in zip(range(steps), go, stay, strict=False):
            with frozen.weights(before, moving):
                one, other = frozen.added(one, other)
            optimizer.zero_grad()
            loss = way.loss(model, one, other, state, options)
            if not math.isfinite(float(loss.detach())):
                raise ValueError(
                    f"{name}: the loss is {float(loss.detach())} at step {step + 1}; lower the learning rate"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(list(moving.values()), 1.0)
            optimizer.step()
        update = {n: p.detach() - before[n] for n, p in moving.items()}
    finally:
        for n, p in model.named_parameters():
            p.requires_grad_(asked[n])
            p.grad = None
            if n in before:
                p.data.copy_(before[n])
    if not sum(float(value.double().square().sum()) for value in update.values()):
        raise ValueError(f"{name}: no weight has moved after {steps} steps, so there is nothing to score")
    return update


class Frozen:
    """What a loss needs of the model before the removal, of the rows of one batch."""

    def __init__(self, model: nn.Module, name: str, options: Mapping[str, float]) -> None:
        self.model, self.name, self.options = model, name, options

    def weights(self, before: Mapping[str, Tensor], moving: Mapping[str, nn.Parameter]) -> Swap:
        """For a while the weights before the removal, where the loss asks for them."""
        return Swap(before, moving) if self.name in ("npo", "rmu") else Swap({}, {})

    @torch.no_grad()
    def added(self, go: Batch, stay: Batch) -> tuple[Batch, Batch]:
        """The batches with `log_p0` (NPO) or `frozen` hidden states (RMU)."""
        if self.name == "npo":
            return {**go, "log_p0": log_likelihoods(self.model, go)[0]}, stay
        if self.name == "rmu":
            return go, {**stay, "frozen": hidden(self.model, stay, int(self.options["layer"]))}
        return go, stay


class Swap:
    """Parameters with other values inside a `with`."""

    def __init__(self, values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        self.values, self.parameters = values, parameters

    def __enter__(self) -> None:
        self.now = {name: self.parameters[name].data for name in self.values}
        for name, value in self.values.items():
            self.parameters[name].data = value

    def __exit__(self, *_: object) -> None:
        for name, value in self.now.items():
            self.parameters[name].data = value
