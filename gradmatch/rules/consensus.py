"""Consensus merging: what serves one task alone, or none, is left out of the sum of the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules.block import total
from gradmatch.rules.linear import Scale
from gradmatch.rules.options import option
from gradmatch.rules.rule import Elementwise

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Block


@dataclass(frozen=True)
class ConsensusOptions(Scale):
    """When an entry serves a task, and how many tasks it must serve."""

    threshold: float = option(
        0.4,
        "[0, inf]",
        help="an entry serves task t where |tau_t| is so many times |merged - tau_t| at least",
    )
    agree: int = option(2, "[1, inf]", help="tasks that an entry must serve")


def consensus(tau: Tensor, alpha: Tensor, threshold: float, agree: int) -> Tensor:
    """Consensus TA of Wang et al. 2024 (TALL masks): tau_c = m * tau_m with tau_m = sum_t alpha_t tau_t.

    tau: (T, n); alpha: (T, 1). Returns (n,). The mask of task t is 1 where |tau_t| >= threshold |tau_m - tau_t|, so where the sum
    keeps what the task learned, and m is 1 where `agree` masks at least are. Entries of fewer tasks (selfish ones) or of none
    (catastrophic ones) go.

    Raises:
        ValueError: more tasks must agree than there are.

    Example:
        >>> import torch
        >>> tau = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, -0.9]])
        >>> consensus(tau, torch.ones(2, 1), 0.4, 2)
        tensor([2., 0., -0.])
    """
    if agree > len(tau):
        raise GradmatchError(
            f"agree is {agree:g}, and {len(tau)} tasks are merged; no entry could stay",
            "out_of_range",
            "agree",
        )
    merged = total(alpha * tau)
    far = (merged - tau).abs_().mul_(threshold)
    served = total(tau.abs().ge_(far))  # as floats, which torch adds and multiplies faster than booleans
    return merged * served.ge(agree).to(merged.dtype)


def _of_block(block: Block) -> Tensor:
    options = block.options
    tau, alpha, counted = block.tau, block.alpha, block.alpha.flatten() != 0  # a task of weight 0 is none
    if not counted.any():
        return block.theta0.clone()
    if not counted.all():
        tau, alpha = tau[counted], alpha[counted]
    result: Tensor = block.theta0 + options.scale * consensus(tau, alpha, options.threshold, options.agree)
    return result


CONSENSUS = Elementwise(
    "theta0 + scale m sum_t alpha_t tau_t, m = 1 where `agree` tasks have |tau_t| >= threshold |sum_s alpha_s tau_s - tau_t|",
    "Wang et al. 2024 (TALL masks)", _of_block, options=ConsensusOptions(), models=(2, float("inf")),
    lacks={"single": "it takes two models"},
)  # fmt: skip
