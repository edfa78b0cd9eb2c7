"""The space of an evolutionary search: a weight of every model in every group of layers, and numbers among the rule's options.

A point is a table of numbers between their bounds; `Candidate` is what it stands for, in words that `merge` understands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.rules import find_rule

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint

Point = dict[str, float]
NORMALISED = ("linear", "weighted", "ties", "dare_ties")
OF_A_TASK = ("density", "epsilon", "gamma")  # options that every model may have of its own


@dataclass(frozen=True)
class Candidate:
    """One merge of the space: weights (numbers, or filters by layer), options of the rule, and options of single models."""

    weights: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        models: by name, in order.
        method: the rule of the merges.
        layers: numbers of the base's layers, in order; none where it has none.
        groups: into how many groups of consecutive layers the weights are divided, with embeddings, final norm and head beside them; 0: one
            weight for the whole model.
        filters: parts of names that get weights of their own, within every group.
        options: option of the rule -> (lowest, highest).
        per_model: options that every model has of its own in every group ("density").
        negative: whether weights go from -1 to 1 instead of from 0 to 1.
        normalize: whether the weights of a group are divided by their sum; None: where the method's weights are shares.
        smooth: whether weights are interpolated over the depth between the groups.
    """

    models: tuple[str, ...]
    method: str
    layers: tuple[int, ...] = ()
    groups: int = 0
    filters: tuple[str, ...] = ()
    options: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    per_model: tuple[str, ...] = ()
    negative: bool = False
    normalize: bool | None = None
    smooth: bool = False

    def __post_init__(self) -> None:
        """Check the choices against the rule and the layers.

        Raises:
            GradmatchError: an option that the rule lacks or bounds in the wrong order, or more groups than layers.
        """
        rule = find_rule(self.method)
        known = {*rule.options, *(OF_A_TASK if rule.transforms else ())}
        for name, (low, high) in self.options.items():
            if name not in known:
                raise GradmatchError(
                    f"{self.method} has no option {name!r} to search{nearest(name, known)}; it has {', '.join(sorted(known)) or 'none'}",
                    "unknown_option",
                    name,
                )
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise GradmatchError(
                    f"{name} is searched from {low:g} to {high:g}; the first must be below the second",
                    "out_of_range",
                    name,
                )
        if self.groups < 0 or self.groups > len(self.layers):
            raise GradmatchError(
                f"groups is {self.groups}, and the base has {len(self.layers)} layers; 0 is one weight for the whole model",
                "out_of_range",
                "groups",
            )

    @classmethod
    def of(cls, base: Checkpoint, models: Sequence[str], method: str, **chosen: Any) -> Space:
        """The space over a base's layers."""
        found = sorted({layer for name in base if (layer := layer_of(name)) is not None})
        return cls(tuple(models), method, tuple(found), **chosen)

    @property
    def places(self) -> list[str]:
        """The groups by name: "all", or embeddings, layers, norm and head; with filters each several times."""
        whole = ["all"]
        if self.groups:
            inner = [f"layers {part[0]}-{part[-1]}" for part in self.parts()]
            whole = inner if self.smooth else ["embeddings", *inner, "norm", "head"]
        return [f"{place} {part}".strip() for place in whole for part in (*self.filters, "")]

    def parts(self) -> list[list[int]]:
        """The layers of each group, consecutive ones, as even as can be."""
        count = len(self.layers)
        edges = [round(n * count / self.groups) for n in range(self.groups + 1)]
        return [list(self.layers[a:b]) for a, b in zip(edges, edges[1:])]  # noqa: B905, RUF007

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Name of a number -> (lowest, highest), in a fixed order: group, model, kind."""
        found: dict[str, tuple[float, float]] = {}
        for place in self.places:
            for model in self.models:
                found[f"{place}|{model}|weight"] = (-1.0 if self.negative else 0.0, 1.0)
                found |= {f"{place}|{model}|{name}": (0.01, 1.0) for name in self.per_model}
        return found | {f"|{name}": (float(low), float(high)) for name, (low, high) in self.options.items()}

    def start(self, weights: Mapping[str, float] | None = None) -> Point:
        """The point that stands for some weights (1/n each where none are given), with options in the middle of their bounds."""
        given = weights if weights is not None else dict.fromkeys(self.models, 1 / len(self.models))
        unknown = [name for name in given if name not in self.models]
        if unknown:
            raise GradmatchError(
                f"start names {unknown[0]!r}{nearest(unknown[0], self.models)}; the models are {', '.join(self.models)}",
                "unknown_name",
                unknown[0],
            )
        point = {}
        for name, (low, high) in self.bounds().items():
            _, model, kind = ("", "", name) if name.startswith("|") else name.split("|")
            value = given.get(model, 0.0) if kind == "weight" else high if model else (low + high) / 2
            point[name] = min(max(float(value), low), high)
        return point

    def candidate(self, point: Mapping[str, float]) -> Candidate:
        """What a point stands for.

        Raises:
            GradmatchError: weights that sum to 0 where they are shares.
        """
        divided = self.normalize if self.normalize is not None else self.method in NORMALISED
        tables: dict[str, dict[str, dict[str, float]]] = {}
        for place in self.places:
            row = {model: point[f"{place}|{model}|weight"] for model in self.models}
            if divided:
                total = sum(row.values())
                if abs(total) < 1e-9:
                    raise GradmatchError(f"its weights sum to {total:g} in {place}", "out_of_range", place)
                row = {model: value / total for model, value in row.items()}
            for model, value in row.items():
                tables.setdefault("weight", {}).setdefault(model, {})[place] = value
            for kind in self.per_model:
                for model in self.models:
                    tables.setdefault(kind, {}).setdefault(model, {})[place] = point[
                        f"{place}|{model}|{kind}"
                    ]
        weights = {model: self._setting(rows) for model, rows in tables["weight"].items()}
        own = {
            model: {kind: self._setting(tables[kind][model]) for kind in self.per_model}
            for model in self.models
        }
        options = {name: point[f"|{name}"] for name in self.options}
        kept = {model: weight for model, weight in weights.items() if _any(weight)}
        if not kept:
            raise GradmatchError("its weights are all 0", "out_of_range")
        return Candidate(kept, options, {model: own[model] for model in kept if own[model]})

    def _setting(self, rows: Mapping[str, float]) -> Any:
        """Values by group as a setting of `merge` (see `gradmatch.common.settings`)."""
        values = list(rows.values())
        if len(values) == 1:
            return values[0]
        count = len(self.filters) + 1
        entries: list[dict[str, Any]] = []
        if not self.groups:
            keys: list[list[dict[str, Any]]] = [[{}]]
        elif self.smooth:
            columns = [values[n::count] for n in range(count)]
            return [
                {**({"filter": f} if f else {}), "value": column}
                for f, column in zip((*self.filters, ""), columns, strict=True)
            ]
        else:
            inner: list[list[dict[str, Any]]] = [
                [{"layer": layer} for layer in part] for part in self.parts()
            ]
            keys = [
                [{"layer": "before"}],
                *inner,
                [{"layer": "after", "filter": "norm"}],
                [{"layer": "after"}],
            ]
        for place, wheres in enumerate(keys):
            for n, part in enumerate((*self.filters, "")):
                value = values[place * count + n]
                for where in wheres:
                    if part and "filter" in where:
                        continue
                    entries.append({**where, **({"filter": part} if part else {}), "value": value})
        return entries

    def told(self) -> dict[str, Any]:
        """The space as it stands in a study, to be compared."""
        return {
            "bounds": {name: list(pair) for name, pair in self.bounds().items()},
            "normalize": self.normalize,
            "smooth": self.smooth,
        }


def _any(weight: Any) -> bool:
    """Whether a setting has a number that is not 0."""
    if isinstance(weight, Sequence):
        return any(_any(entry["value"] if isinstance(entry, Mapping) else entry) for entry in weight)
    return bool(weight)
