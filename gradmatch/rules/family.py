"""Members of the family that are beliefs alone: with an anchor, with a guard, up the loss of what must go; and MaTS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gradmatch.rules.beliefs import BELIEFS, Known
from gradmatch.rules.block import Block, NotPositiveError
from gradmatch.rules.gradient_matching import fisher
from gradmatch.rules.kronecker import choosing, in_matrices
from gradmatch.rules.matrix_options import MatrixOptions
from gradmatch.rules.options import option
from gradmatch.rules.rule import Elementwise, Solve
from gradmatch.rules.structures import Basis
from gradmatch.rules.system import posterior, right_side

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DampingOptions(MatrixOptions):
    """What stands beside the base's curvature."""

    damping: float = option(
        0.1,
        "(0, inf]",
        help="lambda, as a share of the mean of H0's diagonal over all weights that it covers",
    )


@dataclass(frozen=True)
class AnchorOptions(MatrixOptions):
    """How strongly the anchor holds."""

    anchor_weight: float = option(
        1.0, "[0, inf]", help="precision of the anchor, in nats per squared unit of weight (the unit of H)"
    )


def mode(name: str, block: Block) -> Tensor:
    """theta0 + x of a rule whose precisions are diagonal: (sum_k w_k H_k c_k - b) / sum_k w_k H_k, elementwise.

    Raises:
        NotPositiveError: sum_k w_k H_k is not positive, or nothing but rounding.

    Example:
        >>> import torch
        >>> tau, one = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
        >>> block = Block(theta0=torch.zeros(1), tau=tau, alpha=one, delta0=0.0, options={}, h0=torch.ones(1), damping=1.0)
        >>> mode("guarded", block)  # -lambda (H0 + lambda)^-1 (1 + 3)
        tensor([-2.])
    """
    import torch

    theta0 = block.theta0[None]
    beliefs, b = BELIEFS[name](Known.of(block))
    right, unit = right_side(beliefs, theta0, b), Basis(None, None)
    precision = unit.diagonal(posterior(beliefs), theta0)
    size = sum(unit.diagonal(abs(one.weight) * one.precision, theta0) for one in beliefs)
    if bool((precision < CANCELLED * torch.finfo(precision.dtype).eps * size).any()):
        raise NotPositiveError
    return block.theta0 + (right / precision)[0]


def _member(name: str, rule: Elementwise) -> Solve:
    """Kronecker where the files hold factors, diagonal elsewhere."""
    rule = replace(rule, family=name)
    solved = in_matrices(name, rule)
    return replace(solved, chosen=choosing(rule, solved))


@dataclass(frozen=True)
class UnmergeOptions(MatrixOptions):
    """What of the base's curvature is one number."""

    prior: float = option(0.0, "[0, inf]", flag=False, help="isotropic part of H0, with its weight and floor")


CANCELLED = 64  # times the rounding error: what is left of a difference is then not known
BOTH = frozenset({"curvature", "base_curvature"})
GOES_ON = {"single": "it takes away", "equal": "it takes away"}

GUARDED = _member("guarded", Elementwise(
    "theta0 - sum_t alpha_t lambda (H0 + lambda I)^-1 tau_t, lambda = damping mean(diag H0)", "H0 at theta0, I at minus the task vector",
    lambda block: mode("guarded", block), needs=frozenset({"base_curvature"}), options=DampingOptions(), damped=True, bounded=True,
    removes=True, lacks=GOES_ON,
))  # fmt: skip
SIGNED = _member("signed", Elementwise(
    "theta0 + (Hbar + lambda I)^-1 (sum_{alpha_t > 0} alpha_t (H0 + H_t) tau_t + lambda sum_t alpha_t tau_t), "
    "Hbar = H0 + sum_{alpha_t > 0} alpha_t H_t, lambda = damping mean(diag H0)",
    "Eq. 12 of what is added and the guarded removal of what is taken away, as one system",
    lambda block: mode("signed", block), needs=BOTH, options=DampingOptions(), damped=True, signed=True,
))  # fmt: skip
ASCENT = _member("ascent", Elementwise(
    "theta0 + sum_t alpha_t (H0 + lambda I)^-1 g_t, lambda = damping mean(diag H0)", "K-FADE, McKinney et al. 2026",
    lambda block: mode("ascent", block), needs=frozenset({"base_curvature", "gradient"}), options=DampingOptions(), damped=True,
    removes=True, lacks={"single": "it goes up the loss", "equal": "it goes up the loss"},
))  # fmt: skip
ANCHORED = _member("anchored", Elementwise(
    "theta0 + (Hbar + w I)^-1 (sum_t alpha_t (H0 + H_t) tau_t + w (theta_a - theta0)), Hbar = H0 + sum_t alpha_t H_t, w = anchor_weight",
    "Eq. 12 with another merge as a belief (BMM 2026)", lambda block: mode("anchored", block), needs=BOTH | {"anchor"},
    options=AnchorOptions(), divides=True,
    lacks=dict.fromkeys(("single", "equal", "zero"), "the anchor draws to itself"),
))  # fmt: skip
MATS = _member("mats", Elementwise(
    "(sum_t alpha_t H_t)^-1 sum_t alpha_t H_t theta_t", "Tam et al. 2024 (MaTS)",
    lambda b: fisher(b.theta0, b.tau, b.alpha, b.delta0, b.h), needs=frozenset({"curvature"}), divides=True, bounded=True,
    options=MatrixOptions(),
))  # fmt: skip

# for `gradmatch.posterior.unmerge`, which knows what the tasks and the anchor are; no rule by name
UNMERGED = _member("unmerged", Elementwise(
    "theta - alpha (P - alpha H_t)^-1 (H_t (theta_t - theta) + H0 (theta_t - theta0)), P the posterior of the merge theta",
    "division by a task's belief", lambda block: mode("unmerged", block), needs=BOTH | {"anchor"}, options=UnmergeOptions(), models=(1, 2),
))  # fmt: skip
