"""Which weights are stored [in, out], as GPT-2's Conv1D layers do, and not [out, in] as nn.Linear's: their modules tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradmatch.models.structure import structure

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint


def conv1d_weights(checkpoint: Checkpoint) -> frozenset[str] | None:
    """Names of the weights that Conv1D layers hold; None where neither a module nor a config that transformers knows tells.

    The module of a config is built without memory for its values.

    Example:
        >>> import transformers
        >>> from gradmatch import open_checkpoint
        >>> gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=5))
        >>> sorted(conv1d_weights(open_checkpoint(gpt2)))[0]
        'h.0.attn.c_attn.weight'
    """
    found = structure(checkpoint)
    return None if found is None or found.module is None else _of_module(found.module)


def _of_module(module: Any) -> frozenset[str]:
    from transformers.pytorch_utils import Conv1D

    return frozenset(
        f"{name}.weight" if name else "weight"
        for name, layer in module.named_modules()
        if isinstance(layer, Conv1D)
    )
