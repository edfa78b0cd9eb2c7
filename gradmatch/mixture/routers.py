"""Routers, and what a choice among experts is: by token or by sample, kept as long as a cache.

A score is softmax over all experts in float32, then the top k, then divided by their sum, as in Mixtral.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 2  # hidden units of an MLP router for each expert: enough to hold a linear one, +v and -v behind ReLU


class Context:
    """What a forward pass knows at every place: which positions count, the cache, and choices that a cache keeps.

    Attributes:
        mask: (rows, positions), 1 where a token counts; None: everywhere.
        cache: of keys and values, or None.
        configs: of every expert, by which a cache gets its layers.
        soft: every expert takes part by its probability, so that a router of one choice has a gradient.
        scores: of every place that was passed, (place, scores before softmax, mask), while `keeping`.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.cache: Any = None
        self.configs: Sequence[Any] = ()
        self.soft = False
        self.keeping = False
        self.scores: list[tuple[str, Tensor, Tensor | None]] = []

    def enter(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """A hook before a model's forward: a model of text gets a cache that it was asked for here, where all places see it."""
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if hasattr(module, "generate") and module.can_generate() and given.get("past_key_values") is None:
            given["use_cache"] = bool(given.get("use_cache"))
            if given["use_cache"]:
                from transformers import DynamicCache

                given["past_key_values"] = DynamicCache(config=module.config)
        mask = given.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.cache = given.get("past_key_values")
        return (), given

    @contextmanager
    def kept(self) -> Iterator[list[tuple[str, Tensor, Tensor | None]]]:
        """Keep the scores of every place, to be looked at afterwards."""
        self.keeping, self.scores = True, []
        try:
            yield self.scores
        finally:
            self.keeping = False


class Spectral(nn.Module):
    """score_e(x) = ||V_e^T x||, V_e the leading right singular vectors of the task vectors that read x. It is not trained.

    Args:
        experts: number of them.
        rank: directions of each, r.
        width: of x, d.
    """

    per_token = True  # of a sample it is the mean over tokens, not the score of the mean

    def __init__(self, experts: int, rank: int, width: int) -> None:
        super().__init__()
        self.register_buffer("v", torch.zeros(experts, rank, width))
        self.v: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d). Returns (..., experts)."""
        inner = x @ self.v.flatten(0, 1).T
        scores: Tensor = inner.reshape(*x.shape[:-1], *self.v.shape[:2]).norm(dim=-1)
        return scores


def make_router(kind: str, experts: int, width: int, rank: int) -> nn.Module:
    """A new router; its weights are those that it is loaded with.

    >>> make_router("linear", 3, 16, 8)
    Linear(in_features=16, out_features=3, bias=False)
    """
    if kind == "spectral":
        return Spectral(experts, rank, width)
    if kind == "linear":
        return nn.Linear(width, experts, bias=False)
    hidden = WIDTH * experts
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, experts))


def as_mlp(rows: Tensor) -> dict[str, Tensor]:
    """The MLP that is the linear router of these rows: rows x = relu(rows x) - relu(-rows x). rows: (experts, width)."""
    eye = torch.eye(len(rows))
    return {
        "0.weight": torch.cat([rows, -rows]),
        "0.bias": torch.zeros(2 * len(rows)),
        "2.weight": torch.cat([eye, -eye], dim=1),
        "2.bias": torch.zeros(len(rows)),
    }


class Routed(nn.Module):
    """A place with a router.

    Args:
        router: of states to scores.
        place: name of the module, for reports.
        experts: number of them.
        top_k: that take part.
        sample: one choice for a row of the batch, by the mean over its tokens.
        context: of the forward pass.
    """

    def __init__(
        self, router: nn.Module, place: str, experts: int, top_k: int, sample: bool, context: Context
    ) -> None:
        super().__init__()
        self.router, self.place, self.count, self.top_k = router, place, experts, top_k
        self.sample, self.context = sample, context

    def weights(self, x: Tensor) -> Tensor:
        """What each expert's answer counts. x: (rows, positions, d). Returns (rows, positions or 1, experts), 0 where it takes no part.

        With one choice for a sample, what was chosen as a cache was filled holds as long as the cache does.
        """
        context, cache = self.context, self.context.cache
        chosen = getattr(cache, "gradmatch_chosen", None)
        if self.sample and chosen is not None and self.place in chosen:
            kept: Tensor = chosen[self.place]
            return kept
        mask = context.mask if context.mask is not None and context.mask.shape == x.shape[:2] else None
        scores = self._scores(x, mask)
        if context.keeping:
            context.scores.append((self.place, scores, None if self.sample else mask))
        weights = mixed(scores, self.count if context.soft and self.top_k == 1 else self.top_k).to(x.dtype)
        if self.sample and cache is not None:
            cache.gradmatch_chosen = {**(chosen or {}), self.place: weights}
        return weights

    def _scores(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if not self.sample:
            found: Tensor = self.router(x)
            return found
        if getattr(self.router, "per_token", False):
            return _mean(self.router(x), mask)
        pooled: Tensor = self.router(_mean(x, mask))
        return pooled


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the positions that count. x: (rows, positions, d). Returns (rows, 1, d)."""
    if mask is None:
        return x.mean(1, keepdim=True)
    kept = mask.to(x.dtype)[..., None]
    return (x * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


def mixed(scores: Tensor, top_k: int) -> Tensor:
    """softmax, the top k of it, divided by their sum; 0 elsewhere. scores: (..., experts). Returns the same shape, float32.

    >>> mixed(torch.tensor([0.0, 1.0, 1.0]), 2)
    tensor([0.0000, 0.5000, 0.5000])
    """
    shares = scores.float().softmax(-1)
    values, places = shares.topk(top_k, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(shares).scatter(-1, places, values)
