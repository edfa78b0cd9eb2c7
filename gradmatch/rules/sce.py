"""SCE: where the tasks differ most, by how much each of them moved, without the entries that go against the sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.rules.edits.ties import whole_part
from gradmatch.rules.options import Options, option

if TYPE_CHECKING:
    from torch import Tensor

FLAT = 1e-6  # mean squares that sum to less say nothing of the tasks' sizes, which then count alike (as in mergekit)


@dataclass(frozen=True)
class SceOptions(Options):
    """How many entries are merged at all."""

    select_topk: float = option(
        1.0, "[0, 1]", help="share of entries that are merged, those of the largest variance"
    )


def sce(theta0: Tensor, tau: Tensor, alpha: Sequence[float], options: SceOptions) -> Tensor:
    """SCE of FuseChat (Wan et al. 2024): theta0 + sum_t w_t m_t tau_t / sum_t w_t m_t.

    theta0: (*s); tau: (T, *s). Returns (*s). Select: entries outside the share `select_topk` of largest variance over the tasks,
    among those that vary, are 0 in every tau_t. Calculate: w_t = mean(tau_t^2) over the tensor, normalised. Erase: m_t is 1
    where tau_t has the sign of sum_t tau_t (plus where it cancels), else 0.

    Example:
        >>> import torch
        >>> tau = torch.tensor([[1.0, 1.0], [3.0, -1.0]])  # mean squares 1 and 5; the second entries cancel, so plus is kept
        >>> sce(torch.zeros(2), tau, [1.0, 1.0], SceOptions())  # (1 * 1 + 5 * 3) / 6
        tensor([2.6667, 1.0000])
    """
    flat = tau.reshape(len(tau), -1)
    if options.select_topk < 1:
        variance = flat.var(0, unbiased=False)
        kept = whole_part(options.select_topk, int((variance != 0).sum()))
        chosen = variance.argsort(descending=True, stable=True)[:kept]
        flat = flat * flat.new_zeros(flat.shape[1]).index_fill_(0, chosen, 1.0)
    weight = flat.square().mean(1, keepdim=True)  # (T, 1)
    if float(weight.sum()) < FLAT:
        weight = weight.new_ones(weight.shape)
    positive = flat.sum(0) >= 0
    weight = weight * ((flat > 0) & positive | (flat < 0) & ~positive)
    total = weight.sum(0)
    merged = (weight * flat).sum(0) / total.masked_fill(total == 0, 1)
    return theta0 + merged.reshape(theta0.shape)
