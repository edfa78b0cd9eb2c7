"""mergekit's parameters: by model, slice, module and recipe, over the layers and by name; as the settings that we have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradmatch.common.settings import layer_of, value_at
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.opening import open_checkpoint

# {"filter": part of a name, "layer": where, "value": a setting}, the first two optional
Condition = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Layers first to last (excluded) of a model, with the parameters given there."""

    name: str
    first: int
    last: int
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, source: Mapping[str, Any]) -> Source:
        """An entry of `sources`."""
        first, last = source["layer_range"]
        return cls(model_name(source["model"]), first, last, source.get("parameters") or {})


@dataclass(frozen=True)
class Entry:
    """One model to merge: its reference, what opens it, and its own parameters in each slice."""

    name: str
    model: Any
    own: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Part:
    """What is merged, and every parameter by its scope.

    Attributes:
        entries: the models.
        base: the base_model, or None.
        slices: of the output, (first layer, one after the last, parameters); the layers are None where there is one slice of all.
        shared: parameters of the module and of the recipe.
    """

    entries: Sequence[Entry]
    base: Entry | None
    slices: Sequence[tuple[int, int | None, Mapping[str, Any]]]
    shared: Sequence[Mapping[str, Any]]

    def value(self, key: str, entry: Entry | None = None, default: Any = None, layers: int = 0) -> Any:
        """A parameter as a setting: that of the model before the slice's, the module's and the recipe's.

        With `layers`, the output's number of them, every number of it by layer.

        A gradient runs over the layers of its slice. What comes before the layers takes the first slice's first value, what comes
        after them the *last slice's first* value.
        """
        found: list[Condition] = []
        for position, (first, last, parameters) in enumerate(self.slices):
            scopes = [*([entry.own[position]] if entry else []), parameters, *self.shared]
            here = [one for scope in scopes if key in scope for one in _conditions(key, scope[key])]
            here += [] if default is None else [{"value": default}]
            here = here[: next((n for n, one in enumerate(here, 1) if set(one) == {"value"}), len(here))]
            if layers or len(self.slices) > 1:
                last = layers if last is None else last
                ends = (position == 0, position == len(self.slices) - 1)
                found += pinned(here, range(first, last), *ends)
            else:
                found += [{**one, "value": _as_theirs(one["value"])} for one in here]
        if len(found) == 1 and set(found[0]) == {"value"}:
            return found[0]["value"]
        return found or default

    def one(self, key: str, default: Any = None) -> Any:
        """A parameter that is the same everywhere, such as a switch.

        Raises:
            ValueError: slices that differ in it.
        """
        by_slice = [{**_merged(self.shared), **parameters} for _, _, parameters in self.slices]
        found = [parameters.get(key, default) for parameters in by_slice]
        if any(value != found[0] for value in found) or isinstance(found[0], (list, dict)):
            raise GradmatchError(f"{key} is {found}; one value for the whole model is supported")
        return found[0]


def _merged(scopes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters of several scopes, the first of which counts most."""
    return {key: value for scope in reversed(scopes) for key, value in scope.items()}


def _as_theirs(value: Any) -> Any:
    """A gradient as mergekit reads it: outside the layers (also after the last one) its first value holds."""
    return [{"layer": None, "value": value[0]}, {"value": value}] if isinstance(value, list) else value


def _conditions(key: str, setting: Any) -> list[Condition]:
    """A parameter of one scope: which value, a number or a gradient, holds where."""
    entries = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(entries, list) or (entries and not isinstance(entries[0], Mapping)):
        return [{"value": setting}]
    for one in entries:
        known = isinstance(one, Mapping) and "value" in one and set(one) <= {"filter", "value"}
        if not known or isinstance(one["value"], Mapping) or one["value"] == []:
            entries = []
    if not entries:
        raise GradmatchError(
            f"{key} is {setting!r}; it is a number, a gradient [a, b, ...], or a list of {{filter: NAME, value: ...}}"
        )
    return [
        {**({} if one.get("filter") in (None, "*") else {"filter": one["filter"]}), "value": one["value"]}
        for one in entries
    ]


def pinned(conditions: Sequence[Condition], layers: range, before: bool, after: bool) -> list[Condition]:
    """Conditions that hold in these layers of the output alone, and outside where these are the first or last."""
    places = [
        (index, (index - layers[0]) / (len(layers) - 1) if len(layers) > 1 else 1.0) for index in layers
    ]
    outside = [(name, 0.0) for name, wanted in (("before", before), ("after", after)) if wanted]
    return [
        {**one, "layer": place, "value": value_at(one["value"], "", depth)}
        for place, depth in (*places, *outside)
        for one in conditions
    ]


def without_zeros(weight: Any, density: Sequence[Condition]) -> tuple[list[Condition], list[Condition]]:
    """Weight and density where no density is 0: there the weight is, so that the task takes no part."""
    kept = [{**one, "value": 1.0 if one["value"] == 0 else one["value"]} for one in density]
    counts = [{**one, "value": 0.0 if one["value"] == 0 else weight} for one in density]
    return counts, kept


def layer_count(model: Any) -> int:
    """How many layers a model has."""
    return 1 + max((layer_of(name) or 0 for name in open_checkpoint(model)), default=0)


def model_name(model: Any) -> str:
    """A model reference as text; their other form is {"model": {"path": ..., "revision": ...}, "lora": {"path": ...}}.

    Raises:
        ValueError: a reference that is not understood.
    """
    if isinstance(model, Mapping):
        adapter = model.get("lora")
        inner = model.get("path", model.get("model"))
        name = model_name(inner) if inner is not None else ""
        revision = model.get("revision")
        name = f"{name}@{revision}" if name and revision else name
        model = (f"{name}+{model_name(adapter)}" if adapter else name) or None
    if not isinstance(model, str):
        raise GradmatchError(f"a model is a path or a hub id, not {model!r}")
    return model
