"""What an estimator is, which ones there are, and how one of your own is found.

An estimator is a module or an object with three functions:

    start(problem)           before the first batch
    step(problem, batch)     add one batch: `problem.sums` maps names to tensors, everything in it adds up over batches,
                             over processes and over an interruption
    finish(problem, seen)    the sums as keyword arguments of `Curvature.from_dict`, per example: {"mean": {name: tensor},
                             ...}; `seen` is the number of examples

and, where they apply, two constants: `GIVES`, which of the options "standard_error", "gradient" and "tolerance" it can
serve (none by default), and `UNITS`, what a mean block is measured in (nats per example by default). For "gradient" it adds the
summed gradient at the true labels to `problem.sums["gradient/<parameter>"]`; for "tolerance" it adds what it measures to
`problem.sums["diagonal/<parameter>"]`, whose sums over all weights are watched; for "standard_error" its `finish`
returns them too.

It is used by name once it is in `ESTIMATORS`, by place as `method="package.module:NAME"`, or from any installed package
that names it in the entry-point group "gradmatch.estimators". `check_estimator` says whether it keeps these promises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from gradmatch.estimators import empirical_fisher, fisher, ggn, gram, hessian, kfac
from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.estimators.parts import find_part
from gradmatch.estimators.problem import Problem

GROUP = "gradmatch.estimators"
OPTIONS = ("standard_error", "gradient", "tolerance")


class Estimator(Protocol):
    """The three functions; see the top of this file."""

    def start(self, problem: Problem) -> None:
        """Prepare the accumulators in problem.sums."""

    def step(self, problem: Problem, batch: Batch) -> None:
        """Add one batch."""

    def finish(self, problem: Problem, seen: int) -> dict[str, Any]:
        """Sums into keyword arguments of Curvature.from_dict, per example."""


ESTIMATORS: dict[str, Estimator] = {
    "fisher": fisher,
    "empirical_fisher": empirical_fisher,
    "ggn": ggn,
    "hessian": hessian,
    "kfac": kfac,
    "gram": gram,
}


def find_estimator(method: str) -> Estimator:
    """The estimator of a name: of ESTIMATORS, of an installed package, or "package.module:NAME".

    Raises:
        ValueError: there is none of that name, or its module cannot be imported.
        TypeError: what was found has no start, step and finish.

    Example:
        >>> find_estimator("gradmatch.estimators.protocol:fisher") is ESTIMATORS["fisher"]
        True
    """
    found: Any = find_part("method", GROUP, method, ESTIMATORS)
    missing = [part for part in ("start", "step", "finish") if not callable(getattr(found, part, None))]
    if missing:
        raise TypeError(
            f"method {method!r} is a {type(found).__name__} without {' and '.join(missing)}: an estimator has start, step "
            "and finish (see gradmatch.estimators.protocol)"
        )
    estimator: Estimator = found
    return estimator


def check_gives(method: str, estimator: Estimator, **wanted: bool) -> None:
    """Refuse the options that an estimator does not serve."""
    gives = gives_of(estimator)
    asked = [option for option, given in wanted.items() if given and option not in gives]
    if asked:
        raise GradmatchError(
            f"{asked[0]} is not available for method={method!r}, which gives {', '.join(gives) or 'none of the options'} "
            f"(GIVES of the estimator, out of {', '.join(OPTIONS)})",
            "bad_request",
        )


def gives_of(estimator: Estimator) -> tuple[str, ...]:
    """Its GIVES, checked."""
    gives: Iterable[str] = getattr(estimator, "GIVES", ())
    found = (gives,) if isinstance(gives, str) else tuple(gives)
    for option in found:
        choose("option in GIVES", option, OPTIONS)
    return found
