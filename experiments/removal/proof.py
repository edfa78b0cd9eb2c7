"""Removal where the truth can be computed: train on everything, remove a part, compare with training without that part.

What is to go are examples with wrong labels. Three problems: ridge regression, where Eq. 13 is exact; logistic regression
on handwritten digits, fine-tuned exactly as Eq. 8 says; a small network, fine-tuned as one would.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from experiments.convex import Objective, Softmax
from experiments.files import write_json
from gradmatch import Task, subtract
from gradmatch.estimators import Curvature, estimate

POISONED = (3, 5, 8)  # classes of which some examples carry the label of the next class
SHARE = 0.4  # of the training examples of these classes
TEST = 500
L2 = 1.0  # weight decay of both classifiers, in nats per squared unit
KEEP = 0.1
LABELS = {"removal": "GM", "negation": "TA", "ewr": "EWR", "fisher_negation": "Fisher negation"}

Vector = dict[str, Tensor]
Logits = Callable[[Vector, Any], Tensor]  # of weights, and of inputs


@dataclass(frozen=True)
class Parts:
    """Inputs with labels (n,): to remove (labels wrong), and unseen ones of both kinds."""

    remove: tuple[Any, Tensor]
    unseen: tuple[Any, Tensor]
    unseen_wrong: tuple[Any, Tensor]


@dataclass(frozen=True)
class Digits(Parts):
    """Images (n, 64), and those to keep."""

    keep: tuple[Tensor, Tensor]

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Everything that the first model was trained on."""
        return torch.cat([self.keep[0], self.remove[0]]), torch.cat([self.keep[1], self.remove[1]])


def digits(seed: int, dtype: torch.dtype) -> Digits:
    """scikit-learn's handwritten digits, split by the seed; some examples of three classes are given the next label."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn: pip install 'gradmatch[removal]'"
        ) from error

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.tensor(images, dtype=dtype)[order] / 16 - 0.3, torch.tensor(labels)[order]
    poisoned = torch.isin(y, torch.tensor(POISONED))
    drawn = poisoned & (torch.rand(len(y), generator=generator) < SHARE)
    train = torch.arange(len(y)) >= TEST
    wrong = (y + 1) % 10
    return Digits(
        keep=(x[train & ~drawn], y[train & ~drawn]),
        remove=(x[train & drawn], wrong[train & drawn]),
        unseen=(x[~train], y[~train]),
        unseen_wrong=(x[~train & poisoned], wrong[~train & poisoned]),
    )


def measured(logits: Logits, edits: Mapping[tuple[str, float], Vector], data: Parts) -> list[dict[str, Any]]:
    """How near each edit is to the model trained without what was to go, and what it knows; by name and alpha.

    distance: ||theta - truth|| / ||base - truth||. kl: mean KL(truth || edit) of predictions on unseen examples, nats.
    removed: share of the removed examples that still get their wrong label. accuracy: on unseen ones. gap: loss of
    unseen wrong examples less that of the removed ones, nats; 0 where nothing tells who was a member.
    """
    truth, base = edits["retrained", 0.0], edits["base", 0.0]

    def distance(theta: Vector) -> float:
        return sum(float((theta[name] - truth[name]).double().square().sum()) for name in base) ** 0.5

    def accuracy(found: Tensor, labels: Tensor) -> float:
        return float((found.argmax(-1) == labels).double().mean())

    true = logits(truth, data.unseen[0]).double().log_softmax(-1)
    rows = []
    for (name, alpha), theta in edits.items():
        parts = (data.unseen, data.remove, data.unseen_wrong)
        unseen, known, wrong = (logits(theta, x) for x, _ in parts)
        found = unseen.double().log_softmax(-1)
        row = {
            "distance": distance(theta) / distance(base),
            "kl": float((true.exp() * (true - found)).sum(-1).mean()),
            "removed": accuracy(known, data.remove[1]),
            "accuracy": accuracy(unseen, data.unseen[1]),
            "gap": float(cross_entropy(wrong, data.unseen_wrong[1]) - cross_entropy(known, data.remove[1])),
        }
        rows.append({"edit": name, "alpha": alpha, **row})
    return rows


def removal_full(theta0: Tensor, tau: Tensor, alpha: float, h0: Tensor, h: Tensor, keep: float) -> Tensor:
    """Eq. 13 of Daheim et al. 2024 with full matrices: theta0 - alpha (H0 - alpha H_t)^-1 (H0 + H_t) tau.

    Guarded as the diagonal rule is, along the eigenvectors of H0^-1/2 H_t H0^-1/2 = sum lambda v v': each alpha lambda is at
    most 1 - keep. theta0, tau: (P,); h0, h: (P, P) of summed losses, h0 positive definite. Returns (P,).
    """
    root = torch.linalg.cholesky(h0)  # h0 = root root'
    half = torch.linalg.solve_triangular(root, h, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    values = values.clamp(max=(1 - keep) / alpha)
    step = (1 + values) / (1 - alpha * values) * (vectors.T @ (root.T @ tau))
    return theta0 - alpha * torch.linalg.solve_triangular(root.T, (vectors @ step)[:, None], upper=True)[:, 0]


def diagonal_edits(
    base: Vector, task: Vector, curvatures: Sequence[Curvature], alphas: Sequence[float], delta0: float
) -> dict[tuple[str, float], Vector]:
    """Every elementwise way to remove, at every alpha, by `gradmatch.subtract`. curvatures: of base and task."""
    h0, h = curvatures
    edits: dict[tuple[str, float], Vector] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*clamped.*")  # it is part of what is compared
        for method, label in LABELS.items():
            for alpha in alphas:
                shared: Any = {"base_curvature": h0, "delta0": delta0, "keep": KEEP, "guard": "scale"}
                edited = subtract(base, Task(task, h), method=method, weight=alpha, **shared)
                edits[label, alpha] = dict(edited)
    return edits


def ridge(out: Path, *, seed: int, dimension: int = 12) -> None:
    """Stage: ridge regression in float64; removal with the full Hessian is retraining. Writes `out/rows.json`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = draw(dimension, dimension)
    x, x_wrong = draw(60, dimension) @ mixing, draw(20, dimension) @ mixing
    y, y_wrong = x @ draw(dimension), x_wrong @ draw(dimension)  # two truths
    h_keep, h = x.T @ x + torch.eye(dimension, dtype=torch.float64), x_wrong.T @ x_wrong
    h0 = h_keep + h
    truth = torch.linalg.solve(h_keep, x.T @ y)
    base = torch.linalg.solve(h0, x.T @ y + x_wrong.T @ y_wrong)
    task = torch.linalg.solve(h0 + h, h0 @ base + x_wrong.T @ y_wrong)  # Eq. 8
    edits = {
        ("base", 0.0): {"w": base},
        ("GM, full H", 1.0): {"w": removal_full(base, task - base, 1.0, h0, h, 1e-9)},
    }
    diagonals = [Curvature.from_dict({"w": matrix.diag()}, 1) for matrix in (h0, h)]
    edits |= diagonal_edits({"w": base}, {"w": task}, diagonals, (1.0,), 1e-12)
    gap = float((base - truth).norm())
    distances = {key: float((theta["w"] - truth).norm()) / gap for key, theta in edits.items()}
    rows = [{"edit": e, "alpha": a, "distance": value} for (e, a), value in distances.items()]
    write_json(out / "rows.json", rows)


def logistic(out: Path, *, seed: int, alphas: Sequence[float]) -> None:
    """Stage: logistic regression on digits, float64, all optima exact (Newton), fine-tuned by Eq. 8 with the full Hessian."""
    data, classes = digits(seed, torch.float64), 10
    features = data.keep[0].shape[1] + 1
    prior = L2 * torch.eye(classes * features, dtype=torch.float64)
    zero, one = torch.zeros(len(prior), dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def with_constant(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 1), value=1.0)

    def loss(part: tuple[Tensor, Tensor]) -> Softmax:
        return Softmax(with_constant(part[0]), part[1])

    def minimum(part: tuple[Tensor, Tensor], h: Tensor, centre: Tensor) -> Tensor:
        """argmin of the summed loss + 1/2 (w - centre)'h(w - centre)."""
        return Objective([loss(part)], one, centre, h).minimum(centre, tolerance=1e-10)

    def logits(theta: Vector, x: Tensor) -> Tensor:
        return with_constant(x) @ theta["w"].view(classes, features).T

    base, truth = minimum(data.both, prior, zero), minimum(data.keep, prior, zero)
    h0 = loss(data.both).hessian(base) + prior
    task = minimum(data.remove, h0, base)
    h = loss(data.remove).hessian(task)
    edits = {("base", 0.0): base, ("retrained", 0.0): truth}
    edits |= {("GM, full H", alpha): removal_full(base, task - base, alpha, h0, h, KEEP) for alpha in alphas}
    vectors = {key: {"w": value} for key, value in edits.items()}
    diagonals = [Curvature.from_dict({"w": matrix.diag()}, 1) for matrix in (h0, h)]
    vectors |= diagonal_edits({"w": base}, {"w": task}, diagonals, alphas, 1e-12)
    write_json(out / "rows.json", measured(logits, vectors, data))


def network(
    out: Path, *, seed: int, alphas: Sequence[float], steps: int, tuning_steps: int, learning_rate: float
) -> None:
    """Stage: a network of one hidden layer on digits: Adam, a few steps of fine-tuning, Monte-Carlo Fisher (example-wise).

    Fine-tuning on what is to keep, for as many steps as the fine-tuning on what is to go, is the last competitor.
    """
    data = digits(seed, torch.float32)
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    start = {name: value.detach().clone() for name, value in module.named_parameters()}

    def logits(theta: Vector, x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, theta, (x,))
        return found

    def trained(theta: Vector, part: tuple[Tensor, Tensor], count: int, rate: float, decay: float) -> Vector:
        leaves = {name: value.clone().requires_grad_(True) for name, value in theta.items()}
        optimizer = torch.optim.Adam(leaves.values(), lr=rate)
        for _ in range(count):
            penalty = sum((value.square().sum() for value in leaves.values()), torch.zeros(()))
            loss = cross_entropy(logits(leaves, part[0]), part[1], reduction="sum") + 0.5 * decay * penalty
            optimizer.zero_grad()
            (loss / len(part[1])).backward()
            optimizer.step()
        return {name: value.detach() for name, value in leaves.items()}

    base, truth = (trained(start, part, steps, 1e-2, L2) for part in (data.both, data.keep))
    task = trained(base, data.remove, tuning_steps, learning_rate, 0.0)
    curvatures = []
    for theta, part in ((base, data.both), (task, data.remove)):
        module.load_state_dict(theta)
        curvatures.append(estimate(module, [part], samples=4, seed=seed, progress=False))
    edits: dict[tuple[str, float], Vector] = {("base", 0.0): base, ("retrained", 0.0): truth}
    edits["fine-tuned on the rest", 0.0] = trained(base, data.keep, tuning_steps, learning_rate, L2)
    edits |= diagonal_edits(base, task, curvatures, alphas, L2)
    write_json(out / "rows.json", measured(logits, edits, data))
