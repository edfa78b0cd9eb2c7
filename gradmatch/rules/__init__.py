"""Every merging rule by name: what it computes, what it needs, and which invariants hold. See README.md beside this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.rules import rowwise
from gradmatch.rules.fisher_base import fisher_base
from gradmatch.rules.gradient_matching import fisher, gradient_matching
from gradmatch.rules.linear import averaging, negation, passthrough, task_arithmetic, weighted
from gradmatch.rules.matena_raffel import matena_raffel
from gradmatch.rules.measured import measured
from gradmatch.rules.regmean import regmean
from gradmatch.rules.removal import ewr, fisher_negation, removal
from gradmatch.rules.spherical import karcher, model_stock, nuslerp, slerp

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Block

__all__ = [
    "RULES", "Rule", "averaging", "ewr", "fisher", "fisher_base", "fisher_negation", "gradient_matching", "karcher",
    "matena_raffel", "measured", "model_stock", "negation", "nuslerp", "passthrough", "regmean", "removal", "slerp",
    "task_arithmetic", "weighted",
]  # fmt: skip

Linear = Callable[
    [Sequence[float], "Sequence[Sequence[float]] | None", Mapping[str, Any]], tuple[float, list[float], str]
]


@dataclass(frozen=True)
class Rule:
    """One way to merge, by exactly one of `linear` and `elementwise`; matrices whose factors are known by `matrix`.

    Attributes:
        formula: the effective formula, for cards and plans.
        source: who published it.
        linear: (alpha, gram, options) -> (c0, c, branch) of c0 theta0 + sum_t c_t theta_t, for rules that combine models.
        gram: whose inner products `linear` needs: "", "theta" or "tau".
        elementwise: a Block -> merged values, for rules that weigh coordinate by coordinate.
        fast: +1 or -1 where the in-place kernel of Eq. 12 computes it too (the sign of alpha), else 0.
        rows: (theta0, tau, alpha, options) -> merged, on matrices whose rows are the vectors that the option `along` names; for
            rules that can treat every row or column of a tensor by itself.
        matrix: whether it solves for matrices whose factors are known (`gradmatch.engine.matrices`).
        needs: of "curvature", "base_curvature", "gradient", "gram", "factors".
        options: name -> default.
        transforms: edits of the task vectors that belong to the rule.
        models: (fewest, most) tasks.
        lacks: invariants that do not hold, each with the reason; tests assert both sides.
        relative: whether it divides by the sum of the weights whatever the options are.
        divides: whether it divides by Hbar = H0 + sum_t alpha_t H_t, which must then be positive.
    """

    formula: str
    source: str
    linear: Linear | None = None
    gram: str = ""
    elementwise: Callable[[Block], Tensor] | None = None
    fast: int = 0
    rows: Callable[[Tensor, Tensor, Sequence[float], Mapping[str, Any]], Tensor] | None = None
    matrix: bool = False
    needs: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[str | Mapping[str, Mapping[str, Any]], ...] = ()
    models: tuple[int, float] = (1, float("inf"))
    lacks: Mapping[str, str] = field(default_factory=dict)
    divides: bool = False
    relative: bool = False


CURVATURE = frozenset({"curvature"})
BOTH = frozenset({"curvature", "base_curvature"})
EQ12 = "theta0 + sum_t alpha_t Hbar^-1 (H0 + H_t) tau_t, Hbar = H0 + sum_t alpha_t H_t"
SUM = "theta0 + scale * sum_t alpha_t tau'_t"
DROPS = {
    "single": "entries of the task vector are dropped",
    "equal": "entries of the task vectors are dropped",
}


TA_OPTIONS = {"scale": 1.0, "normalize": False}
TIES_OPTIONS = {"scale": 1.0}  # normalize is TIES' own: dividing by all weights after it would divide twice


def TA(
    alpha: Sequence[float], gram: Sequence[Sequence[float]] | None, options: Mapping[str, Any]
) -> tuple[float, list[float], str]:
    """Task arithmetic, for itself and for every method that only edits task vectors."""
    return (*task_arithmetic(alpha, options["scale"], options.get("normalize", False)), "")


FIXED_T = {
    "zero": "the position t is given, weights play no role",
    "order": "t runs from the first model to the second",
}
IGNORES = {"zero": "weights play no role"}
NORMALIZES = {"zero": "weights are relative and cannot all be zero"}
MIXES = "theta0 and tau_t are averaged with one another (mixed origins)"
REMOVES = {
    "single": "it removes the task instead of adding it",
    "equal": "it removes the tasks instead of adding them",
}

RULES: dict[str, Rule] = {
    "averaging": Rule(
        "mean_t theta_t", "Wortsman et al. 2022 (uniform soup)", linear=lambda a, gram, o: (*averaging(a), ""), lacks=IGNORES
    ),
    "weighted": Rule(
        "sum_t alpha_t theta_t / sum_t alpha_t", "weighted average of weights",
        linear=lambda a, gram, o: (*weighted(a, o["normalize"]), ""), options={"normalize": True}, lacks=NORMALIZES,
    ),
    "linear": Rule(
        "sum_t alpha_t theta_t / sum_t alpha_t", "weighted average of weights (mergekit's name)",
        linear=lambda a, gram, o: (*weighted(a, o["normalize"]), ""), options={"normalize": True}, lacks=NORMALIZES,
    ),
    "task_arithmetic": Rule("theta0 + scale * sum_t alpha_t tau_t", "Ilharco et al. 2023", linear=TA, options=TA_OPTIONS),
    "negation": Rule(
        "theta0 - sum_t alpha_t tau_t", "Ilharco et al. 2023", linear=lambda a, gram, o: (*negation(a), ""), lacks=REMOVES
    ),
    "fisher": Rule(
        "(sum_t alpha_t H_t)^-1 sum_t alpha_t H_t theta_t", "FA in Daheim et al. 2024",
        elementwise=lambda b: fisher(b.theta0, b.tau, b.alpha, b.delta0, b.h), fast=1, needs=CURVATURE, divides=True,
    ),
    "fisher_base": Rule(
        "(H0 theta0 + sum_t alpha_t H_t tau_t) / (H0 + sum_t alpha_t H_t)", "FA1 in Daheim et al. 2024",
        elementwise=lambda b: fisher_base(b.theta0, b.tau, b.alpha, b.h0, b.h), needs=BOTH,
        lacks={"single": MIXES, "equal": MIXES}, divides=True,
    ),
    "gradient_matching": Rule(
        EQ12, "Eq. 12 of Daheim et al. 2024",
        elementwise=lambda b: gradient_matching(b.theta0, b.tau, b.alpha, b.h0, b.h, b.options["hbar_weight"]), fast=1, needs=BOTH,
        options={"hbar_weight": None}, divides=True,
    ),
    "measured": Rule(
        "theta0 + Hbar^-1 sum_t alpha_t (H_t tau_t - g_t)", "Eq. 12 without Eq. 8: measured gradients",
        elementwise=lambda b: measured(b.theta0, b.tau, b.alpha, b.h0, b.h, b.g), needs=BOTH | {"gradient"},
        lacks={"single": "it goes on to the minimum of the loss", "equal": "it goes on to the minimum of the losses"}, divides=True,
    ),
    "removal": Rule(
        "theta0 - sum_t alpha_t (H0 - sum_s alpha_s H_s)^-1 (H0 + H_t) tau_t, guarded so that keep H0 remains", "Eq. 13 of Daheim et al. 2024",
        elementwise=lambda b: removal(b.theta0, b.tau, b.alpha, b.h0, b.h, b.options["keep"], b.options["guard"]), fast=-1, needs=BOTH,
        options={"keep": 0.1, "guard": "floor"}, lacks=REMOVES,
    ),
    "ewr": Rule(
        "(H0 theta0 - sum_t alpha_t H_t tau_t) / (H0 + sum_t alpha_t H_t)", "elastic weight removal, Daheim et al. 2023",
        elementwise=lambda b: ewr(b.theta0, b.tau, b.alpha, b.h0, b.h), needs=BOTH, lacks=REMOVES, divides=True,
    ),
    "fisher_negation": Rule(
        "theta0 - sum_t alpha_t H_t / (H0 + H_t) tau_t", "baseline: negation scaled by the task's share of curvature",
        elementwise=lambda b: fisher_negation(b.theta0, b.tau, b.alpha, b.h0, b.h), needs=BOTH, lacks=REMOVES,
    ),
    "matena_raffel": Rule(
        "(sum_t alpha_t F_t)^-1 sum_t alpha_t F_t theta_t, F_t the mean Fisher", "Matena & Raffel 2022",
        elementwise=lambda b: matena_raffel(b.theta0 + b.tau, b.alpha, b.mean_curvature(), b.options["floor"]),
        needs=CURVATURE, options={"floor": 0.0, "normalize_fishers": False}, lacks=NORMALIZES, relative=True,
    ),
    "regmean": Rule(
        "(sum_t alpha_t G_t)^-1 sum_t alpha_t G_t W_t for linear layers, mean elsewhere", "Jin et al. 2023",
        matrix=True, linear=lambda a, gram, o: (*weighted(a), ""), needs=frozenset({"gram"}),
        options={"off_diagonal": 0.9, "ridge": 1e-6, "conv1d": None}, lacks=NORMALIZES, relative=True,
    ),
    "kronecker": Rule(
        EQ12 + "; H = N A (x) B for linear layers, diagonal elsewhere", "Tam et al. 2024 (MaTS), with H0",
        elementwise=lambda b: gradient_matching(b.theta0, b.tau, b.alpha, b.h0, b.h), fast=1, matrix=True, needs=BOTH | {"factors"},
        options={"iterations": 100, "tolerance": 1e-6, "conv1d": None}, divides=True,
    ),
    "slerp": Rule(
        "sin((1-t)O)/sin(O) theta_1 + sin(tO)/sin(O) theta_2", "Shoemake 1985", gram="theta", models=(2, 2),
        linear=lambda a, gram, o: slerp(gram or (), o["t"]), rows=rowwise.slerp, options={"t": 0.5, "along": "tensor"},
        lacks=FIXED_T | {"single": "it takes two models"},
    ),
    "nuslerp": Rule(
        "theta0 + slerp(tau_1, tau_2; alpha_2 / (alpha_1 + alpha_2))", "slerp of task vectors", gram="tau", models=(2, 2),
        linear=lambda a, gram, o: nuslerp(gram or (), a), rows=rowwise.nuslerp, options={"along": "tensor"},
        lacks=NORMALIZES | {"single": "it takes two models"}, relative=True,
    ),
    "karcher": Rule(
        "weighted Karcher mean of directions, times the mean norm", "Buss & Fillmore 2001", gram="theta",
        linear=lambda a, gram, o: karcher(gram or (), a, int(o["iterations"]), o["tolerance"]),
        options={"iterations": 100, "tolerance": 1e-12}, lacks=NORMALIZES, relative=True,
    ),
    "model_stock": Rule(
        "t mean_t theta_t + (1-t) theta0, t from the mean cosine of tau", "Jang et al. 2024", gram="tau",
        linear=lambda a, gram, o: model_stock(gram or ()), rows=rowwise.model_stock, options={"along": "tensor"}, lacks=IGNORES,
    ),
    "ties": Rule(SUM + ", tau' by TIES", "Yadav et al. 2023", linear=TA, options=TIES_OPTIONS, transforms=("ties",), lacks=DROPS),
    "dare": Rule(SUM + ", tau' by DARE", "Yu et al. 2024", linear=TA, options=TA_OPTIONS, transforms=("dare",), lacks=DROPS),
    "dare_linear": Rule(SUM + ", tau' by DARE", "Yu et al. 2024", linear=TA, options=TA_OPTIONS, transforms=("dare",), lacks=DROPS),
    "dare_ties": Rule(
        SUM + ", tau' by DARE, then TIES' sign election", "Yu et al. 2024", linear=TA, options=TIES_OPTIONS, transforms=("dare", "ties"), lacks=DROPS
    ),
    "della": Rule(
        SUM + ", tau' by MAGPRUNE, then TIES' sign election", "Deep et al. 2024", linear=TA, options=TIES_OPTIONS, transforms=("della", "ties"), lacks=DROPS
    ),
    "della_linear": Rule(SUM + ", tau' by MAGPRUNE", "Deep et al. 2024", linear=TA, options=TA_OPTIONS, transforms=("della",), lacks=DROPS),
    "breadcrumbs": Rule(
        SUM + ", tau' by breadcrumbs", "Davari & Belilovsky 2024", linear=TA, options=TA_OPTIONS, transforms=("breadcrumbs",), lacks=DROPS
    ),
    "breadcrumbs_ties": Rule(
        SUM + ", tau' by breadcrumbs, then TIES' sign election", "Davari & Belilovsky 2024", linear=TA, options=TIES_OPTIONS,
        transforms=("breadcrumbs", "ties"), lacks=DROPS,
    ),
    "greedy_soup": Rule(
        "mean of the models that, added best first, never lower the score", "Wortsman et al. 2022",
        linear=lambda a, gram, o: (*averaging(a), ""), options={"score": None}, lacks=IGNORES,
    ),
    "passthrough": Rule(
        "scale * theta_1", "layers as they are", linear=lambda a, gram, o: (*passthrough(a, o["scale"]), ""),
        options={"scale": 1.0}, models=(1, 1), lacks=IGNORES,
    ),
}  # fmt: skip
