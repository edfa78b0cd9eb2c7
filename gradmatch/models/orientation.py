"""Which weights are stored [in, out], as GPT-2's Conv1D layers do, and not [out, in] as nn.Linear's: their modules tell."""

from __future__ import annotations

from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.structure import structure


def conv1d_weights(checkpoint: Checkpoint) -> frozenset[str] | None:
    """Names of the weights that Conv1D layers of the module hold; None where neither a module nor a config that transformers knows tells.

    Example:
        >>> import transformers
        >>> from gradmatch import open_checkpoint
        >>> gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=5))
        >>> sorted(conv1d_weights(open_checkpoint(gpt2)))[0]
        'h.0.attn.c_attn.weight'
    """
    known = structure(checkpoint)
    if known is None or known.module is None:
        return None
    from transformers.pytorch_utils import Conv1D

    layers = known.module.named_modules()
    return frozenset(f"{name}.weight" for name, layer in layers if isinstance(layer, Conv1D))
