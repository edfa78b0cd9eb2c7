"""Whole models side by side, and the part of a network that their router sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.mixture.caches import attentions, grow, mark_length, part_of, rows_of
from gradmatch.mixture.routers import Context, Routed


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
            given = dict(batch) if everyone else rows_of(batch, rows)
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
                made = expert.generate(**rows_of(batch, chosen == number), **options)
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

        @wraps(forward)
        def ours(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("return_dict", None)
            return self(**kwargs) if not args else self(input_ids=args[0], **kwargs)

        return ours
