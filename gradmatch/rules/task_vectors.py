"""Rules without curvature files or data: the inputs of a layer are taken to have the second moments that its task vector has.

What fine-tuning adds to a linear layer is a sum of outer products g x' of gradients and inputs, so that tau'tau (in, in) stands for
the moments X'X of the task's inputs (up to a factor), with which RegMean weighs. Vectors are averaged by the weights.
`gradmatch.estimators.from_task_vectors` gives the same curvatures to every other rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.rules.beliefs import Known
from gradmatch.rules.block import NotPositiveError
from gradmatch.rules.linear import Normalize, weighted
from gradmatch.rules.options import Options, option
from gradmatch.rules.rule import Linear, Solve
from gradmatch.rules.structures import Moments, Product
from gradmatch.rules.system import Belief, solve_by_moments

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


def actmat(k: Known) -> Iterator[Belief]:
    """alpha_t: I (x) tau_t'tau_t at tau_t. Hameed, Tam & Raffel 2026 (ACTMat)."""
    for weight, tau in zip(k.alpha, k.tau, strict=True):
        yield Belief(weight, Moments(tau, ridge=k.options["ridge"]), tau)


def wudi(k: Known) -> Iterator[Belief]:
    """alpha_t / norm(tau_t)^2: I (x) tau_t'tau_t at tau_t: the minimum of the loss of Cheng et al. 2025 (WUDI), which they descend."""
    for weight, tau in zip(k.alpha, k.tau, strict=True):
        size = float(tau.square().sum())
        if size:  # a task that did not train this tensor says nothing of it
            yield Belief(weight / size, Moments(tau, ridge=k.options["ridge"]), tau)


def ace(k: Known) -> Iterator[Belief]:
    """alpha_t: I (x) A_t at tau_t, A_t of centred rows and of trace 1; prior / in: I at the weighted mean. Xu et al. 2026 (ACE-Merging).

    Assumed: the published prior is what the sum of the moments has in common, added to one side of the equation alone, so that it
    shrinks the update; here it is a belief (a multiple of the identity, with the size of the mean eigenvalue) at the tasks' mean.
    Moments are normalised always, not by a threshold of heterogeneity, and no isotropic part is added afterwards.
    """
    precision = k.options["prior"] / k.theta0.shape[-1]
    for weight, tau in zip(k.alpha, k.tau, strict=True):
        rows = tau - tau.mean(0, keepdim=True)
        trace = float(rows.square().sum())
        if trace:
            yield Belief(weight, Moments(rows, 1 / trace, k.options["ridge"]), tau)
        # of multiples of the identity the beliefs of all tasks are one at their mean
        yield Belief(precision * weight, Product(diagonal=1.0), tau)


def solving(
    listed: Callable[[Known], Iterator[Belief]],
) -> Callable[[Tensor, Any, Sequence[float], Curved], Tensor]:
    """The rule of one matrix from its beliefs, which are added up one after the other.

    Raises:
        NotPositiveError: the sum of the moments is singular.
    """

    def solve(theta0: Tensor, tau: Any, alpha: Sequence[float], curved: Curved) -> Tensor:
        found = solve_by_moments(listed(Known.of_matrix(theta0, tau, alpha, curved)), theta0)
        if not found.positive:
            raise NotPositiveError
        curved.health.update(iterations=0.0, residual=found.residual)
        return theta0 + found.update

    return solve


WEIGHTED = Linear(
    "theta0 + sum_t alpha_t tau_t / sum_t alpha_t", "weighted average of weights", lambda a, gram, o: weighted(a),
    options=Normalize(), lacks={"zero": "weights are relative and cannot all be zero"},
)  # fmt: skip


def _rule(
    formula: str, source: str, listed: Callable[[Known], Iterator[Belief]], options: Any = None
) -> Solve:
    return Solve(
        formula, source, solving(listed), otherwise=WEIGHTED, options=options or TaskVectorOptions(), relative=True, whole=True,
        streams=True, memory=(10, 0), square=1.1,
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
