"""One pass over the weights of all models, a tensor at a time: everything that can be said from files alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from gradmatch.common.layers import layer_group
from gradmatch.measure import conflict, health, similarity

if TYPE_CHECKING:
    from torch import Tensor

Model = Mapping[str, "Tensor"]
CHUNK = 2**20  # values of each model at a time in float64: 8 MB
# At a cosine of 1/sqrt(2) as much is new as is kept: below, a tensor or row is nearer to an unrelated one than to the base's.
KEPT = math.sqrt(0.5)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm: measured, not trained


@dataclass(frozen=True)
class MovedRows:
    """Rows of a matrix that look like other rows of the base's.

    Attributes:
        suspects: how many rows kept less of themselves than they changed.
        rows: rows of the matrix.
        elsewhere: other rows that the suspects looked up match closely, each counted once, as a share of those suspects.
        offset: the most frequent (match - row) among those, modulo the number of rows.
        offset_share: share of those that have it.
    """

    suspects: int
    rows: int
    elsewhere: float
    offset: int
    offset_share: float


@dataclass
class TensorScan:
    """What one tensor says; T tasks in order.

    Attributes:
        numel: number of weights.
        base_square: ||theta0||^2; base_dots: (T,) theta0'tau_t.
        gram: (T, T) tau_s'tau_t, units of weight squared.
        cosine: (T,) cosine of theta_t with theta0.
        rank: (T,) effective rank of tau_t.
        conflicts: (T, T) number of weights with opposite signs, moved_both: (T, T) number where both moved.
        moved: task position -> MovedRows, for matrices whose rows changed place; transposed: positions of tasks whose (square)
            matrix is nearer to the base's transposed one.
        products: (T,) tau_t'(merged - base) and delta_square ||merged - base||^2; rounding: expected energy of storing the
            merge in `grid`, the half precision that every merged value has while a fine-tune's have not ("": none).
        storage: expected rounding energy of the precision that the merge's values have, whatever the fine-tunes have.
        outside: energy of the merge's update that no reweighting of the task vectors makes (0 where the rule has no bound).
    """

    numel: int
    base_dots: Tensor
    gram: Tensor
    conflicts: Tensor
    moved_both: Tensor
    base_square: float = 0.0
    cosine: Tensor = field(default_factory=lambda: torch.zeros(0))
    rank: list[float] = field(default_factory=list)
    moved: dict[int, MovedRows] = field(default_factory=dict)
    transposed: set[int] = field(default_factory=set)
    products: Tensor | None = None
    delta_square: float = 0.0
    rounding: float = 0.0
    storage: float = 0.0
    grid: str = ""
    outside: float = 0.0


@dataclass
class Scan:
    """The whole pass.

    Attributes:
        tasks: names, T of them.
        tensors: name -> TensorScan, for trained tensors that the base and every task share.
        nonfinite: model ("base", a task, "merged") -> tensor -> number of NaN or infinite entries.
        zeros: model -> tensors that are zero everywhere while the base's are not.
        missing: model -> tensors of the base that it lacks; extra: tensors that the base lacks.
        shapes: model -> tensor -> (base's shape, its shape).
    """

    tasks: list[str]
    tensors: dict[str, TensorScan] = field(default_factory=dict)
    nonfinite: dict[str, dict[str, int]] = field(default_factory=dict)
    zeros: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)

    def gram(self, names: Iterable[str] | None = None) -> Tensor:
        """(T, T) tau_s'tau_t over some tensors (None: all)."""
        chosen = self.tensors if names is None else names
        zero = torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64)
        return sum((self.tensors[name].gram for name in chosen), zero)

    def groups(self) -> dict[str, list[str]]:
        """Layer group -> its tensors, in order."""
        groups: dict[str, list[str]] = {}
        for name in self.tensors:
            groups.setdefault(layer_group(name), []).append(name)
        return groups

    def norms(self) -> dict[str, float]:
        """Task -> ||tau_t||."""
        return {
            task: math.sqrt(max(0.0, float(v)))
            for task, v in zip(self.tasks, self.gram().diagonal(), strict=True)
        }

    def cosines(self) -> Tensor:
        """(T, T) cosine of the task vectors."""
        return similarity.cosines(self.gram())

    def conflict_rates(self) -> Tensor:
        """(T, T) share of weights that both tasks moved, in opposite directions; 1/2 for unrelated tasks."""
        zero = torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64)
        against = sum((t.conflicts for t in self.tensors.values()), zero)
        moving = sum((t.moved_both for t in self.tensors.values()), zero)
        return against / moving.clamp(min=1)

    def projection(self, names: Iterable[str] | None = None) -> tuple[dict[str, float], float]:
        """Coordinates of the merge's update in span{tau} (least squares, over some tensors or all) and the share of its energy outside."""
        chosen = [self.tensors[name] for name in (self.tensors if names is None else names)]
        zero = torch.zeros(len(self.tasks), dtype=torch.float64)
        products = sum((t.products for t in chosen if t.products is not None), zero)
        square = sum(t.delta_square for t in chosen)
        c, residual = similarity.projection(self.gram(names), products, square)
        return dict(zip(self.tasks, c.tolist(), strict=True)), residual


def scan_weights(
    base: Model,
    tasks: Mapping[str, Model],
    merged: Model | None,
    reach: Sequence[float] | None,
    *,
    progress: bool = False,
) -> Scan:
    """Read every tensor of every model once and note what it says.

    Args:
        base: theta0.
        tasks: task -> theta_t.
        merged: theta, where there is one.
        reach: largest coefficient that the rule can give each task's entries, in the order of the tasks; None: no bound.
        progress: show a progress bar.
    """
    scan = Scan(list(tasks))
    models = {**tasks, **({} if merged is None else {"merged": merged})}
    for model, weights in models.items():
        scan.missing[model] = [name for name in base if name not in weights]
        scan.extra[model] = [name for name in weights if name not in base]
        scan.shapes[model] = {}
    for name in tqdm(list(base), desc="weights", unit="tensor", disable=not progress):
        theta0 = base[name]
        held = {model: weights[name] for model, weights in models.items() if name in weights}
        for model, theta in {"base": theta0, **held}.items():
            bad = health.count_nonfinite(theta)
            if bad:
                scan.nonfinite.setdefault(model, {})[name] = bad
            if theta.shape != theta0.shape:
                scan.shapes[model][name] = (tuple(theta0.shape), tuple(theta.shape))
            elif name.endswith(STATISTICS) or theta.numel() < 2 or model == "base":
                continue
            elif not theta.any() and theta0.any():
                scan.zeros.setdefault(model, []).append(name)
        same = all(task in held and held[task].shape == theta0.shape for task in tasks)
        finite = not any(name in found for found in scan.nonfinite.values())
        trained = theta0.is_floating_point() and not name.endswith(STATISTICS)
        if trained and theta0.numel() and same and finite:
            ours = held.get("merged")
            ours = ours if ours is not None and ours.shape == theta0.shape else None
            scan.tensors[name] = scan_tensor(theta0, [held[task] for task in tasks], ours, reach)
    return scan


def scan_tensor(
    theta0: Tensor, thetas: Sequence[Tensor], merged: Tensor | None, reach: Sequence[float] | None
) -> TensorScan:
    """Everything about one tensor (see `TensorScan`). theta0, merged: (*s,); thetas: T of (*s,).

    Held are the task vectors in float32; sums are taken over CHUNK values at a time, in float64.
    """
    before = theta0.float()
    flat = before.flatten()
    taus = torch.stack([theta.float().flatten() - flat for theta in thetas])  # (T, P)
    t = len(thetas)
    result = TensorScan(
        numel=theta0.numel(),
        base_dots=_zeros(t),
        gram=_zeros(t, t),
        conflicts=_zeros(t, t),
        moved_both=_zeros(t, t),
    )
    grid = torch.float32
    if merged is not None:
        result.products = _zeros(t)
        grid = next((d for d in (torch.bfloat16, torch.float16) if health.on_grid(merged, d)), torch.float32)
        theta = merged.flatten()
    limits = torch.tensor(reach) if reach is not None else None
    for first in range(0, theta0.numel(), CHUNK):
        part = slice(first, first + CHUNK)
        tau, base = taus[:, part].double(), flat[part].double()
        result.base_square += float(base @ base)
        result.base_dots += tau @ base
        result.gram += tau @ tau.T
        signs = taus[:, part].sign()
        both = (signs.abs() @ signs.abs().T).double()  # counts below 2^24: exact in float32
        result.moved_both += both
        result.conflicts += (both - (signs @ signs.T).double()) / 2
        if result.products is not None:
            delta = theta[part].float() - flat[part]
            wide = delta.double()
            result.products += tau @ wide
            result.delta_square += float(wide @ wide)
            result.storage += health.rounding_energy(theta[part], grid)
            if limits is not None:
                result.outside += conflict.outside_hull(delta, taus[:, part], limits)
    result.conflicts.fill_diagonal_(0)
    result.moved_both.fill_diagonal_(0)
    # theta0'theta_t = theta0'theta0 + theta0'tau_t; a model that is zero counts as unmoved
    squares = (result.base_square + 2 * result.base_dots + result.gram.diagonal()).clamp(
        min=0
    ) * result.base_square
    moved = (result.base_square + result.base_dots) / squares.sqrt().clamp(min=1e-300)
    result.cosine = torch.where(squares > 0, moved, torch.ones_like(moved))
    result.rank = [
        similarity.effective_rank(tau.view(theta0.shape)) if theta0.ndim > 1 else 0.0 for tau in taus
    ]
    if theta0.ndim > 1:
        for i, theta_t in enumerate(thetas):
            after = theta_t.float()
            found = find_moved_rows(before.flatten(1), after.flatten(1))
            if found is not None:
                result.moved[i] = found
            if turned(before, after, float(result.cosine[i])):
                result.transposed.add(i)
    if grid != torch.float32 and not all(health.on_grid(theta_t.float(), grid) for theta_t in thetas):
        result.grid, result.rounding = str(grid).removeprefix("torch."), result.storage
    return result


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def turned(before: Tensor, after: Tensor, cosine: float) -> bool:
    """Whether a square matrix kept less of itself than it changed, and is nearer to the base's transposed one. (R, R, ...) twice."""
    if cosine >= KEPT or before.shape[0] != before.shape[1]:
        return False
    other = before.transpose(0, 1).reshape(1, -1)
    return float(similarity.row_cosines(other, after.reshape(1, -1))) >= KEPT


def find_moved_rows(before: Tensor, after: Tensor) -> MovedRows | None:
    """Where rows went; None where fewer than two rows changed more than they kept. (R, P), (R, P).

    Matrices of fewer than eight rows (heads of a few classes) are left out: a match among so few says little.
    """
    if len(before) < 8:
        return None
    own = similarity.row_cosines(before, after)
    suspects, match, close = similarity.moved_rows(before, after, own)
    if len(suspects) < 2:
        return None
    # The best of R random directions in P dimensions has a cosine of about sqrt(2 ln R / P): a match must be closer.
    by_chance = math.sqrt(2 * math.log(len(before)) / before.shape[1])
    elsewhere = (match != suspects) & (close >= min(0.99, max(KEPT, by_chance)))
    offsets = (match - suspects)[elsewhere] % len(before)
    offset, share = 0, 0.0
    if len(offsets):
        values, counts = torch.unique(offsets, return_counts=True)
        offset, share = int(values[counts.argmax()]), float(counts.max() / len(offsets))
    # Another order sends no two rows to one place; rows that a long update bent into its own direction all resemble the same few.
    places = len(torch.unique(match[elsewhere]))
    return MovedRows(int((own < KEPT).sum()), len(before), places / len(suspects), offset, share)
