"""A world small enough to fail in: bags of tokens in domains, and a net with an embedding, a BatchNorm and a head.

Every token speaks for some of the classes; what they say adds up to the log-odds of a text's class. A domain has tokens
of its own, which mean something else there than elsewhere; the base learns the general meaning, each task its domain's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmatch.estimators import Curvature, estimate

VOCABULARY, LENGTH, CLASSES, WIDTH = 96, 12, 4, 48
TRAIN, TEST, BATCH = 4096, 256, 64
Weights = dict[str, Tensor]
Data = tuple[Tensor, Tensor]


class TinyNet(nn.Module):
    """Tokens (B, L) -> logits (B, C): embedding, linear, BatchNorm, mean over tokens, hidden layer, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH // 2)
        self.token = nn.Linear(WIDTH // 2, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(self.embedding(tokens))  # (B, L, W)
        x = torch.relu(self.norm(x.transpose(1, 2))).mean(2)  # (B, W)
        return self.head(torch.relu(self.hidden(x)))


@dataclass(frozen=True)
class Domain:
    """How texts of one domain come about: how often each token occurs, and what it speaks for, (V,) and (V, C)."""

    frequency: Tensor
    meaning: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Data:
        """Tokens (count, L) and classes (count,)."""
        tokens = torch.multinomial(
            self.frequency.expand(count, -1), LENGTH, replacement=True, generator=generator
        )
        return tokens, torch.multinomial(self.meaning[tokens].sum(1).softmax(1), 1, generator=generator)[:, 0]


@dataclass
class World:
    """A base, its tasks, their data and curvatures: what a merge is made of.

    Attributes:
        seed: of everything.
        base: theta0; tasks: name -> theta_t; curvatures: name (and "base") -> Fisher of the summed loss.
        train, test: name -> data of its domain; test["base"] are texts of no domain.
        domains: name -> Domain.
    """

    seed: int
    base: Weights
    tasks: dict[str, Weights]
    curvatures: dict[str, Curvature]
    train: dict[str, Data]
    test: dict[str, Data]
    domains: dict[str, Domain]

    def batches(self) -> dict[str, list[Data]]:
        """Held-out batches by task, and of the base's own kind, for a diagnosis."""
        return {name: split(self.test[name]) for name in (*self.tasks, "base")}


def make_world(seed: int, names: Sequence[str] = ("news", "reviews", "chat")) -> World:
    """Train a base and its fine-tunes from scratch (about three seconds)."""
    generator = torch.Generator().manual_seed(seed)
    meaning = torch.randn(VOCABULARY, CLASSES, generator=generator)
    group = torch.arange(VOCABULARY)[torch.randperm(VOCABULARY, generator=generator)] % (
        len(names) + 1
    )  # 0: common
    domains = {}
    for number, name in enumerate(names, 1):
        own = group == number
        frequency = 0.5 * own / own.sum() + 0.4 * (group == 0) / (group == 0).sum() + 0.1 / VOCABULARY
        bend = own[:, None] * torch.randn(VOCABULARY, CLASSES, generator=generator)
        domains[name] = Domain(frequency, meaning + bend)
    uniform = Domain(torch.full((VOCABULARY,), 1 / VOCABULARY), meaning)
    base_data = uniform.sample(8 * TRAIN, generator)
    train = {name: domain.sample(TRAIN, generator) for name, domain in domains.items()}
    test = {name: domain.sample(TEST, generator) for name, domain in domains.items()}
    test["base"] = uniform.sample(TEST, torch.Generator().manual_seed(seed + 1_000_000))
    base = train_net(initial(seed), base_data, steps=1200, rate=3e-3, seed=seed)
    tasks = {name: fine_tune(base, train[name], seed) for name in names}
    curvatures = {name: curvature_of(tasks[name], train[name]) for name in names}
    curvatures["base"] = curvature_of(base, base_data)
    return World(seed, base, tasks, curvatures, train, test, domains)


def initial(seed: int) -> Weights:
    """Weights of a fresh net; its activations before the BatchNorm are of scale 5, so that the statistics matter."""
    torch.manual_seed(seed)
    weights = state(TinyNet())
    weights["token.weight"] *= 5
    return weights


def fine_tune(
    base: Mapping[str, Tensor], data: Data, seed: int, steps: int = 80, rate: float = 1e-3
) -> Weights:
    """A fine-tune as one would do it: short, at a small rate."""
    return train_net(base, data, steps=steps, rate=rate, seed=seed + 1)


def train_net(start: Mapping[str, Tensor], data: Data, *, steps: int, rate: float, seed: int) -> Weights:
    """Adam from `start` on random batches."""
    net = net_of(start).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data[0][chosen]), data[1][chosen]).backward()
        optimizer.step()
    return state(net)


def curvature_of(
    weights: Mapping[str, Tensor], data: Data, examples: int = 512, **options: object
) -> Curvature:
    """Fisher of the loss summed over the training set, from its first `examples`."""
    batches = split((data[0][:examples], data[1][:examples]))
    return estimate(
        net_of(weights), batches, num_examples=len(data[1]), standard_error=True, progress=False, **options
    )


def net_of(weights: Mapping[str, Tensor]) -> TinyNet:
    """A net with these weights, in eval mode."""
    net = TinyNet()
    net.load_state_dict(dict(weights))
    return net.eval()


def state(net: nn.Module) -> Weights:
    """A detached copy of a net's weights and buffers."""
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def split(data: Data, size: int = BATCH) -> list[Data]:
    """Batches of (tokens, classes)."""
    return list(zip(data[0].split(size), data[1].split(size), strict=True))
