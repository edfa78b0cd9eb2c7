"""The modules of a mixture: routers, a choice among experts in place of a layer's part, low-rank experts, whole models side by side.

A score is softmax over all experts in float32, then the top k, then divided by their sum, as in Mixtral.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

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
                answer = expert(*_rows((x, *args), rows), **_rows(kwargs, rows))
            states = answer[0] if isinstance(answer, tuple) else answer
            rest = rest if rest is not None else answer
            if everyone:
                out = out + weights[..., number, None] * states
            else:
                out = out.index_put((rows,), weights[rows][..., number, None] * states, accumulate=True)
        return (out, *rest[1:]) if isinstance(rest, tuple) else out


def _rows(given: Any, rows: Tensor) -> Any:
    """Some rows of everything that has one for each row of the batch."""
    if isinstance(given, Tensor):
        return given[rows] if given.dim() and len(given) == len(rows) and len(rows) > 1 else given
    if isinstance(given, Mapping):
        return {key: _rows(value, rows) for key, value in given.items()}
    if isinstance(given, tuple):
        return tuple(_rows(value, rows) for value in given)
    return given


def attentions(module: nn.Module) -> list[Any]:
    """Modules that say which layer of a cache is theirs."""
    return [one for one in module.modules() if isinstance(getattr(one, "layer_idx", None), int)]


def shift(module: nn.Module, by: int) -> None:
    """Give a module other layers of the cache."""
    for one in attentions(module):
        one.layer_idx += by


def grow(cache: Any, configs: Sequence[Any]) -> None:
    """Give a cache layers for every expert behind those of the first; configs: of the experts."""
    if cache is None or getattr(cache, "gradmatch_grown", False):
        return
    from transformers import DynamicCache

    own = [DynamicCache(config=config).layers for config in configs]
    missing = [layer for layers in own for layer in layers][len(cache.layers) :]
    cache.layers.extend(missing)
    cache.gradmatch_grown = True


def part_of(cache: Any, first: int, count: int) -> Any:
    """Some layers of a cache as a cache; they are the same layers."""
    part = copy.copy(cache)
    part.layers = cache.layers[first : first + count]
    return part


def mark_length(cache: Any, expert: nn.Module, x: Tensor) -> None:
    """Tell a cache that so many positions have passed a layer whose expert was not computed: masks go by the first layer's length."""
    index = next((one.layer_idx for one in attentions(expert)), None)
    if index is not None:
        nothing = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
        cache.update(nothing, nothing, index)


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


class Reached(Exception):
    """The states that enter a layer."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class Stop(nn.Module):
    """In the place of a layer: ends the pass with the states that reach it."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Never returns.

        Raises:
            Reached: always.
        """
        raise Reached(x)


class ModelMixture(nn.Module):
    """Whole models side by side: logits = sum_e w_e logits_e, and only models that are chosen are computed.

    Args:
        experts: models of transformers with logits.
        trunk: the base's embeddings (and first layers), whose states the router sees.
        routed: arguments of `Routed` but the context.
    """

    def __init__(self, experts: Sequence[Any], trunk: nn.Module, **routed: Any) -> None:
        super().__init__()
        self.context = Context()
        self.experts, self.trunk = nn.ModuleList(experts), trunk
        self.gate = Routed(experts=len(experts), context=self.context, **routed)
        self.config = experts[0].config
        self.layers = [len({a.layer_idx for a in attentions(one)}) for one in experts]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.parameters()).device

    def states(self, batch: Mapping[str, Any]) -> Tensor:
        """What the router sees: (rows, positions, d). With a cache the trunk has layers of its own behind those of the experts."""
        known = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values")
        given = {key: batch[key] for key in known if batch.get(key) is not None}
        cache = batch.get("past_key_values")
        if cache is not None:
            given["past_key_values"] = part_of(cache, sum(self.layers), len(cache.layers))
            given["use_cache"] = True
        try:
            self.trunk(**given)
        except Reached as reached:
            if cache is not None and not attentions(self.trunk):
                x = reached.states
                nothing = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
                given["past_key_values"].update(nothing, nothing, 0)
            return reached.states
        raise RuntimeError("the trunk ran to its end without reaching the layer that stops it")

    def forward(self, labels: Tensor | None = None, **batch: Any) -> Any:
        """Logits, and the loss where there are labels; a model of text may be given past_key_values."""
        from transformers.utils import ModelOutput

        _, batch = self.context.enter(self.experts[0], (), batch)
        cache = self.context.cache
        chosen = getattr(cache, "gradmatch_chosen", None)
        grow(cache, [*(one.config for one in self.experts), self.trunk.config])
        known = self.gate.sample and chosen is not None and self.gate.place in chosen
        weights = self.gate.weights(torch.empty(0, 0, 0) if known else self.states(batch))
        logits = self._logits(batch, weights, cache)
        loss = None if labels is None else self.loss(logits, labels)
        return ModelOutput(
            {
                k: v
                for k, v in (("loss", loss), ("logits", logits), ("past_key_values", cache))
                if v is not None
            }
        )

    def _logits(self, batch: Mapping[str, Any], weights: Tensor, cache: Any) -> Tensor:
        out: Tensor | None = None
        for number, expert in enumerate(self.experts):
            rows = (weights[..., number] != 0).any(1)
            everyone = bool(rows.all()) or cache is not None
            if not rows.any() and not (cache is not None and not self.gate.sample):
                if cache is not None and number == 0:
                    first = batch["input_ids"]
                    mark_length(cache, expert, first[..., None].to(next(self.parameters()).dtype))
                continue
            given = dict(batch) if everyone else _rows(batch, rows)
            if cache is not None:
                given["past_key_values"] = part_of(cache, sum(self.layers[:number]), self.layers[number])
            found = expert(**given).logits
            w = weights[..., number, None] if found.dim() == 3 else weights[:, 0, number, None]
            if w.dim() == 3 and w.shape[1] not in (1, found.shape[1]):
                w = w[:, -found.shape[1] :]  # logits of the last positions alone
            if out is None:
                out = found.new_zeros(len(rows), *found.shape[1:])
            out = out + w * found if everyone else out.index_put((rows,), w[rows] * found, accumulate=True)
        assert out is not None
        return out

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, of the next token for a model of text; squared error for a single output."""
        if logits.dim() == 3:
            return nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        if logits.shape[-1] == 1:
            return nn.functional.mse_loss(logits[:, 0], labels.to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Text by text as transformers' generate has it; with one expert a sample each goes to its own, else step by step together."""
        expert: Any
        if self.gate.sample and self.gate.top_k == 1:
            mask = options.pop("attention_mask", None)
            self.context.mask, self.context.cache = mask, None
            batch = {"input_ids": input_ids, **({"attention_mask": mask} if mask is not None else {})}
            chosen = self.gate.weights(self.states(batch))[:, 0].argmax(-1)
            times = int(options.get("num_return_sequences") or 1)
            found: dict[int, Tensor] = {}
            for number in sorted(set(chosen.tolist())):
                rows = (chosen == number).nonzero()[:, 0]
                expert = self.experts[number]
                made = expert.generate(**_rows(batch, chosen == number), **options)
                found |= {
                    int(row) * times + t: made[i * times + t]
                    for i, row in enumerate(rows)
                    for t in range(times)
                }
            return nn.utils.rnn.pad_sequence(
                [found[row] for row in range(len(input_ids) * times)],
                batch_first=True,
                padding_value=self._padding(),
            )
        shell: Any = copy.copy(self.experts[0])
        shell.forward = self._like(shell.forward)
        made_by: Tensor = shell.generate(input_ids, **options)
        return made_by

    def _padding(self) -> int:
        end = self.config.pad_token_id if self.config.pad_token_id is not None else self.config.eos_token_id
        return int((end[0] if isinstance(end, list) else end) or 0)

    def _like(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """This module's forward with the signature of another, by which transformers chooses the arguments."""
        from functools import wraps

        @wraps(forward)
        def ours(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("return_dict", None)
            return self(**kwargs) if not args else self(input_ids=args[0], **kwargs)

        return ours
