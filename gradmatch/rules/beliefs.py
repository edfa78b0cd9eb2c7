"""The rules of the family as lists of beliefs: what each one adds to the system of `gradmatch.rules.system`, and nothing else.

| rule | weight: precision at centre | b |
|---|---|---|
| averaging, task arithmetic | 1: I at the average, or the sum, of alpha_t tau_t | |
| fisher (FA) | alpha_t: H_t at tau_t; 1: delta0 I at sum_t alpha_t tau_t | |
| fisher_base (FA1) | alpha_t: H_t at tau_t - theta0 (its mixed origins); 1: H0 at 0 | |
| gradient_matching (Eq. 12), kronecker | alpha_t: H_t at tau_t; 1: H0 at sum_t alpha_t tau_t | |
| measured | alpha_t: H_t at tau_t; 1: H0 at 0 | sum_t alpha_t g_t |
| removal (Eq. 13) | -alpha_t: H_t at tau_t; 1: H0 at -sum_t alpha_t tau_t | |
| guarded | 1: H0 at 0; 1: lambda I at -sum_t alpha_t tau_t | |
| signed | alpha_t > 0: H_t at tau_t; 1: H0 at their sum_t alpha_t tau_t; 1: lambda I at the sum of all, signs and all | |
| ascent | 1: H0 + lambda I at 0 | -sum_t alpha_t g_t |
| regmean | alpha_t: I (x) G_t at tau_t | |
| actmat | alpha_t: I (x) tau_t'tau_t at tau_t | |
| wudi | alpha_t / norm(tau_t)^2: I (x) tau_t'tau_t at tau_t | |
| ace | alpha_t: I (x) centred tau_t'tau_t of trace 1 at tau_t; a multiple of I at the tasks' mean | |
| unmerged | 1: the posterior of a merge at 0; -alpha: H_t at tau_t, all from the merged model | alpha H0 (theta_t - theta_a) |
| anchored | gradient_matching's, and anchor_weight: I at another merge | |

Precisions are diagonals for a piece of any tensor, and Kronecker products for a matrix whose curvature files hold factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.rules.block import total
from gradmatch.rules.structures import Product, Structure
from gradmatch.rules.system import Belief

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Block, Curved

IDENTITY = Product(diagonal=1.0)


@dataclass(frozen=True)
class Known:
    """What is known of one matrix, or of one piece of a tensor; what a rule does not need is None or empty.

    Attributes:
        theta0: (*s,).
        tau: (T, *s), after the transforms.
        alpha: T weights.
        h0: H0 of the summed loss, with its weight and floor.
        h: H_t, T of them.
        g: (T, *s), measured gradients of the summed losses.
        anchor: (*s,), another merge minus theta0.
        damping: lambda, in the units of H0.
        delta0: the floor.
        options: of the rule.
    """

    theta0: Tensor
    tau: Tensor
    alpha: Sequence[float]
    h0: Structure
    h: Sequence[Structure]
    g: Tensor | None
    anchor: Tensor | None
    damping: float
    delta0: float
    options: Mapping[str, Any]

    @classmethod
    def of(cls, block: Block) -> Known:
        """The same of a block of an elementwise rule, with diagonals."""
        found = vars(block)
        h = [Product(diagonal=one) for one in found.get("h", ())]
        return cls(
            block.theta0, block.tau, block.alpha.flatten().tolist(), Product(diagonal=found.get("h0", block.delta0)), h,
            found.get("g"), found.get("anchor"), found.get("damping", 0.0), block.delta0, block.options,
        )  # fmt: skip

    @classmethod
    def of_matrix(cls, theta0: Tensor, tau: Tensor, alpha: Sequence[float], curved: Curved) -> Known:
        """The same of a matrix, with whatever structure its curvatures have."""
        return cls(
            theta0, tau, alpha, curved.h0, curved.h, curved.g, curved.anchor, curved.damping, curved.delta0, curved.options
        )  # fmt: skip

    @property
    def sum(self) -> Tensor:
        """sum_t alpha_t tau_t, (*s,)."""
        return self.weighted(self.tau)

    def weighted(self, values: Tensor) -> Tensor:
        """sum_t alpha_t values_t; (T, *s) -> (*s,)."""
        return total([weight * one for weight, one in zip(self.alpha, values, strict=True)])

    def tasks(self, sign: float = 1.0) -> list[Belief]:
        """alpha_t: H_t at tau_t, times a sign."""
        return [Belief(sign * a, h, t) for a, h, t in zip(self.alpha, self.h, self.tau, strict=True)]


Listed = tuple[list[Belief], "Tensor | None"]  # the beliefs, and b


def averaging(k: Known) -> Listed:
    """1: I at mean_t tau_t."""
    return [Belief(1.0, IDENTITY, total(list(k.tau)) / len(k.tau))], None


def task_arithmetic(k: Known) -> Listed:
    """1: I at scale * sum_t alpha_t tau_t."""
    return [Belief(1.0, IDENTITY, k.options.get("scale", 1.0) * k.sum)], None


def fisher(k: Known) -> Listed:
    """alpha_t: H_t at tau_t; 1: delta0 I at sum_t alpha_t tau_t, which decides where no task knows anything."""
    return [*k.tasks(), Belief(1.0, Product(diagonal=k.delta0), k.sum)], None


def fisher_base(k: Known) -> Listed:
    """alpha_t: H_t at tau_t - theta0; 1: H0 at 0: the mixed origins of FA1, which takes tau_t for a place and not a difference."""
    return [
        Belief(1.0, k.h0, 0.0),
        *(Belief(a, h, t - k.theta0) for a, h, t in zip(k.alpha, k.h, k.tau, strict=True)),
    ], None


def gradient_matching(k: Known) -> Listed:
    """alpha_t: H_t at tau_t; 1: H0 at sum_t alpha_t tau_t. With `hbar_weight` w, w: H_t at 0, H0 at 0, and the rest is b."""
    inside = k.options.get("hbar_weight")
    if inside is None:
        return [*k.tasks(), Belief(1.0, k.h0, k.sum)], None
    b = -total([a * (k.h0(t) + h(t)) for a, h, t in zip(k.alpha, k.h, k.tau, strict=True)])
    return [Belief(1.0, k.h0, 0.0), *(Belief(inside, h, 0.0) for h in k.h)], b


def measured(k: Known) -> Listed:
    """alpha_t: H_t at tau_t; 1: H0 at 0; b = sum_t alpha_t g_t."""
    assert k.g is not None
    return [*k.tasks(), Belief(1.0, k.h0, 0.0)], k.weighted(k.g)


def removal(k: Known) -> Listed:
    """Eq. 12 with -alpha. Where the guard acts it is no list of beliefs: what must remain is floored."""
    return [*k.tasks(-1.0), Belief(1.0, k.h0, -k.sum)], None


def guarded(k: Known) -> Listed:
    """1: H0 at 0 (what must stay); 1: lambda I at -sum_t alpha_t tau_t (what should go)."""
    return [Belief(1.0, k.h0, 0.0), Belief(1.0, Product(diagonal=k.damping), -k.sum)], None


def signed(k: Known) -> Listed:
    """alpha_t > 0: H_t at tau_t; 1: H0 at sum_{alpha_t > 0} alpha_t tau_t (what must stay and what is added); 1: lambda I at sum_t alpha_t tau_t.

    Without tasks that are taken away it is Eq. 12 with delta0 = lambda, and without added ones the guarded removal.
    """
    added = [(a, h, t) for a, h, t in zip(k.alpha, k.h, k.tau, strict=True) if a > 0]
    centre: Tensor | float = total([a * t for a, _, t in added]) if added else 0.0
    beliefs = [Belief(a, h, t) for a, h, t in added]
    return [*beliefs, Belief(1.0, k.h0, centre), Belief(1.0, Product(diagonal=k.damping), k.sum)], None


def ascent(k: Known) -> Listed:
    """1: H0 + lambda I at 0; b = -sum_t alpha_t g_t: one damped Newton step up the loss on what should go."""
    assert k.g is not None
    return [Belief(1.0, k.h0, 0.0), Belief(1.0, Product(diagonal=k.damping), 0.0)], -k.weighted(k.g)


def anchored(k: Known) -> Listed:
    """Those of Eq. 12; anchor_weight: I at another merge."""
    assert k.anchor is not None
    beliefs, b = gradient_matching(k)
    return [*beliefs, Belief(k.options["anchor_weight"], IDENTITY, k.anchor)], b


def unmerged(k: Known) -> Listed:
    """1: P, the posterior, at 0; -alpha: H_t at tau_t; b = alpha H0 (theta_t - theta_a), where theta_a is the base before the merge.

    What is left of a product of beliefs when the task's own, (q_t / p0)^alpha, is divided out. tau and the anchor are differences to
    the merged model; H0 is a second task's curvature, if there is one, and the option `prior`.
    """
    assert k.anchor is not None
    away = k.tau[0] - k.anchor
    b = k.options["prior"] * away
    for weight, h in zip(k.alpha[1:], k.h[1:], strict=True):
        b = b + weight * h(away)
    return [Belief(1.0, k.h0, 0.0), Belief(-k.alpha[0], k.h[0], k.tau[0])], k.alpha[0] * b


def flat(name: str, k: Known) -> Tensor:
    """The update of a rule where no curvature is known but the floor, (*s,): where conjugate gradients begin, as what they do not see stays."""
    if name == "unmerged":
        assert k.anchor is not None
        return -k.alpha[0] * (k.tau[0] - k.anchor)
    return FLAT.get(name, 1.0) * k.sum


FLAT = {
    "removal": -1.0,
    "guarded": -1.0,
    "ascent": 0.0,
    "fisher_base": 0.0,
    "measured": 0.0,
}  # times task arithmetic, elsewhere 1

BELIEFS: dict[str, Callable[[Known], Listed]] = {
    "averaging": averaging,
    "task_arithmetic": task_arithmetic,
    "fisher": fisher,
    "mats": fisher,
    "fisher_base": fisher_base,
    "gradient_matching": gradient_matching,
    "kronecker": gradient_matching,
    "measured": measured,
    "removal": removal,
    "guarded": guarded,
    "signed": signed,
    "ascent": ascent,
    "anchored": anchored,
    "unmerged": unmerged,
}
