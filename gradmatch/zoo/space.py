"""The space of an evolutionary search: a weight of every model in every group of layers, and numbers among the rule's options.

A point is a table of numbers between their bounds; `Candidate` is what it stands for, in words that `merge` understands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import FIRST, layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.rules import find_rule

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint

Point = dict[str, float]
NORMALISED = ("linear", "weighted", "ties", "dare_ties")
ARC = (-4.0, 4.0)  # of the two numbers whose softmax is a place on the arc: .0003 to .9997
NORMS = ("norm", "ln_f", "layernorm", "LayerNorm")  # how a norm behind the layers is called
OUTSIDE: dict[str, dict[str, Any]] = {  # groups beside those of layers, as entries of a setting
    "embeddings": {"layer": "before"},
    "norm": {"layer": "after", "filter": NORMS[0]},
    "head": {"layer": "after"},
}
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
        outside: groups beside those of layers, by name, as entries of a setting.
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
    outside: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: OUTSIDE)

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
        if self.method == "slerp" and len(self.models) != 2:
            raise GradmatchError(
                f"slerp goes between two models, and there are {len(self.models)}; name two, or search another method",
                "bad_choice",
                "slerp",
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
        after = [
            name
            for name in base.store
            if layer_of(name) is None and not FIRST.search(name) and name not in base.aliases
        ]
        norm = next((part for part in NORMS if any(part in name for name in after)), "")
        outside = dict(OUTSIDE)
        outside["norm"] = {"layer": "after", "filter": norm}
        if not norm:
            del outside["norm"]
        if all(norm and norm in name for name in after):
            del outside["head"]
        if all(layer_of(name) is not None or name in after for name in base.store):
            del outside["embeddings"]
        return cls(tuple(models), method, tuple(found), outside=outside, **chosen)

    @property
    def places(self) -> list[str]:
        """The groups by name: "all", or embeddings, layers, norm and head; with filters each several times."""
        whole = ["all"]
        if self.groups:
            inner = [f"layers {part[0]}-{part[-1]}" for part in self.parts()]
            first = [place for place in self.outside if place == "embeddings"]
            last = [place for place in self.outside if place != "embeddings"]
            whole = inner if self.smooth else [*first, *inner, *last]
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
                found[f"{place}|{model}|weight"] = (
                    ARC if self.method == "slerp" else (-1.0 if self.negative else 0.0, 1.0)
                )
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
        if self.method == "slerp":
            return self._on_the_arc(point)
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

    def _on_the_arc(self, point: Mapping[str, float]) -> Candidate:
        """SLERP of two models: t = softmax(weights)_2 in every group, as mergekit-evolve has it."""
        first, second = self.models
        places = {}
        for place in self.places:
            a, b = (point[f"{place}|{model}|weight"] for model in (first, second))
            places[place] = 1 / (1 + math.exp(a - b))
        options = {name: point[f"|{name}"] for name in self.options}
        return Candidate({first: 1.0, second: 1.0}, {**options, "t": self._setting(places)})

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
            first = [[dict(where)] for place, where in self.outside.items() if place == "embeddings"]
            last = [[dict(where)] for place, where in self.outside.items() if place != "embeddings"]
            keys = [*first, *inner, *last]
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
