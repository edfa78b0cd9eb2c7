"""Models cut and stacked by layer ranges: a virtual checkpoint whose tensors come from several others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import FIRST, LAYER, layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import Renamed, Store

if TYPE_CHECKING:
    from gradmatch.models.task import Model

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# of the part of a model of several that a stack is made of
NESTED = ("text_config", "llm_config", "language_config")
LANGUAGE = re.compile(r"language|text|llm", re.IGNORECASE)


@dataclass(frozen=True)
class Slice:
    """Layers first to last (excluded) of a model."""

    model: Model
    first: int
    last: int


def stack(slices: Sequence[Slice], *, allow_pickle: bool = False) -> Checkpoint:
    """One checkpoint of the given layers on top of one another.

    Tensors outside the layers come from the first slice's model (embeddings) and the last one's (final norm, head). The
    config's layer count, and every list in it with one entry a layer, follow. Of a model with a vision tower, the language
    model's layers are stacked; the tower is the first slice's.

    Args:
        slices: from the first layer up.
        allow_pickle: as for `open_checkpoint`.

    Returns:
        A checkpoint to merge with method="passthrough", or to combine with others cut alike.

    Raises:
        ValueError: no slices, a range that the model does not have, or several stacks of layers of which the config does not tell
            the one that is meant.
    """
    if not slices:
        raise GradmatchError("no slices to stack; give at least one model with a layer range", "bad_model")
    opened = [open_checkpoint(one.model, allow_pickle=allow_pickle) for one in slices]
    where: dict[str, tuple[Store, str]] = {}
    sources: list[int] = []
    tower, nested = _tower(opened[0])
    for name in opened[0].store:
        if _layer(name, tower) is None and (FIRST.search(name) or layer_of(name) is not None):
            where[name] = (opened[0].store, name)
    for one, checkpoint in zip(slices, opened, strict=True):
        count = 1 + max((_layer(name, tower) or 0 for name in checkpoint.store), default=-1)
        if not 0 <= one.first < one.last <= count:
            raise GradmatchError(
                f"layers {one.first} to {one.last} of {checkpoint.where}: it has {count}, a range needs 0 <= first < last <= {count}",
                "bad_model",
                checkpoint.where,
            )
        for name in checkpoint.store:
            index = _layer(name, tower)
            if index is not None and one.first <= index < one.last:
                where[_renumbered(name, len(sources) + index - one.first)] = (checkpoint.store, name)
        sources += range(one.first, one.last)
    for name in opened[-1].store:
        if layer_of(name) is None and not FIRST.search(name):
            where[name] = (opened[-1].store, name)
    config = _followed(opened[0].config, sources, nested)
    return Checkpoint(
        Renamed(where),
        path=opened[0].path,
        config=config,
        aliases=opened[0].aliases,
        changed=config,
        folder=opened[0].folder,
        names=list(dict.fromkeys(name for one in opened for name in one.names)),
    )


def _tower(checkpoint: Checkpoint) -> tuple[str, str]:
    """The names before the number of a layer that is meant ("model.language_model.layers."), and the nested config of that part."""
    counts: dict[str, int] = {}
    for name in checkpoint.store:
        found = LAYER.search(name)
        if found:
            before = name[: found.start(1)]
            counts[before] = max(counts.get(before, 0), int(found.group(1)) + 1)
    if len(counts) < 2:
        return next(iter(counts), ""), ""
    config = checkpoint.config or {}
    nested = next((key for key in NESTED if isinstance(config.get(key), Mapping)), "")
    told = (
        next((config[nested][key] for key in LAYER_COUNTS if key in config[nested]), None) if nested else None
    )
    fitting = [before for before, count in counts.items() if count == told]
    named = [before for before in fitting if LANGUAGE.search(before)] if len(fitting) > 1 else fitting
    if len(named) != 1:
        raise GradmatchError(
            f"{checkpoint.where} has {len(counts)} stacks of layers ({', '.join(f'{b}0 to {n - 1}' for b, n in counts.items())}), and its config "
            "does not tell which one a range of layers means: stack models with a single one",
            "bad_model",
            checkpoint.where,
        )
    return named[0], nested


def _layer(name: str, tower: str) -> int | None:
    """The layer of the stacked part that a parameter belongs to, or None."""
    return layer_of(name) if name.startswith(tower) else None


def _renumbered(name: str, index: int) -> str:
    """A parameter's name in another layer."""
    found = LAYER.search(name)
    assert found is not None
    return f"{name[: found.start(1)]}{index}{name[found.end(1) :]}"


def _followed(
    config: Mapping[str, Any] | None, sources: Sequence[int], nested: str = ""
) -> dict[str, Any] | None:
    """The config of a model with these layers of the original; with `nested`, its part of that name follows."""
    if config is None:
        return None
    if nested:
        return {**config, nested: _followed(config[nested], sources)}
    config = _by_layer(config)
    old = next((config[key] for key in LAYER_COUNTS if key in config), None)
    followed = {key: (len(sources) if key in LAYER_COUNTS else value) for key, value in config.items()}
    for key, value in config.items():
        if isinstance(value, list) and old and len(value) == old and max(sources) < old:
            followed[key] = [value[source] for source in sources]
    if config.get("mlp_only_layers"):
        dense = set(config["mlp_only_layers"])
        followed["mlp_only_layers"] = [layer for layer, source in enumerate(sources) if source in dense]
    return followed


def _by_layer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with the kind of attention layer by layer, where it says it by a rule (windows from some layer on, every sixth layer)."""
    rules = ("use_sliding_window", "sliding_window_pattern", "max_window_layers")
    if config.get("layer_types") or not any(config.get(rule) for rule in rules):
        return config
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return config
    types = getattr(CONFIG_MAPPING[kind].from_dict(dict(config)), "layer_types", None)
    return {**config, "layer_types": list(types)} if types else config
