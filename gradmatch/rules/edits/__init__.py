"""Edits of task vectors, tau -> tau', before any rule: each a pure function of the stacked task vectors of one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.common.kinds import check_kind
from gradmatch.common.names import nearest
from gradmatch.common.settings import numbers
from gradmatch.rules.edits.breadcrumbs import breadcrumbs
from gradmatch.rules.edits.dare import dare
from gradmatch.rules.edits.della import della, widest
from gradmatch.rules.edits.ties import kept_count, ties

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gradmatch.rules.block import Edit

__all__ = ["TRANSFORMS", "Transform", "breadcrumbs", "check_options", "dare", "della", "ties"]


@dataclass(frozen=True)
class Transform:
    """What the engine must know of an edit.

    Attributes:
        apply: the edit of one piece, from an `Edit` (task vectors, weights, noise, thresholds) and its options.
        options: name -> default.
        span: how much of a tensor one piece must hold: any "block", whole "rows", or the whole "tensor". May depend on
            the options.
    """

    apply: Callable[[Edit, Mapping[str, Any]], Tensor]
    options: Mapping[str, Any]
    span: Callable[[Mapping[str, Any]], str]


def thresholds(tau: Tensor, density: Tensor | float) -> Tensor:
    """Each task's k-th largest |tau|, (T, 1, ..., 1), with k from the density; 0 where everything stays."""
    flat = tau.abs().reshape(tau.shape[0], -1)
    shares = [density] * len(flat) if isinstance(density, float) else density.flatten().tolist()
    found = [_kth_largest(row, share) for row, share in zip(flat, shares, strict=True)]
    return tau.new_tensor(found).reshape(-1, *[1] * (tau.dim() - 1))


def _kth_largest(values: Tensor, density: float) -> float:
    """The smallest of the largest share `density` of some magnitudes, (n,)."""
    n = values.numel()
    return 0.0 if density >= 1 or not n else float(values.kthvalue(n + 1 - kept_count(density, n)).values)


def _column(value: Any, edit: Edit) -> Tensor | float:
    """An option as a number, or (T, 1, ..., 1) where every task has its own."""
    return edit.tau.new_tensor(value).reshape(edit.alpha.shape) if isinstance(value, tuple) else float(value)


def _ties(edit: Edit, options: Mapping[str, Any]) -> Tensor:
    """TIES with the thresholds of the chosen scope."""
    if edit.threshold is None:
        edit.threshold = thresholds(edit.tau, _column(options["density"], edit))
    return ties(edit.tau, edit.alpha, edit.threshold, edit.majority, options["scale"], options["normalize"])


def _dare(edit: Edit, options: Mapping[str, Any]) -> Tensor:
    return dare(edit.tau, edit.noise(), _column(options["density"], edit), options["rescale"])


def _della(edit: Edit, options: Mapping[str, Any]) -> Tensor:
    return della(edit.tau, edit.noise(), _column(options["density"], edit), _column(options["epsilon"], edit))


def _breadcrumbs(edit: Edit, options: Mapping[str, Any]) -> Tensor:
    density, gamma = options["density"], options["gamma"]
    if not isinstance(density, tuple) and not isinstance(gamma, tuple):
        return breadcrumbs(edit.tau, density, gamma)
    count = edit.tau.shape[0]
    densities = density if isinstance(density, tuple) else (density,) * count
    gammas = gamma if isinstance(gamma, tuple) else (gamma,) * count
    rows = [breadcrumbs(edit.tau[t : t + 1], densities[t], gammas[t]) for t in range(count)]
    merged = edit.tau.new_empty(edit.tau.shape)
    for t, row in enumerate(rows):
        merged[t] = row[0]
    return merged


def trims(options: Mapping[str, Any]) -> bool:
    """Whether any task loses entries to TIES' trim."""
    density = options["density"]
    return any(share < 1 for share in (density if isinstance(density, tuple) else (density,)))


TRANSFORMS: dict[str, Transform] = {
    "ties": Transform(
        _ties,
        {"density": 0.2, "trim": "global", "scale": 1.0, "normalize": True},
        lambda options: "tensor" if options["trim"] == "tensor" and trims(options) else "block",
    ),
    "dare": Transform(
        _dare,
        {"density": 0.1, "rescale": "unbiased", "seed": 0},
        lambda options: "tensor" if options["rescale"] == "l1" else "block",
    ),
    "della": Transform(_della, {"density": 0.3, "epsilon": 0.1, "seed": 0}, lambda options: "rows"),
    "breadcrumbs": Transform(_breadcrumbs, {"density": 0.14, "gamma": 0.01}, lambda options: "tensor"),
}


def given_or_widest(epsilon: Any, density: Any) -> Any:
    """DELLA's epsilon, filled in where it was not given; a tuple, one value a task, where epsilon or density is one."""
    if not isinstance(epsilon, tuple) and not isinstance(density, tuple):
        return widest(density) if epsilon is None else epsilon
    count = len(epsilon if isinstance(epsilon, tuple) else density)
    pairs = zip(
        *(one if isinstance(one, tuple) else (one,) * count for one in (epsilon, density)), strict=True
    )
    return tuple(widest(share) if width is None else width for width, share in pairs)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse values that no edit of this kind can take; `name` is the transform.

    Raises:
        ValueError: a density outside (0, 1], a gamma outside [0, 1), an epsilon that pushes a probability out of (0, 1],
            or an unknown choice.
        TypeError: a value of another kind than the default.
    """
    choices = {"trim": ("global", "tensor"), "rescale": ("unbiased", "l1", "none")}
    for option, allowed in choices.items():
        if option in options and options[option] not in allowed:
            raise ValueError(
                f"{name}: {option} is {options[option]!r}{nearest(options[option], allowed)}; choose one of {', '.join(allowed)}"
            )
    for option, value in options.items():
        if option != "epsilon" or value is not None:  # None: as the density allows
            check_kind(f"{name}: {option}", value, TRANSFORMS[name].options[option])
    for density in numbers(options["density"]):
        if not 0 < density <= 1:
            raise ValueError(f"{name}: density is {density}; it is the share kept and must lie in (0, 1]")
        for epsilon in numbers(options.get("epsilon", 0.0)):
            if epsilon < 0 or density - epsilon / 2 <= 0 or (density < 1 and density + epsilon / 2 > 1):
                raise ValueError(
                    f"{name}: density {density} with epsilon {epsilon} gives probabilities from {density - epsilon / 2:g} to "
                    f"{density + epsilon / 2:g}; choose 0 <= epsilon < 2 * min(density, 1 - density)"
                )
    for gamma in numbers(options.get("gamma", 0.0)):
        if not 0 <= gamma < 1:
            raise ValueError(
                f"{name}: gamma is {gamma}; it is the share of outliers dropped and must lie in [0, 1)"
            )
