"""Edits of task vectors, tau -> tau', before any rule: each a pure function of the stacked task vectors of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import numbers
from gradmatch.rules.edits.breadcrumbs import breadcrumbs
from gradmatch.rules.edits.dare import dare
from gradmatch.rules.edits.della import della, widest
from gradmatch.rules.edits.ties import kept_count, ties
from gradmatch.rules.options import Options, declared, option

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Edit

__all__ = ["TRANSFORMS", "Transform", "breadcrumbs", "dare", "della", "ties"]


Share = float | tuple[float, ...]  # one value, or one a task


@dataclass(frozen=True)
class Transform:
    """What the engine must know of an edit.

    Attributes:
        apply: the edit of one piece, from an `Edit` (task vectors, weights, noise, thresholds) and its options.
        options: with their defaults.
        span: how much of a tensor one piece must hold: any "block", whole "rows", or the whole "tensor". May depend on
            the options.
    """

    apply: Callable[[Edit, Any], Tensor]
    options: Options
    span: Callable[[Any], str]

    def __post_init__(self) -> None:
        """A plain table of defaults becomes `Options`."""
        object.__setattr__(self, "options", declared(self.options))


KEPT: dict[str, Any] = {
    "within": "(0, 1]",
    "says": "the share kept",
    "per_task": True,
    "help": "share of each task vector's entries that is kept",
}
SEED = "of the random draws (default: the merge's own)"


@dataclass(frozen=True)
class TiesOptions(Options):
    """TIES."""

    density: Share = option(0.2, **KEPT)
    trim: str = option(
        "global",
        choices=("global", "tensor"),
        help="whether the largest are those of the model or of each tensor",
    )
    scale: float = option(1.0, help="factor on what is left")
    normalize: bool = option(True, help="divide by the weight of the tasks that agree")


@dataclass(frozen=True)
class DareOptions(Options):
    """DARE."""

    density: Share = option(0.1, **KEPT)
    rescale: str = option("unbiased", choices=("unbiased", "l1", "none"), help="how what stays is scaled")
    seed: int = option(0, help=SEED)


@dataclass(frozen=True)
class DellaOptions(Options):
    """MAGPRUNE."""

    density: Share = option(0.3, **KEPT)
    epsilon: Share | None = option(
        None,
        kind=0.1,
        per_task=True,
        help="width of the range of probabilities (default: 0.1, or less where the density leaves no room)",
    )
    seed: int = option(0, help=SEED)

    def __post_init__(self) -> None:
        """Check density and epsilon together.

        Raises:
            ValueError: probabilities outside (0, 1].
        """
        super().__post_init__()
        pairs: Any = product(numbers(self.density), numbers(self.epsilon))
        if isinstance(self.density, tuple) and isinstance(self.epsilon, tuple):  # one value a task
            pairs = zip(self.density, self.epsilon, strict=True)
        for share, width in pairs:
            if width is not None and (
                width < 0 or share - width / 2 <= 0 or (share < 1 and share + width / 2 > 1)
            ):
                raise ValueError(
                    f"density {share} with epsilon {width} gives probabilities from {share - width / 2:g} to {share + width / 2:g}; "
                    "choose 0 <= epsilon < 2 * min(density, 1 - density)"
                )

    def at(self, tensor: str, depth: float | None, own: Sequence[Mapping[str, Any]] = ()) -> DellaOptions:
        """As `Options.at`, with the epsilon that the density allows where none is given."""
        found = super().at(tensor, depth, own)
        share: Any = found.density
        width: Any = found.epsilon
        if not isinstance(share, tuple) and not isinstance(width, tuple):
            return replace(found, epsilon=widest(share) if width is None else width)
        shares, widths = (one if isinstance(one, tuple) else (one,) * len(own) for one in (share, width))
        filled = tuple(widest(s) if w is None else w for s, w in zip(shares, widths, strict=True))
        return replace(found, epsilon=filled)


@dataclass(frozen=True)
class BreadcrumbsOptions(Options):
    """Breadcrumbs."""

    density: Share = option(0.14, **KEPT)
    gamma: Share = option(
        0.01,
        "[0, 1)",
        says="the share of outliers dropped",
        per_task=True,
        help="share of largest entries that is dropped",
    )


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


def _ties(edit: Edit, options: TiesOptions) -> Tensor:
    """TIES with the thresholds of the chosen scope."""
    if edit.threshold is None:
        edit.threshold = thresholds(edit.tau, _column(options.density, edit))
    return ties(edit.tau, edit.alpha, edit.threshold, edit.majority, options.scale, options.normalize)


def _dare(edit: Edit, options: DareOptions) -> Tensor:
    return dare(edit.tau, edit.noise(), _column(options.density, edit), options.rescale)


def _della(edit: Edit, options: Any) -> Tensor:
    epsilon = widest(options.density) if options.epsilon is None else options.epsilon
    return della(edit.tau, edit.noise(), _column(options.density, edit), _column(epsilon, edit))


def _breadcrumbs(edit: Edit, options: BreadcrumbsOptions) -> Tensor:
    density, gamma = options.density, options.gamma
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


def trims(options: Any) -> bool:
    """Whether any task loses entries to TIES' trim."""
    shares = options.density if isinstance(options.density, tuple) else (options.density,)
    return any(share < 1 for share in shares)


TRANSFORMS: dict[str, Transform] = {
    "ties": Transform(
        _ties,
        TiesOptions(),
        lambda options: "tensor" if options.trim == "tensor" and trims(options) else "block",
    ),
    "dare": Transform(_dare, DareOptions(), lambda options: "tensor" if options.rescale == "l1" else "block"),
    "della": Transform(_della, DellaOptions(), lambda options: "rows"),
    "breadcrumbs": Transform(_breadcrumbs, BreadcrumbsOptions(), lambda options: "tensor"),
}
