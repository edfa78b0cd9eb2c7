"""Edits of task vectors, tau -> tau', before any rule: each a pure function of the stacked task vectors of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import numbers
from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules.edits.breadcrumbs import breadcrumbs, ranks
from gradmatch.rules.edits.dare import dare, drop, l1_ratio
from gradmatch.rules.edits.della import della, widest
from gradmatch.rules.edits.fusion import fusion, importance, quartiles
from gradmatch.rules.edits.localize import localize
from gradmatch.rules.edits.sce import FLAT, sce, select, spread
from gradmatch.rules.edits.ties import kept_count, ties, whole_part
from gradmatch.rules.options import NONE, Options, declared, option

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Edit

__all__ = ["TRANSFORMS", "Transform", "breadcrumbs", "dare", "della", "localize", "ties"]


Share = float | tuple[float, ...]  # one value, or one a task


@dataclass(frozen=True)
class Transform:
    """What the engine must know of an edit.

    Attributes:
        apply: the edit of one piece, from an `Edit` (task vectors, weights, noise, cuts) and its options.
        options: with their defaults.
        span: how much of a tensor one piece must hold: any "block", whole "rows", or the whole "tensor". May depend on
            the options. Memory follows from it: a few blocks, or a few of the longest row or the largest tensor.
        scope: of what it must know something before it edits the first piece: nothing (""), the "tensor" or the "model".
        ranks: (options of one task, n) -> ranks, counted from the largest |tau| of the n entries of its scope, at which it
            asks for a `Cut`.
        sizes: (edit, options) -> what is ranked in place of |tau|, of one tensor: (T, *s), or (1, *s) for all tasks; none below 0.
        nonzero: whether the n that `ranks` is given counts the sizes that are not 0 alone.
        places: whether entries of equal size are told apart by their place, so that as many are within a cut as its rank says.
        equal: whether all entries equal to the last within a rank stay, so that more may be kept than were asked for.
        sums: (edit, options) -> (k, T) numbers of a piece, of which it asks for the sum over the tensor; the edit has its cuts.
    """

    apply: Callable[[Edit, Any], Tensor]
    options: Options
    span: Callable[[Any], str] = lambda options: "block"
    scope: Callable[[Any], str] = lambda options: ""
    ranks: Callable[[Any, int], Sequence[int]] | None = None
    sizes: Callable[[Edit, Any], Tensor] | None = None
    nonzero: Callable[[Any], bool] = lambda options: False
    places: bool = False
    equal: bool = False
    sums: Callable[[Edit, Any], Tensor] | None = None

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
    cancelled: str = option(
        "majority",
        choices=("majority", "positive"),
        help="sign that is elected where entries cancel exactly: that of most of the model, or mergekit's",
    )


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
                raise GradmatchError(
                    f"density {share} with epsilon {width} gives probabilities from {share - width / 2:g} to {share + width / 2:g}; "
                    "choose 0 <= epsilon < 2 * min(density, 1 - density)",
                    "bad_setting",
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


@dataclass(frozen=True)
class LocalizeOptions(Options):
    """Localize-and-Stitch without data."""

    density: Share = option(0.05, **KEPT)


@dataclass(frozen=True)
class SceOptions(Options):
    """How many entries are merged at all."""

    select_topk: float = option(
        1.0, "[0, 1]", help="share of entries that are merged, those of the largest variance"
    )


def of_task(options: Options, position: int) -> Options:
    """One task's options: its own where there is one value a task."""
    own = {key: value[position] for key, value in options.items() if isinstance(value, tuple)}
    return replace(options, **own)


def _ties(edit: Edit, options: TiesOptions) -> Tensor:
    threshold = edit.cuts[0].value
    return ties(edit.tau, edit.alpha, threshold, edit.majority, options.scale, options.normalize, edit.health)


def _dare(edit: Edit, options: DareOptions) -> Tensor:
    ratio = None if edit.sums is None else l1_ratio(*edit.sums).to(edit.tau).reshape(edit.alpha.shape)
    return dare(edit.tau, edit.noise(), edit.column(options.density), options.rescale, ratio)


def _l1_sums(edit: Edit, options: DareOptions) -> Tensor:
    """sum |tau| before and after DARE's drop, (2, T)."""
    import torch

    kept = drop(edit.tau, edit.noise(), edit.column(options.density))
    return torch.stack([x.reshape(len(x), -1).abs().double().sum(1) for x in (edit.tau, kept)])


def _della(edit: Edit, options: Any) -> Tensor:
    epsilon = widest(options.density) if options.epsilon is None else options.epsilon
    return della(edit.tau, edit.noise(), edit.column(options.density), edit.column(epsilon))


def _breadcrumbs(edit: Edit, options: BreadcrumbsOptions) -> Tensor:
    outliers, kept = edit.cuts
    return breadcrumbs(edit.tau, outliers, kept, edit.first)


def _localize(edit: Edit, options: LocalizeOptions) -> Tensor:
    return localize(edit.tau, edit.alpha, edit.cuts[0].value)


def _select(edit: Edit) -> Tensor:
    return select(edit.tau, edit.cuts[0] if edit.cuts else None, edit.first)


def _sce(edit: Edit, options: SceOptions) -> Tensor:
    assert edit.sums is not None
    weight = edit.sums[0] / edit.sums[1]
    if float(weight.sum()) < FLAT:
        weight = weight.new_ones(weight.shape)
    return sce(_select(edit), weight.to(edit.tau).reshape(edit.alpha.shape))


def _square_sums(edit: Edit, options: SceOptions) -> Tensor:
    """Sum of tau^2 of the selected entries, and how many entries there are, (2, T)."""
    rows = _select(edit).reshape(len(edit.tau), -1)
    squares = [float(row.dot(row)) for row in rows]
    return edit.tau.new_tensor([squares, [rows.shape[1]] * len(rows)]).double()


def _importance(edit: Edit, options: Options) -> Tensor:
    assert edit.theta0 is not None
    return importance(edit.theta0, edit.tau)


def _fusion(edit: Edit, options: Options) -> Tensor:
    return fusion(edit.tau, _importance(edit, options), *(cut.value for cut in edit.cuts))


TRANSFORMS: dict[str, Transform] = {
    "ties": Transform(
        _ties,
        TiesOptions(),
        scope=lambda options: "model" if options.trim == "global" else "tensor",
        ranks=lambda options, n: (kept_count(options.density, n),),
        equal=True,
    ),
    "dare": Transform(
        _dare,
        DareOptions(),
        scope=lambda options: "tensor" if options.rescale == "l1" else "",
        sums=_l1_sums,
    ),
    "della": Transform(_della, DellaOptions(), span=lambda options: "rows"),
    "breadcrumbs": Transform(
        _breadcrumbs,
        BreadcrumbsOptions(),
        scope=lambda options: "tensor",
        ranks=lambda options, n: ranks(options.density, options.gamma, n),
        places=True,
    ),
    "sce": Transform(
        _sce,
        SceOptions(),
        scope=lambda options: "tensor",
        ranks=lambda options, n: (whole_part(options.select_topk, n),) if options.select_topk < 1 else (),
        sizes=lambda edit, options: spread(edit.tau),
        nonzero=lambda options: options.select_topk < 1,
        places=True,
        sums=_square_sums,
    ),
    "arcee_fusion": Transform(
        _fusion,
        NONE,
        span=lambda options: "rows",
        scope=lambda options: "tensor",
        ranks=lambda options, n: quartiles(n),
        sizes=_importance,
    ),
    "localize": Transform(
        _localize,
        LocalizeOptions(),
        scope=lambda options: "model",
        ranks=lambda options, n: (kept_count(options.density, n),),
    ),
}
