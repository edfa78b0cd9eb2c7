"""The rules of the family for whole matrices, whose curvature is A (x) B.

Three solvers. "fast": a few steps of conjugate gradients in the models' precision, until 5 % of the system are left. "exact": the same
in float64 until next to nothing is. "eigenbasis": every curvature by its diagonal in the eigenbasis of the nearest product
(`gradmatch.rules.structures.common_basis`), so that the elementwise rule merges the coordinates; that is exact for one Kronecker
product and multiples of the identity, and the guard of a removal is defined there. What is left of the system is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules.beliefs import BELIEFS, Known, flat
from gradmatch.rules.block import Block, NotPositiveError, UnboundedError, total
from gradmatch.rules.matrix_options import allowed_residual, is_exact, solver
from gradmatch.rules.rule import Elementwise, Rule, Solve
from gradmatch.rules.structures import common_basis, has_closed_basis
from gradmatch.rules.system import (
    ITERATIONS,
    Solution,
    common_centre,
    iterate,
    posterior,
    residual,
)
from gradmatch.rules.system import solve as solve_exactly

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Curved


FARTHEST = 100  # times the weighted task vectors' norm, that a guarded removal of one matrix may go


def in_matrices(name: str, rule: Elementwise, formula: Any = "", source: str = "") -> Solve:
    """The rule of matrices whose curvature has factors, from an elementwise rule and its list of beliefs in BELIEFS."""

    def solve(theta0: Tensor, tau: Tensor, alpha: Sequence[float], curved: Curved) -> Tensor:
        known = Known.of_matrix(theta0, tau, alpha, curved)
        return solved(name, rule, known, curved.health)

    return Solve(
        formula or rule.spelt or rule.formula,
        source or rule.source,
        solve,
        otherwise=rule,
        options=rule.options,
        single=lambda options: not is_exact(options),
        needs=rule.needs,
        lacks=rule.lacks,
        removes=rule.removes,
        guarded=rule.guarded,
        damped=rule.damped,
        signed=rule.signed,
        caution=rule.caution,
        family=name,
    )


def choosing(rule: Elementwise, solved: Solve) -> Callable[[Mapping[str, Any]], Rule | None]:
    """Which of the two a name stands for: by `structure`, and None for the entry of RULES itself."""
    strict = replace(solved, needs=solved.needs | {"factors"})

    def chosen(options: Mapping[str, Any]) -> Rule | None:
        structure = options.get("structure")
        if structure == "kronecker":
            return strict
        return rule if structure == "diagonal" else None

    return chosen


def with_factors(name: str, rule: Elementwise) -> Elementwise:
    """An elementwise rule that takes structure="kronecker" too."""
    rule = replace(rule, family=name)
    strict = replace(in_matrices(name, rule), needs=rule.needs | {"factors"})

    def chosen(options: Mapping[str, Any]) -> Rule | None:
        if options.get("structure") == "kronecker":
            return strict
        for one in ("solver", "iterations", "tolerance", "conv1d"):
            if options.get(one) is not None:
                raise GradmatchError(
                    f"{name}: {one} is of matrices whose curvature has Kronecker factors; give structure='kronecker' too",
                    "unknown_option",
                    one,
                )
        return None

    return replace(rule, chosen=chosen)


def solved(name: str, rule: Elementwise, known: Known, health: dict[str, float]) -> Tensor:
    """theta0 + the mode of the rule's beliefs, by the solver that the options name.

    By default it is in the eigenbasis where that is the solution, and where the rule is guarded; else by a few conjugate gradients.

    Raises:
        NotPositiveError: the sum of the precisions is not positive.
    """
    chosen = solver(known.options)
    if chosen == "exact":
        return exact(name, known, health)
    beliefs, b = BELIEFS[name](known)
    if chosen == "eigenbasis" or rule.guarded or has_closed_basis(posterior(beliefs)):
        return in_eigenbasis(name, rule, known, health)
    agreed = common_centre(beliefs)
    found = Solution(agreed) if agreed is not None and b is None else iterate(beliefs, flat(name, known), b)
    return _updated(known, found, health)


def exact(name: str, known: Known, health: dict[str, float]) -> Tensor:
    """theta0 + the mode of the rule's beliefs. What no curvature sees is as the rule has it without any: task arithmetic, or its negative.

    Raises:
        NotPositiveError: the sum of the precisions is not positive.
    """
    options = known.options
    beliefs, b = BELIEFS[name](known)
    most = options.get("iterations")
    found = solve_exactly(
        beliefs,
        known.theta0,
        b,
        flat(name, known),
        ITERATIONS if most is None else most,
        allowed_residual(options),
    )
    return _updated(known, found, health)


def _updated(known: Known, found: Solution, health: dict[str, float]) -> Tensor:
    if not found.positive:
        raise NotPositiveError
    health.update(iterations=float(found.iterations), residual=found.residual)
    return known.theta0 + found.update


def in_eigenbasis(name: str, rule: Elementwise, known: Known, health: dict[str, float]) -> Tensor:
    """The elementwise rule on the coordinates in the common eigenbasis, there and back.

    Raises:
        NotPositiveError: H0 + sum_t alpha_t H_t is not positive there.
        UnboundedError: a guarded removal goes beyond `FARTHEST`.
    """
    import torch

    beliefs, b = BELIEFS[name](known)
    theta0, agreed = known.theta0, common_centre(beliefs)
    if agreed is not None and b is None:
        health.update(iterations=0.0, residual=0.0)
        return theta0 + agreed
    basis = common_basis(posterior(beliefs), theta0)

    def turned(w: Tensor | None) -> Tensor | None:
        return None if w is None else basis.into(w).flatten(-2)

    block = Block(
        theta0=turned(theta0), tau=turned(known.tau), alpha=theta0.new_tensor(known.alpha)[:, None], delta0=known.delta0,
        options=known.options, h0=basis.diagonal(known.h0, theta0).flatten(), g=turned(known.g), anchor=turned(known.anchor),
        damping=known.damping,
    )  # fmt: skip
    if known.h:
        block.h = torch.stack([basis.diagonal(one, theta0).flatten() for one in known.h])
    if rule.divides:
        terms = block.alpha * block.h
        h0 = block.h0 if "base_curvature" in rule.needs else theta0.new_full((1,), known.delta0)
        rounding = 8 * torch.finfo(theta0.dtype).eps * (h0.abs() + total(terms.abs()))
        if bool((h0 + total(terms) <= rounding).any()):
            raise NotPositiveError
    if rule.guarded:
        left = block.h0 - total(block.alpha * block.h)
        health.update(
            weights=float(left.numel()), clamped=float((left < block.options["keep"] * block.h0).sum())
        )
    merged = rule.elementwise(block)
    update = basis.back((merged - block.theta0).reshape(len(theta0), -1))
    if rule.guarded:
        moved = (merged - block.theta0).square()
        asked = float((block.alpha * block.tau).norm())
        if float(moved.sum()) ** 0.5 > FARTHEST * asked:
            raise UnboundedError(float(moved.sum()) ** 0.5 / asked)
        health.update(update=float(moved.sum()), update_h0=float((block.h0 * moved).sum()))
    health.update(iterations=0.0, residual=residual(beliefs, update, b))
    return theta0 + update
