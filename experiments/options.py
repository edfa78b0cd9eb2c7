"""What a config says of a merge, checked before anything runs: names of options, and whether the study serves the rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from gradmatch.estimators.names import nearest
from gradmatch.plan.request import Request
from gradmatch.rules import find_rule
from gradmatch.rules.after import AFTER
from gradmatch.rules.edits import TRANSFORMS

SHARED = tuple(
    field.name for field in dataclasses.fields(Request) if field.name not in ("method", "options", "notes")
)  # what every rule takes
ESTIMATES = {"gram": "Gram matrices", "factors": "Kronecker factors", "gradient": "measured gradients"}


def check_names(
    method: str, options: Mapping[str, Any], more: Iterable[str] = (), also: tuple[str, ...] = ("alpha",)
) -> None:
    """Refuse an option that neither the rule has, nor its transforms, nor every rule; `also`: what else the config takes.

    more: names beside those of `options`. An unknown method or transform is left to `Request`.

    Raises:
        ValueError: an unknown name; the nearest of all known ones is offered. Or transforms that are no names.
    """
    try:
        rule = find_rule(method)
    except (ValueError, TypeError):
        return
    own = set(rule.options)
    edits: dict[str, Any] = {**TRANSFORMS, **AFTER}
    for key, more_edits in (("transforms", rule.transforms), ("after", ())):
        given = options.get(key, ())
        for edit in (*([given] if isinstance(given, str) else given), *more_edits):
            if not isinstance(edit, str) and not (isinstance(edit, Mapping) and len(edit) == 1):
                raise ValueError(f"{key}: each is a name or {{name: options}}, not {edit!r}")
            name = edit if isinstance(edit, str) else next(iter(edit))
            own |= set(edits[name].options) if name in edits else set()
    known = [*sorted(own), *also, *SHARED]
    for name in (*options, *more):
        if name not in known:
            raise ValueError(
                f"{method} has no option {name!r}{nearest(name, known)}; it takes {', '.join(sorted(own)) or 'none of its own'}, "
                f"and what every rule takes: {', '.join([*also, *SHARED])}"
            )


def check_rule(where: str, method: str, tasks: int, lacking: Iterable[str]) -> None:
    """Refuse a rule that does not merge so many models, or that needs what the study does not estimate; a known method.

    where: how the message begins. lacking: of `ESTIMATES`.

    Raises:
        ValueError: either.
    """
    rule = find_rule(method)
    fewest, most = rule.models
    if not fewest <= tasks <= most:
        raise ValueError(f"{where}: {method} takes {fewest} to {most:g} models, but there are {tasks} tasks")
    for need in lacking:
        if need in rule.needs:
            raise ValueError(
                f"{where}: {method} needs {ESTIMATES[need]}, which this study does not estimate; "
                "gradient_matching takes diagonals"
            )
