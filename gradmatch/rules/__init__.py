"""Every merging rule by name: what it computes, what it needs, and which invariants hold. See README.md beside this file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gradmatch.estimators.parts import find_part
from gradmatch.rules import regmean, rowwise
from gradmatch.rules.block import Block, Curved
from gradmatch.rules.consensus import CONSENSUS
from gradmatch.rules.family import ANCHORED, ASCENT, GUARDED, MATS, SIGNED
from gradmatch.rules.fisher_base import fisher_base
from gradmatch.rules.gradient_matching import HbarOptions, fisher, gradient_matching
from gradmatch.rules.kronecker import choosing, in_matrices, with_factors
from gradmatch.rules.linear import (
    Normalize,
    Scale,
    ScaleNormalize,
    averaging,
    negation,
    passthrough,
    task_arithmetic,
    weighted,
)
from gradmatch.rules.matena_raffel import MatenaRaffelOptions, matena_raffel
from gradmatch.rules.matrix_options import MatrixOptions
from gradmatch.rules.measured import measured
from gradmatch.rules.options import Options, option
from gradmatch.rules.removal import RemovalOptions, ewr, fisher_negation, removal
from gradmatch.rules.restricted import tsv_basis
from gradmatch.rules.rule import Elementwise, Linear, Rule, Solve, Terms, Whole
from gradmatch.rules.spectral import ISO_C, ISO_CTS, TSV_M
from gradmatch.rules.spherical import (
    Along,
    KarcherOptions,
    MultislerpOptions,
    SlerpOptions,
    StockOptions,
    karcher,
    model_stock,
    multislerp,
    nuslerp,
    slerp,
)
from gradmatch.rules.swaps import NearswapOptions, nearswap
from gradmatch.rules.task_vectors import ACE, ACTMAT, WUDI

__all__ = [
    "RULES", "Block", "Curved", "Elementwise", "Linear", "Options", "Rule", "Solve", "Whole", "averaging", "ewr", "find_rule",
    "fisher", "fisher_base", "fisher_negation", "gradient_matching", "karcher", "matena_raffel", "measured", "model_stock",
    "negation", "nuslerp", "option", "passthrough", "removal", "removals", "slerp", "task_arithmetic", "weighted",
]  # fmt: skip

CURVATURE = frozenset({"curvature"})
BOTH = frozenset({"curvature", "base_curvature"})
IGNORES = {"zero": "weights play no role"}
NORMALIZES = {"zero": "weights are relative and cannot all be zero"}
DROPS = dict.fromkeys(("single", "equal"), "entries of the task vectors are dropped")
MIXES = dict.fromkeys(("single", "equal"), "theta0 and tau_t are averaged with one another (mixed origins)")
REMOVES = dict.fromkeys(("single", "equal"), "it removes the tasks instead of adding them")
OF_TWO = {"single": "it takes two models"}
ONE = (1, 1)
TWO = (2, 2)


@dataclass(frozen=True)
class Score(Options):
    """What a greedy soup is judged by."""

    score: Any = option(None, flag=False, help="a function of a state dict, larger is better")


def mean_formula(options: Any) -> str:
    """The weighted mean, or the sum where it is not normalised."""
    return "sum_t alpha_t theta_t" + (" / sum_t alpha_t" if options.normalize else "")


def sum_formula(options: Any, tau: str = "tau_t", edit: str = "") -> str:
    """Task arithmetic, plain or of edited task vectors."""
    total = f"theta0 + scale * sum_t alpha_t {tau}" + (" / sum_t alpha_t" if options.get("normalize") else "")
    return f"{total}, tau' by {edit}" if edit else total


def added(alpha: Any, gram: Any, options: Any) -> Terms:
    """Task arithmetic, for itself and for every method that only edits task vectors."""
    return task_arithmetic(alpha, options.scale, options.get("normalize", False))


def plain_sum(alpha: Any, gram: Any, options: Any) -> Terms:
    """theta0 + sum_t tau_t, of methods whose edit of the task vectors weighs them."""
    return 1.0 - len(alpha), [1.0] * len(alpha)


def editing(edit: str, source: str, *transforms: str) -> Linear:
    """Task arithmetic of edited task vectors; where TIES ends the chain, `normalize` is its own, or the sum was divided twice."""
    options: Options = Scale() if transforms[-1] == "ties" else ScaleNormalize()
    return Linear(
        lambda o: sum_formula(o, "tau'_t", edit),
        source,
        added,
        options=options,
        transforms=transforms,
        lacks=DROPS,
    )


GRADIENT_MATCHING = Elementwise(
    lambda o: "theta0 + sum_t alpha_t Hbar^-1 (H0 + H_t) tau_t, Hbar = H0 + sum_t "
    + ("alpha_t" if o.get("hbar_weight") is None else f"{o['hbar_weight']}")
    + " H_t",
    "Eq. 12 of Daheim et al. 2024",
    lambda b: gradient_matching(b.theta0, b.tau, b.alpha, b.h0, b.h, b.options.hbar_weight),
    needs=BOTH, options=HbarOptions(), divides=True, bounded=True, eq12=lambda o: o.hbar_weight is None, family="gradient_matching",
)  # fmt: skip
IN_MATRICES = in_matrices(
    "kronecker",
    GRADIENT_MATCHING,
    "theta0 + sum_t alpha_t Hbar^-1 (H0 + H_t) tau_t, Hbar = H0 + sum_t alpha_t H_t, H = N A (x) B",
    "Tam et al. 2024 (MaTS), with H0",
)
KRONECKER = replace(IN_MATRICES, needs=BOTH | {"factors"}, chosen=choosing(GRADIENT_MATCHING, IN_MATRICES))
WEIGHTED = Linear(
    mean_formula, "weighted average of weights", lambda a, gram, o: weighted(a, o.normalize), options=Normalize(), lacks=NORMALIZES
)  # fmt: skip
DARE = editing("DARE", "Yu et al. 2024", "dare")

RULES: dict[str, Rule] = {
    "averaging": Linear(
        "mean_t theta_t", "Wortsman et al. 2022 (uniform soup)", lambda a, gram, o: averaging(a), weighs=False, lacks=IGNORES
    ),
    "weighted": WEIGHTED,
    "linear": WEIGHTED,  # mergekit's name
    "task_arithmetic": Linear(sum_formula, "Ilharco et al. 2023", added, options=ScaleNormalize()),
    "negation": Linear(
        "theta0 - sum_t alpha_t tau_t", "Ilharco et al. 2023", lambda a, gram, o: negation(a), lacks=REMOVES, removes=True
    ),
    "fisher": with_factors("fisher", Elementwise(
        "(sum_t alpha_t H_t)^-1 sum_t alpha_t H_t theta_t", "FA in Daheim et al. 2024",
        lambda b: fisher(b.theta0, b.tau, b.alpha, b.delta0, b.h), needs=CURVATURE, divides=True, bounded=True, eq12=lambda o: True,
        options=MatrixOptions(),
    )),
    "fisher_base": with_factors("fisher_base", Elementwise(
        "(H0 theta0 + sum_t alpha_t H_t tau_t) / (H0 + sum_t alpha_t H_t)", "FA1 in Daheim et al. 2024",
        lambda b: fisher_base(b.theta0, b.tau, b.alpha, b.h0, b.h), needs=BOTH, divides=True, lacks=MIXES,
        options=MatrixOptions(),
    )),
    "gradient_matching": with_factors("gradient_matching", GRADIENT_MATCHING),
    "measured": with_factors("measured", Elementwise(
        "theta0 + Hbar^-1 sum_t alpha_t (H_t tau_t - g_t)", "Eq. 12 without Eq. 8: measured gradients",
        lambda b: measured(b.theta0, b.tau, b.alpha, b.h0, b.h, b.g), needs=BOTH | {"gradient"}, divides=True, options=MatrixOptions(),
        lacks=dict.fromkeys(("single", "equal"), "it goes on to the minimum of the losses"),
        caution="the measured gradient divided elementwise by a diagonal curvature explodes on networks (it is exact on quadratics "
        "with full curvature): compare with gradient_matching, or solve in the subspace of the task vectors",
    )),
    "removal": with_factors("removal", Elementwise(
        "theta0 - sum_t alpha_t (H0 - sum_s alpha_s H_s)^-1 (H0 + H_t) tau_t, guarded so that keep H0 remains",
        "Eq. 13 of Daheim et al. 2024",
        lambda b: removal(b.theta0, b.tau, b.alpha, b.h0, b.h, b.options.keep, b.options.guard),
        needs=BOTH, options=RemovalOptions(), guarded=True, lacks=REMOVES, removes=True,
    )),
    "ewr": Elementwise(
        "(H0 theta0 - sum_t alpha_t H_t tau_t) / (H0 + sum_t alpha_t H_t)", "elastic weight removal, Daheim et al. 2023",
        lambda b: ewr(b.theta0, b.tau, b.alpha, b.h0, b.h), needs=BOTH, divides=True, lacks=REMOVES, removes=True,
    ),
    "fisher_negation": Elementwise(
        "theta0 - sum_t alpha_t H_t / (H0 + H_t) tau_t", "baseline: negation scaled by the task's share of curvature",
        lambda b: fisher_negation(b.theta0, b.tau, b.alpha, b.h0, b.h), needs=BOTH, bounded=True, lacks=REMOVES, removes=True,
    ),
    "matena_raffel": Elementwise(
        "(sum_t alpha_t F_t)^-1 sum_t alpha_t F_t theta_t, F_t the mean Fisher", "Matena & Raffel 2022",
        lambda b: matena_raffel(b.theta0 + b.tau, b.alpha, b.mean_curvature(), b.options.floor),
        needs=CURVATURE, options=MatenaRaffelOptions(), bounded=True, lacks=NORMALIZES, relative=True,
    ),
    "regmean": Solve(
        "(sum_t alpha_t G_t)^-1 sum_t alpha_t G_t W_t", "Jin et al. 2023", regmean.solve, otherwise=WEIGHTED,
        needs=frozenset({"gram"}), options=regmean.RegMeanOptions(), lacks=NORMALIZES, relative=True,
    ),
    "kronecker": KRONECKER,
    "mats": MATS,
    "tsv_basis": tsv_basis(GRADIENT_MATCHING),
    "anchored": ANCHORED,
    "guarded": GUARDED,
    "signed": SIGNED,
    "ascent": ASCENT,
    "actmat": ACTMAT,
    "wudi": WUDI,
    "ace": ACE,
    "slerp": Linear(
        "sin((1-t)O)/sin(O) theta_1 + sin(tO)/sin(O) theta_2", "Shoemake 1985", lambda a, gram, o: slerp(gram, o.t),
        gram="theta", rows=rowwise.slerp, options=SlerpOptions(), models=TWO, weighs=False,
        lacks=OF_TWO | {"zero": "the position t is given, weights play no role", "order": "t runs from the first model to the second"},
    ),
    "nuslerp": Linear(
        "theta0 + slerp(tau_1, tau_2; alpha_2 / (alpha_1 + alpha_2))", "slerp of task vectors", lambda a, gram, o: nuslerp(gram, a),
        gram="tau", rows=rowwise.nuslerp, options=Along(), models=TWO, lacks=NORMALIZES | OF_TWO, relative=True,
    ),
    "multislerp": Linear(
        lambda o: "sum_t alpha_t |x_t| times the direction of sum_t alpha_t x_t / |x_t|, "
        + ("around theta0, x = tau" if o.origin == "base" else "x = theta"),
        "mergekit's barycentric slerp",
        lambda a, gram, o: multislerp(gram, a, o.normalize_weights, o.eps, o.origin),
        gram=lambda o: "tau" if o.origin == "base" else "theta", options=MultislerpOptions(), lacks=NORMALIZES,
    ),
    "karcher": Linear(
        "weighted Karcher mean of directions, times the mean norm", "Buss & Fillmore 2001",
        lambda a, gram, o: karcher(gram, a, o.iterations, o.tolerance), gram="theta", options=KarcherOptions(),
        lacks=NORMALIZES, relative=True,
    ),
    "model_stock": Linear(
        "t mean_t theta_t + (1-t) theta0, t from the mean cosine of tau", "Jang et al. 2024", lambda a, gram, o: model_stock(gram, o["clamp"]),
        gram="tau", rows=rowwise.model_stock, options=StockOptions(), weighs=False, lacks=IGNORES,
    ),
    "ties": editing("TIES", "Yadav et al. 2023", "ties"),
    "dare": DARE,
    "dare_linear": DARE,  # mergekit's name
    "dare_ties": editing("DARE, then TIES' sign election", "Yu et al. 2024", "dare", "ties"),
    "della": editing("MAGPRUNE, then TIES' sign election", "Deep et al. 2024", "della", "ties"),
    "della_linear": editing("MAGPRUNE", "Deep et al. 2024", "della"),
    "breadcrumbs": editing("breadcrumbs", "Davari & Belilovsky 2024", "breadcrumbs"),
    "breadcrumbs_ties": editing("breadcrumbs, then TIES' sign election", "Davari & Belilovsky 2024", "breadcrumbs", "ties"),
    "localize_stitch": editing("Localize-and-Stitch without data", "He et al. 2024", "localize"),
    "consensus": CONSENSUS,
    "tsv_m": TSV_M,
    "iso_c": ISO_C,
    "iso_cts": ISO_CTS,
    "sce": Linear(
        "theta0 + sum_t w_t m_t tau_t / sum_t w_t m_t, w_t by mean squares, m_t by the sign of the sum", "Wan et al. 2024 (FuseChat)",
        plain_sum, transforms=("sce",), weighs=False, bounded=False, lacks=IGNORES,
    ),
    "nearswap": Elementwise(
        "theta0 + min(1, t / |tau_1|) tau_1", "mergekit's NearSwap", lambda b: nearswap(b.theta0, b.tau, b.options.t),
        options=NearswapOptions(), models=ONE, weighs=False, bounded=True,
        lacks={"single": "entries move by t at the most", "equal": "entries move by t at the most"} | IGNORES,
    ),
    "arcee_fusion": Linear(
        "theta0 + m tau_1, m = 1 where |tau_1| KL(softmax theta_1, softmax theta0) >= median + 1.5 IQR", "Arcee Fusion (mergekit)",
        plain_sum, transforms=("arcee_fusion",), models=ONE, weighs=False, bounded=False,
        lacks={"single": "only important entries are taken", "equal": "only important entries are taken"} | IGNORES,
    ),
    "greedy_soup": Linear(
        "mean of the models that, added best first, never lower the score", "Wortsman et al. 2022",
        lambda a, gram, o: averaging(a), options=Score(), weighs=False, lacks=IGNORES, searches=True,
    ),
    "passthrough": Linear(
        "scale * theta_1", "layers as they are", lambda a, gram, o: passthrough(a, o.scale), options=Scale(), models=ONE,
        weighs=False, lacks=IGNORES,
    ),
}  # fmt: skip


def find_rule(method: str) -> Rule:
    """A rule by its name in RULES, as "package.module:NAME", or as an entry point of the group gradmatch.rules.

    Raises:
        ValueError: an unknown name (the nearest is named), or a module or name in it that is not there.
        TypeError: something that is no `Rule`.

    Example:
        >>> find_rule("slerp").kind
        'linear'
    """
    return find_part("method", "gradmatch.rules", method, RULES, Rule)


def removals() -> list[str]:
    """Names of the rules that take a task away."""
    return [name for name, rule in RULES.items() if rule.removes]
