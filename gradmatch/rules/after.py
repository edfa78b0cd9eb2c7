"""Edits of the merged update, theta - theta0 -> another update, after any rule that adds tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.rules.options import Options, declared, option
from gradmatch.rules.singular import COLUMNS, rounding, triplets

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Update


@dataclass(frozen=True)
class After:
    """What the engine must know of an edit of the merged update.

    Attributes:
        apply: (update, options) -> the edited update, in the same shape; it may be edited in place.
        options: with their defaults.
        source: who published it.
        matrices: whether it sees whole matrices, with the task vectors; tensors that are none then stay as the rule has them.
        deep: whether it must know where in the depth of the model a tensor lies.
        positive: whether it makes no sense of tasks with a negative weight.
        memory: values that a worker holds for each of the tensor's, where it sees whole matrices.
        square: the same for each of the m x m of a matrix's smaller side m.
    """

    apply: Callable[[Update, Any], Tensor]
    options: Options
    source: str
    matrices: bool = False
    deep: bool = False
    positive: bool = False
    memory: float = 0
    square: float = 0

    def __post_init__(self) -> None:
        """A plain table of defaults becomes `Options`."""
        object.__setattr__(self, "options", declared(self.options))


@dataclass(frozen=True)
class SvcOptions(Options):
    """Singular value calibration."""

    least: float | None = option(
        None, "(0, inf]", kind=1.0,
        help="least response of a task that counts; at 1 singular values are only damped (default: 1/T)",
    )  # fmt: skip


@dataclass(frozen=True)
class LinesOptions(Options):
    """Layer scaling."""

    alpha: float | None = option(None, kind=1.0, help="factor at the first layer (default: 1/T)")
    beta: float | None = option(
        None, kind=1.0, help="what is added to it from there to the last layer (default: 1 - alpha)"
    )


def svc(update: Update, options: SvcOptions) -> Tensor:
    """Singular value calibration of Li et al. 2026 (arXiv 2602.05536): sigma_r *= T / sum_t max(a, s_t^r).

    With the update D = U S V', s_t^r = <u_r' D, u_r' tau_t> / |u_r' tau_t|^2 is how far D goes along the response of task t in
    direction r, as a multiple of the task's own; a = `least`. Directions that several tasks share are added up by a sum of tasks,
    and are damped here. A task without a response in a direction, to rounding, counts with s = 0. D (m, n). Returns (m, n).

    Example:
        >>> import torch
        >>> from gradmatch.rules.block import Update
        >>> tau = torch.stack([torch.diag(torch.tensor(d)) for d in ([3.0, 1.0], [3.0, 0.0])])
        >>> svc(Update(tau.sum(0), tau, 2, 0.0), SvcOptions(least=1.0))  # 6 is twice what both want, 1 what one wants
        tensor([[3., 0.],
                [0., 1.]])
    """
    import torch

    d, least = update.value, 1 / update.count if options.least is None else options.least
    u = triplets(d)[0]
    along = u.mT @ d  # (k, n), the response of D in every direction
    responses = d.new_zeros(u.shape[1])
    for tau in update.tau:
        inner, size = (d.new_zeros(u.shape[1]) for _ in range(2))
        for merged, part in zip(*(torch.split(x, COLUMNS, 1) for x in (along, tau)), strict=True):
            own = u.mT @ part
            inner += (merged * own).sum(1)
            size += own.square().sum(1)
        told = size > (rounding(d) * tau.norm()) ** 2
        responses += (told * inner / (size + ~told)).clamp(min=least)
    d.addmm_(u * (update.count / responses - 1), along)
    return d


def lines(update: Update, options: LinesOptions) -> Tensor:
    """LiNeS of Wang et al. 2024, (alpha + beta (l - 1) / (L - 1)) D in layer l of L: deep layers keep more of the update.

    Embeddings count as the first layer, what stands behind the layers (final norm, head) as the last. By default alpha = 1/T and
    beta = 1 - 1/T, from the mean of the task vectors to their sum where D is their sum. D (n,). Returns (n,).

    Example:
        >>> import torch
        >>> from gradmatch.rules.block import Update
        >>> lines(Update(torch.tensor([4.0]), [], 2, 0.5), LinesOptions())
        tensor([3.])
    """
    alpha = 1 / update.count if options.alpha is None else options.alpha
    beta = 1 - alpha if options.beta is None else options.beta
    return update.value * (alpha + beta * update.depth)


AFTER: dict[str, After] = {
    "svc": After(svc, SvcOptions(), "Li et al. 2026", matrices=True, positive=True, memory=5, square=9),
    "lines": After(lines, LinesOptions(), "Wang et al. 2024 (LiNeS)", deep=True),
}
