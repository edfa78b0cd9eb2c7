"""Rules without curvature files or data: the inputs of a layer are taken to have the second moments that its task vector has.

What fine-tuning adds to a linear layer is a sum of outer products g x' of gradients and inputs, so that tau'tau (in, in) stands for
the moments X'X of the task's inputs (up to a factor), with which RegMean weighs. Vectors are averaged by the weights.
`gradmatch.estimators.from_task_vectors` gives the same curvatures to every other rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.rules.beliefs import BELIEFS, Known, Listed
from gradmatch.rules.block import NotPositiveError, total
from gradmatch.rules.linear import Normalize, weight_sum, weighted
from gradmatch.rules.options import Options, option
from gradmatch.rules.rule import Linear, Solve
from gradmatch.rules.structures import Product, Structure
from gradmatch.rules.system import Belief
from gradmatch.rules.system import solve as solve_exactly

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Curved


@dataclass(frozen=True)
class TaskVectorOptions(Options):
    """How the moments are regularised, and how matrices are stored."""

    ridge: float = option(
        1e-6, "[0, inf]", help="every task's moments have ridge times the mean of their diagonal added to it"
    )
    conv1d: bool | None = option(
        None, kind=True, help="whether square matrices are stored [in, out] (default: as the config says)"
    )


@dataclass(frozen=True)
class AceOptions(TaskVectorOptions):
    """As the others', and the prior that the tasks share."""

    prior: float = option(
        0.01, "[0, inf]", help="precision at the tasks' mean, as a share of the mean of the moments' diagonal"
    )


def moments(tau: Tensor, centred: bool = False) -> Tensor:
    """tau'tau, (in, in), of a task vector (out, in); centred: of its rows without their mean.

    Example:
        >>> import torch
        >>> moments(torch.tensor([[1.0, 2.0], [1.0, 0.0]])).tolist()
        [[2.0, 2.0], [2.0, 4.0]]
    """
    rows = tau - tau.mean(0, keepdim=True) if centred else tau
    return rows.T @ rows


def actmat(k: Known) -> Listed:
    """alpha_t: I (x) tau_t'tau_t at tau_t. Hameed, Tam & Raffel 2026 (ACTMat)."""
    return [
        Belief(a, _ridged(moments(t), k.options["ridge"]), t) for a, t in zip(k.alpha, k.tau, strict=True)
    ], None


def wudi(k: Known) -> Listed:
    """alpha_t / norm(tau_t)^2: I (x) tau_t'tau_t at tau_t: the minimum of the loss of Cheng et al. 2025 (WUDI), which they descend."""
    found = []
    for weight, tau in zip(k.alpha, k.tau, strict=True):
        size = float(tau.square().sum())
        if size:  # a task that did not train this tensor says nothing of it
            found.append(Belief(weight / size, _ridged(moments(tau), k.options["ridge"]), tau))
    return found, None


def ace(k: Known) -> Listed:
    """alpha_t: I (x) A_t at tau_t, A_t of centred rows and of trace 1; prior / in: I at the weighted mean. Xu et al. 2026 (ACE-Merging).

    Assumed: the published prior is what the sum of the moments has in common, added to one side of the equation alone, so that it
    shrinks the update; here it is a belief (a multiple of the identity, with the size of the mean eigenvalue) at the tasks' mean.
    Moments are normalised always, not by a threshold of heterogeneity, and no isotropic part is added afterwards.
    """
    found, width = [], k.tau.shape[-1]
    for weight, tau in zip(k.alpha, k.tau, strict=True):
        a = moments(tau, centred=True)
        trace = float(a.trace())
        if trace:
            found.append(Belief(weight, _ridged(a / trace, k.options["ridge"]), tau))
    mean = k.sum / weight_sum(k.alpha)
    return [
        *found,
        Belief(weight_sum(k.alpha) * k.options["prior"] / width, Product(diagonal=1.0), mean),
    ], None


def _ridged(a: Tensor, ridge: float) -> Structure:
    """I (x) (A + ridge mean(diag A) I)."""
    return Product(1.0, a=a, diagonal=ridge * float(a.diagonal().mean()))


def solving(listed: Callable[[Known], Listed]) -> Callable[[Tensor, Tensor, Sequence[float], Curved], Tensor]:
    """The rule of one matrix from its list of beliefs.

    Raises:
        NotPositiveError: the sum of the moments is singular.
    """

    def solve(theta0: Tensor, tau: Tensor, alpha: Sequence[float], curved: Curved) -> Tensor:
        known = Known.of_matrix(theta0, tau, alpha, curved)
        beliefs, b = listed(known)
        if not beliefs or not bool(tau.any()):
            return theta0 + total(list(tau))
        found = solve_exactly(beliefs, theta0, b)
        if not found.positive:
            raise NotPositiveError
        curved.health.update(iterations=float(found.iterations), residual=found.residual)
        return theta0 + found.update

    return solve


WEIGHTED = Linear(
    "theta0 + sum_t alpha_t tau_t / sum_t alpha_t", "weighted average of weights", lambda a, gram, o: weighted(a),
    options=Normalize(), lacks={"zero": "weights are relative and cannot all be zero"},
)  # fmt: skip
BELIEFS.update(actmat=actmat, wudi=wudi, ace=ace)


def _rule(formula: str, source: str, listed: Callable[[Known], Listed], options: Any = None) -> Solve:
    return Solve(
        formula, source, solving(listed), otherwise=WEIGHTED, options=options or TaskVectorOptions(), relative=True, whole=True,
        lacks={"zero": "weights are relative and cannot all be zero"},
    )  # fmt: skip


ACTMAT = _rule(
    "theta0 + sum_t alpha_t tau_t A_t (sum_t alpha_t A_t)^-1, A_t = tau_t'tau_t",
    "Hameed, Tam & Raffel 2026",
    actmat,
)
WUDI = _rule(
    "theta0 + sum_t w_t tau_t A_t (sum_t w_t A_t)^-1, A_t = tau_t'tau_t, w_t = alpha_t / norm(tau_t)^2", "Cheng et al. 2025 (closed form)",
    wudi,
)  # fmt: skip
ACE = _rule(
    "theta0 + (sum_t alpha_t tau_t A_t + p mean tau) (sum_t alpha_t A_t + p I)^-1, A_t centred tau_t'tau_t of trace 1", "Xu et al. 2026",
    ace, AceOptions(),
)  # fmt: skip
