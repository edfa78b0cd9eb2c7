"""Experts in a layer's place: ffns or blocks of which those that are chosen are computed, and low-rank differences from merged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.mixture.caches import grow, mark_length, rows_of
from gradmatch.mixture.routers import Routed


class Mixed(Routed):
    """Experts in the place of an ffn or of a whole block, each of which is computed only for the tokens or rows that chose it.

    Args:
        experts: modules of the same kind.
        whole: they are blocks, which look at all positions; they are computed for rows of the batch.
        routed: arguments of `Routed`.
    """

    def __init__(self, experts: Sequence[nn.Module], whole: bool, **routed: Any) -> None:
        super().__init__(experts=len(experts), **routed)
        self.experts, self.whole = nn.ModuleList(experts), whole

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """sum_e w_e(x) expert_e(x). x: (rows, positions, d)."""
        weights = self.weights(x)
        if self.whole:
            return self._blocks(x, weights, args, kwargs)
        weights = weights.expand(*x.shape[:2], -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = weights[..., number] != 0
            if chosen.all():
                out = out + weights[..., number, None] * expert(x)
            elif chosen.any():
                part = weights[..., number][chosen][:, None] * expert(x[chosen][None])[0]
                out = out.index_put((chosen,), part, accumulate=True)
        return out

    def _blocks(self, x: Tensor, weights: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """A block's answer may be a tuple; its first entry is mixed, and of the others that of the first expert goes on."""
        cache = self.context.cache
        grow(cache, self.context.configs)
        out, rest = torch.zeros_like(x), None
        for number, expert in enumerate(self.experts):
            rows = (weights[..., number] != 0).any(1)
            everyone = bool(rows.all()) or cache is not None  # a cache holds all rows of an expert, or none
            # with a choice a token, an expert needs the keys of tokens that others answer
            if not rows.any() and not (cache is not None and not self.sample):
                if cache is not None and number == 0:
                    mark_length(cache, expert, x)
                continue
            if everyone:
                answer = expert(x, *args, **kwargs)
            else:
                answer = expert(*rows_of((x, *args), rows), **rows_of(kwargs, rows))
            states = answer[0] if isinstance(answer, tuple) else answer
            rest = rest if rest is not None else answer
            if everyone:
                out = out + weights[..., number, None] * states
            else:
                out = out.index_put((rows,), weights[rows][..., number, None] * states, accumulate=True)
        return (out, *rest[1:]) if isinstance(rest, tuple) else out


class LowRank(Routed):
    """W x + b + sum_e w_e(x) (U_e V_e x + b_e): merged weights, and each expert's difference from them at a low rank (SMILE).

    After Tang et al. 2024 (arXiv 2408.10174), who take the base for the merged weights.

    Args:
        base: the layer with the merged weights, an nn.Linear or Conv1D.
        rank: of the differences.
        routed: arguments of `Routed`.
    """

    def __init__(self, base: nn.Module, rank: int, **routed: Any) -> None:
        super().__init__(**routed)
        ins, outs = sizes_of(base)
        self.base = base
        self.u = nn.Parameter(torch.zeros(self.count, rank, outs))
        self.v = nn.Parameter(torch.zeros(self.count, rank, ins))
        self.b = nn.Parameter(torch.zeros(self.count, outs))

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, positions, d) or (rows, d)."""
        flat = x.dim() == 2
        states = x[:, None] if flat else x
        weights = self.weights(states)
        inner = (states @ self.v.flatten(0, 1).T).reshape(*states.shape[:-1], *self.v.shape[:2])
        inner = inner * weights[..., None]
        more = inner.flatten(-2) @ self.u.flatten(0, 1) + weights @ self.b
        out: Tensor = self.base(x) + (more[:, 0] if flat else more)
        return out


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """(width of the input, of the output) of a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    weight = layer.weight  # of transformers' Conv1D
    assert isinstance(weight, Tensor)
    return int(weight.shape[0]), int(weight.shape[1])
