"""One pass over the weights of all models, a piece of a tensor at a time: everything that can be said from files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from gradmatch.common.layers import layer_group
from gradmatch.diagnosis.moved import MovedRows, find_moved_rows, turned
from gradmatch.diagnosis.source import PIECE, Source, as_matrix, pieces
from gradmatch.engine.workers import parallel
from gradmatch.measure import conflict, health, similarity

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.checkpoint import Checkpoint

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm: measured, not trained


@dataclass
class TensorScan:
    """What one tensor says; T tasks in order.

    Attributes:
        numel: number of weights.
        base_square: ||theta0||^2; base_dots: (T,) theta0'tau_t.
        gram: (T, T) tau_s'tau_t, units of weight squared.
        cosine: (T,) cosine of theta_t with theta0.
        rank: (T,) effective rank of tau_t; 0 for vectors.
        conflicts: (T, T) number of weights with opposite signs, moved_both: (T, T) number where both moved.
        moved: task position -> MovedRows, for matrices whose rows changed place; transposed: positions of tasks whose (square)
            matrix is nearer to the base's transposed one.
        products: (T,) tau_t'(merged - base) and delta_square ||merged - base||^2; rounding: expected energy of storing the
            merge in `grid`, the half precision that every merged value has while a fine-tune's have not ("": none).
        storage: expected rounding energy of the precision that the merge's values have, whatever the fine-tunes have.
        outside: energy of the merge's update that no reweighting of the task vectors makes (0 where the rule has no bound).
    """

    numel: int
    base_square: float
    base_dots: Tensor
    gram: Tensor
    cosine: Tensor
    rank: list[float]
    conflicts: Tensor
    moved_both: Tensor
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
        missing: model -> tensors of the base that it lacks.
        shapes: model -> tensor -> (base's shape, its shape).
    """

    tasks: list[str]
    tensors: dict[str, TensorScan] = field(default_factory=dict)
    nonfinite: dict[str, dict[str, int]] = field(default_factory=dict)
    zeros: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)

    def gram(self, names: Iterable[str] | None = None) -> Tensor:
        """(T, T) tau_s'tau_t over some tensors (None: all)."""
        return self._sum(t.gram for t in self._chosen(names))

    def groups(self) -> dict[str, list[str]]:
        """Layer group -> its tensors, in order."""
        groups: dict[str, list[str]] = {}
        for name in self.tensors:
            groups.setdefault(layer_group(name), []).append(name)
        return groups

    def norms(self) -> dict[str, float]:
        """Task -> ||tau_t||."""
        lengths = self.gram().diagonal().clamp(min=0).sqrt()
        return dict(zip(self.tasks, lengths.tolist(), strict=True))

    def cosines(self) -> Tensor:
        """(T, T) cosine of the task vectors."""
        return similarity.cosines(self.gram())

    def conflict_rates(self) -> Tensor:
        """(T, T) share of weights that both tasks moved, in opposite directions; 1/2 for unrelated tasks."""
        against = self._sum(t.conflicts for t in self.tensors.values())
        return against / self._sum(t.moved_both for t in self.tensors.values()).clamp(min=1)

    def projection(self, names: Iterable[str] | None = None) -> tuple[dict[str, float], float]:
        """Coordinates of the merge's update in span{tau} (least squares, over some tensors or all) and the share of its energy outside."""
        chosen = self._chosen(names)
        products = self._sum(t.products[:, None] for t in chosen if t.products is not None)[:, 0]
        square = sum(t.delta_square for t in chosen)
        c, residual = similarity.projection(self._sum(t.gram for t in chosen), products, square)
        return dict(zip(self.tasks, c.tolist(), strict=True)), residual

    def _chosen(self, names: Iterable[str] | None) -> list[TensorScan]:
        return [self.tensors[name] for name in (self.tensors if names is None else names)]

    def _sum(self, values: Iterable[Tensor]) -> Tensor:
        return sum(values, torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64))


def scan_weights(
    base: Checkpoint,
    tasks: Mapping[str, Checkpoint],
    merged: Checkpoint | None,
    reach: Sequence[float] | None,
    *,
    progress: bool = False,
) -> Scan:
    """Read every tensor of every model once and note what it says; rows that seem to have moved are read once more.

    Args:
        base: theta0.
        tasks: task -> theta_t.
        merged: theta, where there is one.
        reach: largest coefficient that the rule can give each task's entries, in the order of the tasks; None: no bound.
        progress: show a progress bar.
    """
    scan = Scan(list(tasks))
    models = {"base": base, **tasks, **({} if merged is None else {"merged": merged})}
    for model, weights in models.items():
        if model != "base":
            scan.missing[model] = [name for name in base if name not in weights]
            scan.shapes[model] = {}

    def read(name: str) -> tuple[dict[str, Source], TensorScan | None]:
        held = {model: Source(weights, name) for model, weights in models.items() if name in weights}
        ours = held["base"]
        alike = {model: source for model, source in held.items() if source.spec.shape == ours.spec.shape}
        trained = ours.spec.floating and ours.spec.numel and not name.endswith(STATISTICS)
        scanned = None
        if trained and alike.keys() >= set(tasks):
            scanned = scan_tensor(ours, [alike[task] for task in tasks], alike.get("merged"), reach)
        for model, source in held.items():
            if scanned is None or model not in alike:
                for first, last in pieces(*as_matrix(source.spec.shape)):
                    source.read(first, last)
        return held, scanned

    jobs = ((name, partial(read, name)) for name in base)
    bar = tqdm(parallel(jobs), "weights", len(base), unit="tensor", disable=not progress)
    for name, (held, scanned) in bar:
        ours = held["base"]
        for model, source in held.items():
            if source.nonfinite:
                scan.nonfinite.setdefault(model, {})[name] = source.nonfinite
            if source.spec.shape != ours.spec.shape:
                scan.shapes[model][name] = (ours.spec.shape, source.spec.shape)
            elif source.zero and not ours.zero and ours.spec.numel > 1 and not name.endswith(STATISTICS):
                scan.zeros.setdefault(model, []).append(name)
        if scanned is not None and not any(source.nonfinite for source in held.values()):
            scan.tensors[name] = scanned
    return scan


def scan_tensor(
    base: Source, tasks: Sequence[Source], merged: Source | None, reach: Sequence[float] | None
) -> TensorScan:
    """Everything about one tensor (see `TensorScan`), of T tasks; sums are in float64."""
    shape, t = base.spec.shape, len(tasks)
    rows, width = as_matrix(shape)
    everyone = [base, *tasks, *([] if merged is None else [merged])]
    dots, both, against = _zeros(len(everyone), len(everyone)), _zeros(t, t), _zeros(t, t)
    limits = None if reach is None else torch.tensor(reach)
    ranks = similarity.Ranks(t, rows, width, PIECE) if len(shape) > 1 else None
    kept, squares = torch.zeros(t, rows), torch.zeros(t + 1, rows)  # of each row: theta0'theta_t, ||theta||^2
    outside = spacing = 0.0
    for first, last in pieces(rows, width):
        x = torch.stack([source.read(first, last) for source in everyone])
        if rows > 1:
            part = x[: t + 1].view(t + 1, -1, min(width, last - first))
            place = slice(first // width, first // width + part.shape[1])
            squares[:, place] += part.square().sum(2)
            kept[:, place] += (part[0] * part[1:]).sum(2)
        if merged is not None:
            spacing += health.spacing_energy(x[-1])
        x[1:] -= x[0]
        tau = x[1 : t + 1]
        wide = x.double()
        dots += wide @ wide.T  # of theta0, every tau_t, and the merge's update
        signs = tau.sign()
        moving = signs.abs()
        together = moving @ moving.T  # counts below 2^24: exact in float32
        both += together
        against += (together - signs @ signs.T) / 2
        if merged is not None and limits is not None:
            outside += conflict.outside_hull(x[-1], tau, limits)
        if ranks is not None:
            ranks.add(tau)
    square, base_dots, gram = float(dots[0, 0]), dots[0, 1 : t + 1], dots[1 : t + 1, 1 : t + 1]
    # theta0'theta_t = theta0'theta0 + theta0'tau_t; a model that is zero counts as unmoved
    lengths = (square * (square + 2 * base_dots + gram.diagonal()).clamp(min=0)).sqrt()
    cosine = torch.where(lengths > 0, (square + base_dots) / lengths.clamp(min=1e-300), 1.0)
    result = TensorScan(
        numel=base.spec.numel,
        base_square=square,
        base_dots=base_dots,
        gram=gram,
        cosine=cosine,
        rank=[0.0] * t if ranks is None else ranks.found(gram.diagonal()),
        conflicts=against.fill_diagonal_(0),
        moved_both=both.fill_diagonal_(0),
    )
    if merged is not None:
        result.products, result.delta_square, result.outside = (
            dots[-1, 1 : t + 1],
            float(dots[-1, -1]),
            outside,
        )
        grid = next(iter(merged.grids), torch.float32)
        result.storage = spacing * torch.finfo(grid).eps ** 2 / 12
        if merged.grids and not all(grid in task.grids for task in tasks):
            result.grid, result.rounding = str(grid).removeprefix("torch."), result.storage
    if len(shape) > 1 and bool(dots.isfinite().all()):
        for i, task in enumerate(tasks):
            norms = (squares[0] * squares[i + 1]).sqrt()
            own = torch.where(norms > 0, kept[i] / norms.clamp(min=1e-30), 1.0)
            found = find_moved_rows(base, task, own)
            if found is not None:
                result.moved[i] = found
            if turned(base, task, float(cosine[i])):
                result.transposed.add(i)
    return result


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)
