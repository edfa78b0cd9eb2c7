"""Nucleus sampling over a large vocabulary (Holtzman et al. 2020), and the refusal of logits that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

FIRST = 1024  # tokens of a row that are looked at before more are


class NotFiniteError(RuntimeError):
    """A model that gives no probabilities: NaN or infinite logits."""


class Nucleus(LogitsProcessor):
    """Keeps, in each row, the fewest most probable tokens whose probabilities add up to `top_p`; the others become -inf.

    The set of transformers' own `top_p`, which sorts the whole vocabulary: half of the time of generating with 50,000 tokens.
    Only the most probable are sorted here, as many as it takes.
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (B, V) logits of the next token. Raises NotFiniteError."""
        probabilities, vocabulary, count = scores.float().softmax(-1), scores.shape[-1], FIRST
        if not torch.isfinite(probabilities).all():
            raise NotFiniteError("the logits are NaN or infinite: they give no probabilities")
        if self.top_p >= 1:
            return scores  # sums of float32 reach 1 too early
        while True:
            top, tokens = probabilities.topk(min(count, vocabulary))
            mass = top.cumsum(-1)
            if count >= vocabulary or bool((mass[:, -1] >= self.top_p).all()):
                break
            count *= 8
        dropped = mass - top >= self.top_p  # what comes before them is enough
        kept = scores.gather(-1, tokens).masked_fill(dropped, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, kept)
