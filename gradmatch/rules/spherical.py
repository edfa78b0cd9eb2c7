"""Spherical means and Model Stock: linear combinations whose coefficients follow from the models' inner products alone.

Every rule here takes a Gram matrix G (T, T) of one tensor, G_st = <x_s, x_t> in float64 (x = theta or tau), so that a
tensor of any size is read in blocks twice and never held. It returns (c0, c) of c0 theta0 + sum_t c_t theta_t and the
name of the branch that was taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules.linear import weight_sum
from gradmatch.rules.options import Options, option
from gradmatch.rules.rowwise import ALONG, PARALLEL, TINY

Gram = Sequence[Sequence[float]]
Branched = tuple[float, list[float], str]


@dataclass(frozen=True)
class Along(Options):
    """Which vectors have an angle of their own."""

    along: str = option(
        "tensor", choices=ALONG, help="whose angle counts: the whole tensor's, each row's or each column's"
    )


@dataclass(frozen=True)
class StockOptions(Along):
    """Model Stock."""

    clamp: bool = option(
        True, help="keep t within [0, 1]: task vectors that oppose one another keep the base (mergekit: no)"
    )


@dataclass(frozen=True)
class SlerpOptions(Along):
    """Where on the arc the merge lies."""

    t: float = option(0.5, "[0, 1]", help="place on the arc, 0 at the first model, 1 at the second")


@dataclass(frozen=True)
class KarcherOptions(Options):
    """When the iteration stops."""

    iterations: int = option(100, "[1, inf]", help="steps at the most")
    tolerance: float = option(1e-12, "[0, inf]", help="or where a step is shorter")


@dataclass(frozen=True)
class MultislerpOptions(Options):
    """The weights, and the centre of the sphere."""

    normalize_weights: bool = option(True, help="divide the weights by their sum")
    eps: float = option(1e-8, "[0, inf]", help="norms below this have no direction")
    origin: str = option(
        "base", choices=("base", "zero"), help="the sphere's centre: of task vectors, or of whole models"
    )


def arc(norms: Sequence[float], dot: float, t: float) -> tuple[float, float, str]:
    """s0 = sin((1-t)O)/sin O, s1 = sin(tO)/sin O with O the angle of the two vectors; Shoemake 1985.

    Near 0 (and near pi, where sin O vanishes too) or for a vector without direction: s0 = 1-t, s1 = t. Returns the two
    and the branch, "slerp" or "lerp".
    """
    if min(norms) < TINY or abs(dot) > PARALLEL * norms[0] * norms[1]:
        return 1 - t, t, "lerp"
    omega = math.acos(dot / (norms[0] * norms[1]))
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega), "slerp"


def slerp(gram: Gram, t: float) -> Branched:
    """s0 theta_1 + s1 theta_2, the angle between the unit vectors, the weights on the raw tensors.

    gram: (2, 2) of theta; t in [0, 1] goes from the first model to the second.

    Example:
        >>> c0, c, branch = slerp([[1.0, 0.0], [0.0, 1.0]], 0.5)  # two orthogonal models
        >>> [round(x, 4) for x in c], branch
        ([0.7071, 0.7071], 'slerp')
    """
    s0, s1, branch = arc([math.sqrt(gram[0][0]), math.sqrt(gram[1][1])], gram[0][1], t)
    return 0.0, [s0, s1], branch


def nuslerp(gram: Gram, alpha: Sequence[float]) -> Branched:
    """Slerp of the task vectors: theta0 + s0 tau_1 + s1 tau_2 with t = alpha_2 / (alpha_1 + alpha_2).

    gram: (2, 2) of tau.

    Raises:
        ValueError: the weights sum to zero.

    Example:
        >>> c0, c, branch = nuslerp([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
        >>> [round(x, 4) for x in (c0, *c)]
        [-0.4142, 0.7071, 0.7071]
    """
    t = alpha[1] / weight_sum(alpha)
    s0, s1, branch = arc([math.sqrt(gram[0][0]), math.sqrt(gram[1][1])], gram[0][1], t)
    return 1.0 - s0 - s1, [s0, s1], branch


def karcher(gram: Gram, alpha: Sequence[float], iterations: int = 100, tolerance: float = 1e-12) -> Branched:
    """The weighted Karcher mean of the models' directions on the sphere, times the weighted mean of their norms.

    Fixed point of Riemannian gradient descent (Buss & Fillmore 2001): u <- exp_u(sum_t w_t log_u(u_t)). Every iterate is
    a combination of the unit vectors u_t, so only gram (T, T) of theta is needed.

    Raises:
        ValueError: the weights sum to zero, or no tensor of non-zero norm is left.

    Example:
        >>> c0, c, branch = karcher([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
        >>> [round(x, 4) for x in c]
        [0.7071, 0.7071]
    """
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    used = [i for i in range(len(gram)) if norms[i] >= TINY and alpha[i] != 0]
    weight_sum(alpha)
    if not used:
        return 0.0, [weight / sum(alpha) for weight in alpha], "linear"
    total = sum(alpha[i] for i in used)
    weight = {i: alpha[i] / total for i in used}
    cosine = {(i, j): gram[i][j] / (norms[i] * norms[j]) for i in used for j in used}

    def inner(a: dict[int, float], b: dict[int, float]) -> float:
        return sum(a[i] * b[j] * cosine[i, j] for i in a for j in b)

    mean = dict(weight)
    branch = "karcher"
    length = math.sqrt(max(inner(mean, mean), 0.0))
    if length < TINY:  # antipodal models: no mean direction is better than another
        return 0.0, [weight.get(i, 0.0) for i in range(len(gram))], "linear"
    mean = {i: value / length for i, value in mean.items()}
    for _ in range(iterations):
        step = dict.fromkeys(used, 0.0)
        for t in used:
            cos = min(1.0, max(-1.0, inner(mean, {t: 1.0})))
            angle = math.acos(cos)
            ratio = angle / math.sin(angle) if 1e-9 < angle < math.pi - 1e-9 else 1.0
            for i in used:
                step[i] += weight[t] * ratio * ((i == t) - cos * mean[i])
        size = math.sqrt(max(inner(step, step), 0.0))
        if size < tolerance:
            break
        mean = {i: math.cos(size) * mean[i] + math.sin(size) * step[i] / size for i in used}
        length = math.sqrt(inner(mean, mean))
        mean = {i: value / length for i, value in mean.items()}
    norm = sum(weight[i] * norms[i] for i in used)
    c = [norm * mean[i] / norms[i] if i in mean else 0.0 for i in range(len(gram))]
    return 0.0, c, branch


def model_stock(gram: Gram, clamp: bool = True) -> Branched:
    """Jang et al. 2024: t mean(theta_t) + (1-t) theta0 with t = T c / (1 + (T-1) c), c the mean pairwise cosine of tau.

    gram: (T, T) of tau. With `clamp`, t stays within [0, 1]: task vectors that oppose one another keep the base. Norms are compared
    one by one (a product of two tiny norms would underflow); a model without a task vector counts as orthogonal.

    Example:
        >>> model_stock([[1.0, 0.5], [0.5, 1.0]])[2]  # at a cosine of 1/2
        't = 0.667'
    """
    count = len(gram)
    if count == 1:
        return 0.0, [1.0], "single"
    norms = [math.sqrt(gram[i][i]) for i in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosines = [gram[i][j] / norms[i] / norms[j] if norms[i] > 0 and norms[j] > 0 else 0.0 for i, j in pairs]
    cosine = sum(cosines) / len(pairs)
    denominator = 1 + (count - 1) * cosine
    t = count * cosine / denominator if denominator > 0 or not (clamp or denominator == 0) else 0.0
    kept = min(1.0, max(0.0, t)) if clamp else t
    branch = f"t = {kept:.3f}" if t == kept else f"t kept at {kept:g}, as the task vectors oppose one another"
    return 1.0 - kept, [kept / count] * count, branch


def multislerp(
    gram: Gram,
    alpha: Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
    origin: str = "base",
) -> Branched:
    """mergekit's barycentric slerp: sum_t w_t |x_t| times the direction of sum_t w_t x_t / |x_t|, w_t the (normalised) weights.

    gram: (T, T) of x_t, the task vectors (origin "base") or the models ("zero"). Going from the tangent space at that direction
    back to the sphere changes nothing, since the weighted sum of the unit vectors has no part in it. Two vectors whose
    directions cancel are combined linearly; a single model is itself.

    Raises:
        ValueError: the weights sum to zero, or the directions of three or more models cancel.

    Example:
        >>> c0, c, branch = multislerp([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
        >>> [round(x, 4) for x in (c0, *c)]
        [-0.4142, 0.7071, 0.7071]
    """
    count = len(gram)
    if count == 1:
        return 0.0, [1.0], "single"
    total = weight_sum(alpha) if normalize_weights else 1.0
    weight = [one / total for one in alpha]
    norms = [math.sqrt(gram[t][t]) for t in range(count)]
    unit = [w / (norm + eps) for w, norm in zip(weight, norms, strict=True)]
    square = sum(unit[s] * unit[t] * gram[s][t] for s in range(count) for t in range(count))
    length = math.sqrt(max(square, 0.0))
    c, branch = weight, "linear"
    if length >= eps:
        size = sum(w * norm for w, norm in zip(weight, norms, strict=True))
        c, branch = [size * one / length for one in unit], "multislerp"
    elif count > 2 and max(norms) >= eps:
        raise GradmatchError(
            "the weighted directions of the models cancel, so that no mean is left; change the weights",
            "bad_setting",
        )
    return (1.0 - sum(c) if origin == "base" else 0.0), c, branch
