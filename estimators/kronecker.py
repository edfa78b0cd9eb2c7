"""Kronecker factors of linear layers, shared by `kfac.py` and `gram.py`.

The weight W of a linear layer has the gradient sum_t g_t x_t' for an example, with inputs x and gradients g at the
outputs. Its curvature is written A (x) B: A (in, in) of the inputs, B (out, out) of the gradients. Convolutions without
groups are linear layers on patches. Padded positions count in neither factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.likelihood import IGNORE
from gradmatch.estimators.problem import Problem
from gradmatch.estimators.sinks import DIAGONAL, Sums

LARGEST_FACTOR = 16384  # rows; a factor of this size takes 1 GiB
FACTOR_A, FACTOR_B, POSITIONS = "factor_a/", "factor_b/", "positions/"


def second_moments(sums: Sums, key: str, rows: Tensor) -> None:
    """sums[key] += sum_r rows_r rows_r'; (R, D) -> (D, D)."""
    if key not in sums:
        sums[key] = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=rows.device)
    sums[key].addmm_(rows.t(), rows)


def real_positions(batch: Batch, name: str, examples: int, count: int) -> Tensor | None:
    """Which of a layer's positions are real tokens, (B, T) bool; None where no mask is of this length.

    A sequence-to-sequence model has two masks. Where both have the layer's length, decoder layers take the decoder's,
    except for the keys and values that look at the encoder.
    """
    masks = []
    if batch.mask is not None:
        masks.append(("encoder", batch.mask))
    if "decoder_input_ids" in batch.kwargs:
        given = batch.kwargs.get("decoder_attention_mask")
        if given is not None:
            masks.append(("decoder", given.bool()))
        elif isinstance(batch.labels, Tensor):
            masks.append(("decoder", batch.labels != IGNORE))
    fitting = [(side, mask) for side, mask in masks if tuple(mask.shape) == (examples, count)]
    if len(fitting) > 1:
        crossed = any(
            part in name
            for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_", "encoder_attn.v_")
        )
        side = "decoder" if "decoder" in name and not crossed else "encoder"
        fitting = [pair for pair in fitting if pair[0] == side]
    return fitting[0][1] if fitting else None


def blocks(problem: Problem, seen: int, factor_a: Sums, factor_b: Sums) -> Sums:
    """Mean blocks in the weights' shapes: the diagonal of A (x) B, and of the rest what was accumulated for it."""
    mean: Sums = {}
    for name, value in problem.parameters.items():
        if name in factor_a:
            a = factor_a[name].diagonal()
            b = factor_b[name].diagonal() if name in factor_b else a.new_ones(value.numel() // a.numel())
            diagonal = torch.outer(a, b) if problem.is_transposed(name) else torch.outer(b, a)
            mean[name] = diagonal.reshape(value.shape)
        elif DIAGONAL + name in problem.sums:
            mean[name] = problem.sums[DIAGONAL + name] / (seen * problem.draws)
    return mean
