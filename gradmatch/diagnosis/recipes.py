"""What a rule makes of its weights: the coefficients it gives each task vector, and how large they can become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import numbers
from gradmatch.plan.request import REMOVALS
from gradmatch.rules import RULES
from gradmatch.rules.edits import TRANSFORMS

if TYPE_CHECKING:
    from gradmatch.models.task import Task

# Rules whose update is no multiple of the task vectors' entries, or one without a bound: their merges are not judged by it.
UNBOUNDED = frozenset({"removal", "ewr", "fisher_base", "measured", "regmean"})


def effective_weights(
    method: str, weights: Mapping[str, float], options: Mapping[str, Any]
) -> dict[str, float]:
    """The coefficient that the rule gives each tau_t: as its formula says for rules that combine whole models, else alpha_t.

    1/T for averaging, normalised for weighted averages, times `scale` where the rule has one, negative where it removes.
    """
    rule = RULES[method]
    given = list(weights.values())
    if rule.linear is not None and not rule.gram and not rule.matrix:
        named = {name: _number(options.get(name, default), default) for name, default in rule.options.items()}
        try:
            found = rule.linear(given, None, named)[1]
        except ValueError:  # weights that cancel, which the merge itself refuses
            found = given
    elif method == "model_stock":
        found = [1 / len(given)] * len(given)  # times a factor of its own in each tensor
    else:
        found = [-weight for weight in given] if method in REMOVALS else given
    return dict(zip(weights, found, strict=True))


def reach_of(method: str, alpha: Mapping[str, float], options: Mapping[str, Any]) -> list[float] | None:
    """The largest coefficient that the rule can give an entry of each tau_t; None: it has no bound.

    Averages by curvature and sign elections give one task up to all of an entry; a rescaled drop multiplies by 1 / density.
    """
    rule = RULES[method]
    if method in UNBOUNDED:
        return None
    edits = [*rule.transforms, *options.get("transforms", ())]
    whole = rule.elementwise is not None or bool(edits)
    factor = 1.0
    for edit in edits:
        (name, own), *_ = [(edit, {})] if isinstance(edit, str) else edit.items()
        settings = {**TRANSFORMS[name].options, **options, **own}
        kept = (
            min(numbers(settings.get("density", 1.0)), default=1.0)
            - max(numbers(settings.get("epsilon", 0.0)), default=0.0) / 2
        )
        factor /= max(kept, 1e-3)
    return [factor * max(abs(weight), 1.0 if whole else 1 / len(alpha)) for weight in alpha.values()]


def in_span(method: str, tasks: Sequence[Task], options: Mapping[str, Any]) -> bool:
    """Whether the recipe's update is sum_t alpha_t tau_t exactly, with one alpha_t for all tensors."""
    rule = RULES[method]
    linear = rule.linear is not None and not rule.gram and not rule.matrix and method != "greedy_soup"
    edited = bool(rule.transforms or options.get("transforms"))
    plain = [float(task.weight) for task in tasks if isinstance(task.weight, int | float)]
    if (
        not linear
        or edited
        or len(plain) < len(tasks)
        or isinstance(options.get("scale"), Mapping | list | tuple)
    ):
        return False
    assert rule.linear is not None
    c0, found, _ = rule.linear(
        plain, None, {name: options.get(name, own) for name, own in rule.options.items()}
    )
    return abs(c0 + sum(found) - 1) < 1e-6  # else the base's own weights are scaled


def _number(value: Any, default: Any) -> Any:
    """One number for a setting that varies over tensors: their mean. Switches stay as they are."""
    found = numbers(value)
    if found:
        return sum(found) / len(found)
    return default if isinstance(value, Mapping | list | tuple) else value
