"""Parameters that a model's files call otherwise than its module does, as transformers' newer image models do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)


def file_names(checkpoint: Checkpoint, wanted: Iterable[str]) -> Mapping[str, str]:
    """Name in the module -> name in the files, for those of `wanted` that the checkpoint does not hold.

    transformers loads some architectures under other names than it saves them (ViT's `layers.0.attention.q_proj` is
    `encoder.layer.0.attention.attention.query` in its files), so a curvature estimated on the module has the module's names.
    The module is built from the config without memory, and transformers itself is asked what it would save. Empty where
    every name is known, or where the folder has no config that transformers knows.
    """
    missing = {name for name in wanted if name not in checkpoint}
    names = _saved_names(checkpoint.config) if missing and checkpoint.config else {}
    return {name: names[name] for name in missing if names.get(name, name) in checkpoint}


def _saved_names(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Name in the module -> name in the files, of the architecture that a config.json names; empty where it cannot tell."""
    import torch
    import transformers

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 both names were the same
        return {}
    kind = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
    if kind is None:
        return {}
    try:
        with torch.device("meta"):
            module = kind(kind.config_class.from_dict(dict(config)))
        tensors = module.state_dict()
        saved = revert_weight_conversion(module, dict(tensors))
    except (
        Exception
    ) as error:  # whatever an architecture of another version may raise: the names stay as they are
        log.info("names of %s cannot be asked for: %s", kind.__name__, error)
        return {}
    names = {id(tensor): name for name, tensor in tensors.items()}
    return {names[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in names}
