"""What a rule makes of its weights: the coefficients it gives each task vector, and how large they can become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import numbers
from gradmatch.rules import Linear, Options, find_rule
from gradmatch.rules.edits import TRANSFORMS

if TYPE_CHECKING:
    from gradmatch.models.task import Task


def effective_weights(
    method: str, weights: Mapping[str, float], options: Mapping[str, Any]
) -> dict[str, float]:
    """The coefficient that the rule gives each tau_t: as its formula says for rules that combine whole models, else alpha_t.

    1/T for averaging, normalised for weighted averages, times `scale` where the rule has one, negative where it removes. Rules
    for which weights play no role treat all tasks alike (times a factor of its own in each tensor, for Model Stock).
    """
    rule = find_rule(method)
    given = list(weights.values())
    if isinstance(rule, Linear) and not rule.gram:
        try:
            found = rule.terms(given, None, _at_mean(rule.options, options))[1]
        except ValueError:  # weights that cancel, which the merge itself refuses
            found = given
    elif not rule.weighs and len(given) == rule.models[1]:
        found = given
    elif not rule.weighs:
        found = [1 / len(given)] * len(given)
    else:
        found = [-weight for weight in given] if rule.removes else given
    return dict(zip(weights, found, strict=True))


def reach_of(method: str, alpha: Mapping[str, float], options: Mapping[str, Any]) -> list[float] | None:
    """The largest coefficient that the rule can give an entry of each tau_t; None: it has no bound, or the update is edited.

    Averages by curvature and sign elections give one task up to all of an entry; a rescaled drop multiplies by 1 / density.
    """
    rule = find_rule(method)
    if not rule.bounded or options.get("after"):
        return None
    edits = [*rule.transforms, *options.get("transforms", ())]
    whole = not isinstance(rule, Linear) or bool(edits)
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
    rule = find_rule(method)
    edited = bool(rule.transforms or options.get("transforms") or options.get("after"))
    plain = [float(task.weight) for task in tasks if isinstance(task.weight, int | float)]
    varies = any(isinstance(options.get(name), Mapping | list | tuple) for name in rule.options)
    if (
        not isinstance(rule, Linear)
        or rule.gram
        or rule.searches
        or edited
        or varies
        or len(plain) < len(tasks)
    ):
        return False
    c0, found, _ = rule.terms(plain, None, _at_mean(rule.options, options))
    return abs(c0 + sum(found) - 1) < 1e-6  # else the base's own weights are scaled


def _at_mean(defaults: Options, options: Mapping[str, Any]) -> Options:
    """The rule's options, with the mean of a setting that varies over tensors."""
    given = {name: _number(value, defaults[name]) for name, value in options.items() if name in defaults}
    return defaults.changed("options", given)


def _number(value: Any, default: Any) -> Any:
    """One number for a setting that varies over tensors: their mean. Switches stay as they are."""
    found = numbers(value)
    if found:
        return sum(found) / len(found)
    return default if isinstance(value, Mapping | list | tuple) else value
