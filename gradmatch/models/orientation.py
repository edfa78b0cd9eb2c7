"""Which weights are stored [in, out], as GPT-2's Conv1D layers do, and not [out, in] as nn.Linear's: their modules tell."""

from __future__ import annotations

from gradmatch.estimators.task_vectors import CONV1D
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.structure import structure

__all__ = ["CONV1D", "conv1d_weights"]


def conv1d_weights(checkpoint: Checkpoint) -> dict[str, bool]:
    """Of each of a checkpoint's weights whether its module keeps it in a Conv1D layer.

    Empty where neither a module nor a config that transformers knows tells.

    Example:
        >>> import transformers
        >>> from gradmatch import open_checkpoint
        >>> gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=5))
        >>> found = conv1d_weights(open_checkpoint(gpt2))
        >>> found["h.0.attn.c_attn.weight"], found["wte.weight"]
        (True, False)
    """
    known = structure(checkpoint)
    if known is None or known.module is None:
        return {}
    from transformers.pytorch_utils import Conv1D

    names = known.names(checkpoint).plain
    layers = ((f"{name}.weight", layer) for name, layer in known.module.named_modules())
    return {names[weight]: isinstance(layer, Conv1D) for weight, layer in layers if weight in names}
