"""RegMean: linear layers merged so that their outputs on the tasks' inputs change least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.rules.beliefs import BELIEFS, Known, Listed
from gradmatch.rules.block import NotPositiveError, total
from gradmatch.rules.options import Options, option
from gradmatch.rules.structures import Product, Structure
from gradmatch.rules.system import Belief

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Curved


@dataclass(frozen=True)
class RegMeanOptions(Options):
    """How the Gram matrices are regularised, and how square matrices are stored."""

    off_diagonal: float = option(0.9, "[0, 1]", help="factor on what lies off a Gram matrix's diagonal")
    ridge: float = option(1e-6, "[0, inf]", help="added to a Gram matrix's diagonal, as a share of its mean")
    conv1d: bool | None = option(
        None, kind=True, help="whether square matrices are stored [in, out] (default: as the config says)"
    )


def regmean(theta: Tensor, alpha: Tensor, gram: Tensor, off_diagonal: float, ridge: float) -> Tensor:
    """Jin et al. 2023: W' = (sum_t alpha_t G_t)^-1 sum_t alpha_t G_t W_t', G_t = sum x x' over the task's inputs.

    theta: (T, out, in), W_t' its transpose; alpha: (T, 1, 1); gram: (T, in, in). Returns (out, in). The off-diagonal of
    each G_t is scaled by `off_diagonal`; ridge is added to every G_t as ridge * mean(diag G_t) * I, so that inputs that
    never occur are averaged. It is Eq. 12 with H0 = 0 and H_t = I (x) G_t.

    Example:
        >>> import torch
        >>> theta, gram = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[1.0]], [[3.0]]])
        >>> regmean(theta, torch.ones(2, 1, 1), gram, off_diagonal=1.0, ridge=0.0)
        tensor([[2.5000]])
    """
    g = alpha * regularised(gram, off_diagonal, ridge)
    right = (g @ theta.transpose(1, 2)).sum(0)  # (in, out)
    return _solve(g.sum(0), right).transpose(0, 1)


def regularised(gram: Tensor, off_diagonal: float, ridge: float) -> Tensor:
    """Gram matrices (T, in, in) with their off-diagonal scaled and the ridge added: of the mean diagonal, or 1 where all are zero."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # (T, in)
    size = diagonal.mean(-1, keepdim=True)
    g = gram * off_diagonal
    g.diagonal(dim1=-2, dim2=-1).copy_(diagonal + ridge * (size if bool(size.any()) else 1.0))
    return g


def moments(curved: Structure) -> Tensor:
    """G (in, in) of one task: of several products, as the posterior of a merge has them, the sum of theirs."""
    return total([term.scale * term.a for term in curved.terms if term.a is not None])


def solve(theta0: Tensor, tau: Tensor, alpha: Sequence[float], curved: Curved) -> Tensor:
    """`regmean` as the rule of a matrix: G_t = N_t A_t, the second moments of a task's inputs.

    Raises:
        NotPositiveError: their sum is singular.
    """
    import torch

    options: Any = curved.options
    gram = torch.stack([moments(one) for one in curved.h])
    weight = tau.new_tensor(alpha).reshape(-1, 1, 1)
    return regmean(theta0 + tau, weight, gram, options.off_diagonal, options.ridge)


def beliefs(k: Known) -> Listed:
    """alpha_t: I (x) G_t at tau_t."""
    import torch

    gram = torch.stack([moments(one) for one in k.h])
    grams = regularised(gram, k.options["off_diagonal"], k.options["ridge"])
    return [Belief(w, Product(1.0, a=g), t) for w, g, t in zip(k.alpha, grams, k.tau, strict=True)], None


BELIEFS["regmean"] = beliefs


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """By Cholesky factorisation.

    Raises:
        NotPositiveError: the matrix is singular.
    """
    import torch

    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise NotPositiveError
    return torch.cholesky_solve(right, factor)
