"""Which rules merge adapters by their cores, and the update of one core.

The update of adapter t on a weight is L_t R_t, of rank r_t. With orthonormal bases U of all L_t and V of all R_t', side by side, it
is U M_t V' with the core M_t = (U' L_t)(R_t V), which has a row and a column for each rank of all adapters together (core space,
Panariello et al. 2025, arXiv 2509.17786). A rule that turns with its task vectors gives U M V', M its update of the cores: nothing of
the size of the weight is ever made. What treats entries one by one does not turn, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules.options import Options
from gradmatch.rules.rule import Elementwise, Gram, Linear, Rule, Solve, Whole

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 1e-9  # of c0 + sum_t c_t: what may be missing to 1


def check_core(method: str, rule: Rule, options: Options, transforms: Sequence[str]) -> None:
    """Refuse what does not turn with its task vectors.

    Raises:
        ValueError: a rule or a transform that treats entries one by one, needs curvature or whole models, or searches.
    """
    why = ""
    if transforms:
        why = f"{transforms[0]} edits task vectors entry by entry"
    elif isinstance(rule, Elementwise):
        why = f"{method} treats weights one by one"
    elif isinstance(rule, Solve):
        why = f"{method} needs the curvature of whole matrices"
    elif isinstance(rule, Whole) and rule.update is None:
        why = f"{method} looks at single weights or rows"
    elif isinstance(rule, Linear) and rule.searches:
        why = f"{method} scores whole models"
    elif isinstance(rule, Linear) and rule.gram_of(options) == "theta":
        why = f"{method} needs inner products of whole models"
    elif isinstance(rule, Linear) and options.get("along", "tensor") != "tensor":
        why = f"{method} along {options['along']} treats single rows or columns"
    if why:
        raise GradmatchError(
            f"space='core' merges adapters by their cores, whose entries are not those of the weights, and {why}; take a linear rule or "
            "one of singular values (task_arithmetic, averaging, tsv_m, iso_c, ...), or space='weights', which gives a whole model",
            "bad_setting",
            method,
        )


def merge_cores(
    rule: Rule, cores: Sequence[Tensor], alpha: Sequence[float], options: Options, rank: int
) -> Tensor:
    """The update of the cores, (R, R'), by a rule that `check_core` lets pass.

    Args:
        rule: linear, or one with an update.
        cores: M_t, T of (R, R').
        alpha: weights.
        options: of the rule.
        rank: the smaller side of the whole matrix.

    Raises:
        ValueError: as `coefficients_of`.

    Example:
        >>> import torch
        >>> from gradmatch.rules import RULES
        >>> rule = RULES["averaging"]
        >>> merge_cores(rule, [torch.ones(1, 1), torch.zeros(1, 1)], [1.0, 1.0], rule.options, 8)
        tensor([[0.5000]])
    """
    if isinstance(rule, Whole):
        assert rule.update is not None
        return rule.update(cores, alpha, options, rank)
    assert isinstance(rule, Linear)
    gram = (
        [[float((one * other).sum()) for other in cores] for one in cores] if rule.gram_of(options) else None
    )
    c = coefficients_of(rule, alpha, gram, options)
    update: Tensor = sum(ck * core for ck, core in zip(c, cores, strict=True))  # type: ignore[assignment]
    return update


def coefficients_of(rule: Linear, alpha: Sequence[float], gram: Gram | None, options: Options) -> list[float]:
    """c_t of theta0 + sum_t c_t tau_t, from a linear rule's c0 theta0 + sum_t c_t theta_t.

    Raises:
        ValueError: c0 + sum_t c_t is not 1, so that the base is scaled as well.
    """
    c0, c, _ = rule.terms(alpha, gram, options)
    whole = c0 + sum(c)
    if abs(whole - 1) > SHARE * (1 + sum(map(abs, c))):
        raise GradmatchError(
            f"these weights scale the base itself, by {whole:g}, which no adapter can do; give weights that sum to 1 (or normalize=True), "
            "or take task_arithmetic",
            "bad_setting",
        )
    return c
