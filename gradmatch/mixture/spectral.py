"""What is known of task vectors without data: their leading directions, by which a router chooses, and their low-rank parts (SMILE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from gradmatch.common.warning import warn
from gradmatch.mixture.building import Place, linears_of, width_of
from gradmatch.mixture.modules import sizes_of
from gradmatch.mixture.sources import Sources
from gradmatch.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

NOISE = 1e-3  # of the largest singular value of all task vectors at a place, below which a direction is noise


def matrix(module: nn.Module, model: Checkpoint, path: str) -> Tensor:
    """The weight of a linear layer, (out, in), float64."""
    value = model[f"{path}.weight"].double()
    return value if isinstance(module.get_submodule(path), torch.nn.Linear) else value.T


def readers(module: nn.Module, place: Place, level: str) -> list[str]:
    """Linear layers of a place that read states of the network's width; the last of an ffn writes them."""
    width, known = width_of(module, place), linears_of(module, place)
    paths = [path for path in known if sizes_of(module.get_submodule(path))[0] == width]
    return paths[:-1] if level == "ffn" and len(paths) > 1 and paths[-1] == known[-1] else paths


def directions(
    sources: Sources, module: nn.Module, groups: Mapping[str, Sequence[str]], rank: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Leading right singular vectors of each expert's task vectors of some layers together, tau = theta_e - theta_0.

    A direction whose singular value is next to nothing beside the largest of all experts is 0: an expert that does not differ from the
    base has none, and is preferred by no rounding.

    Args:
        sources: base and experts.
        module: the base's, for shapes.
        groups: name of a router's tensor -> linear layers that read what it sees.
        rank: number of directions.

    Returns:
        name -> (experts, rank, width), and notes.
    """
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    idle = set(sources.names)
    for key, paths in groups.items():
        width = sizes_of(module.get_submodule(paths[0]))[0]
        if rank >= width:
            note = f"gate_rank={rank} reaches every direction of states of width {width}, so that all scores are equal; choose a smaller one"
            notes += [] if note in notes else [note]
            warn(note)
        squares, vectors = [], []
        for expert in sources.experts:
            gram = torch.zeros(width, width, dtype=torch.float64)
            for path in paths:
                tau = matrix(module, expert.model, path) - matrix(module, sources.base, path)
                gram += tau.T @ tau
            values, basis = torch.linalg.eigh(gram)
            squares.append(values.flip(0)[:rank].clamp(min=0))
            vectors.append(basis.flip(1)[:, :rank].T)
        largest = max(float(one.max()) for one in squares)
        v = torch.zeros(len(squares), rank, width)
        for number, (square, vector) in enumerate(zip(squares, vectors, strict=True)):
            kept = square > NOISE**2 * largest
            v[number, : len(vector)] = (vector * kept[:, None]).float()
            idle -= {sources.names[number]} if kept.any() else set()
        found[key] = v
    for name in sources.names:
        if name in idle:
            notes.append(
                f"{name} does not differ from the base where the spectral router looks, so that it is never preferred"
            )
            warn(notes[-1])
    return found, notes


def low_rank(
    sources: Sources, module: nn.Module, places: Sequence[Place], merged: Checkpoint, rank: int
) -> tuple[dict[str, Tensor], list[str]]:
    """U, V and b of every linear layer: theta_e - theta_merged = U V at the best rank (Eckart-Young), and the difference of the bias.

    Args:
        sources: base and experts.
        module: the base's, for shapes.
        places: whose linear layers.
        merged: the weights that they are differences from.
        rank: of the differences.

    Returns:
        name -> (experts, rank, width) or (experts, width), and notes on how much of the differences is held.
    """
    found: dict[str, Tensor] = {}
    kept = {name: [0.0, 0.0] for name in sources.names}
    for path in (path for place in places for path in linears_of(module, place)):
        us, vs, bs = [], [], []
        for expert in sources.experts:
            delta = (matrix(module, expert.model, path) - matrix(module, merged, path)).float()
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            size = min(rank, len(s))
            left, right = torch.zeros(rank, delta.shape[0]), torch.zeros(rank, delta.shape[1])
            left[:size], right[:size] = (u[:, :size] * s[:size]).T, vh[:size]
            us.append(left)
            vs.append(right)
            bias = f"{path}.bias"
            bs.append(
                expert.model[bias].float() - merged[bias].float()
                if bias in merged
                else torch.zeros(len(delta))
            )
            kept[expert.name][0] += float(s[:size].square().sum())
            kept[expert.name][1] += float(s.square().sum())
        found |= {f"{path}.u": torch.stack(us), f"{path}.v": torch.stack(vs), f"{path}.b": torch.stack(bs)}
    notes = [
        f"{name}: rank {rank} holds {(part / whole) ** 0.5 if whole else 1.0:.1%} of its difference from the merged weights (2-norm)"
        for name, (part, whole) in kept.items()
    ]
    return found, notes
