"""Names of layers: which group a parameter belongs to, and sums of squares over groups."""

from __future__ import annotations

import math
from collections.abc import Mapping


def layer_group(name: str) -> str:
    """The layer a parameter belongs to: its path up to the first number, else its first two modules.

    >>> layer_group("bert.encoder.layer.3.attention.self.query.weight")
    'bert.encoder.layer.3'
    >>> layer_group("bert.embeddings.word_embeddings.weight")
    'bert.embeddings'
    >>> layer_group("classifier.bias")
    'classifier'
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    return ".".join(parts[:-1][:2]) or name


def group_norms(norms: Mapping[str, float]) -> dict[str, float]:
    """Norm of each layer group from the norms of its tensors: sqrt(sum of squares). Same units."""
    squares: dict[str, float] = {}
    for name, value in norms.items():
        group = layer_group(name)
        squares[group] = squares.get(group, 0.0) + value * value
    return {group: math.sqrt(value) for group, value in squares.items()}


def total_norm(norms: Mapping[str, float]) -> float:
    """Norm of the whole vector from the norms of its tensors. Same units."""
    return math.sqrt(sum(value * value for value in norms.values()))


KINDS = {
    "embeddings": ("embed", "wte", "wpe", "lm_head", "word_embeddings"),
    "attention": ("attn", "attention"),
    "feed-forward": ("mlp", "ffn", "feed_forward", "intermediate", "fc1", "fc2", "experts"),
}


def layer_kind(name: str) -> str:
    """What kind of layer a parameter is of, by the usual words of its name: embeddings, attention, feed-forward or rest.

    >>> layer_kind("model.embed_tokens.weight"), layer_kind("h.3.attn.c_proj.weight"), layer_kind("norm.weight")
    ('embeddings', 'attention', 'rest')
    """
    lowered = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lowered for word in words)), "rest")
