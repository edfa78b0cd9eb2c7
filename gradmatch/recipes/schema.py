"""The JSON Schema of recipes: rules, policies and every rule's options, from what they say of themselves, for editors to complete.

A first line `# yaml-language-server: $schema=recipe.schema.json` in a recipe is what editors look for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from gradmatch.plan.request import DTYPES, POLICIES
from gradmatch.recipes.recipe import Recipe
from gradmatch.rules import RULES, Options
from gradmatch.rules.after import AFTER
from gradmatch.rules.edits import TRANSFORMS

OWN = {"type": "string", "pattern": r"^[\w.]+:\w+$", "description": "package.module:RULE of your own"}
# what a setting may be beside a plain value, see `gradmatch.common.settings`
SETTINGS = {
    "over_depth": {"type": "array", "description": "over the depth, from the first layer to the last"},
    "by_name": {"type": "object", "description": "by pattern of the tensor's name"},
}
OTHERWISE = [{"$ref": f"#/$defs/{name}"} for name in SETTINGS]


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe, as JSON Schema 2020-12.

    Example:
        >>> recipe_schema()["properties"]["heads"]["enum"]
        ['error', 'base', 'keep-per-task']
    """
    schema: dict[str, Any] = Recipe.model_json_schema()
    properties = schema["properties"]
    properties["method"] = {
        "default": "gradient_matching",
        "anyOf": [{"enum": list(RULES)}, OWN],
        "description": "the rule that merges",
    }
    for name, choices in POLICIES.items():
        properties[name] = {"enum": list(choices), "default": choices[0]}
    properties["dtype"] = {"enum": [*DTYPES, None], "default": None, "description": "of the output"}
    for name, known in (("transforms", TRANSFORMS), ("after", AFTER)):
        properties[name] = edits(known, properties[name]["default"])
    properties["options"] = {
        "type": "object",
        "properties": merged([*RULES.values(), *TRANSFORMS.values(), *AFTER.values()]),
    }
    schema["$defs"]["TaskRecipe"]["properties"]["weight"] = {
        "default": 1.0, "anyOf": [{"type": "number"}, *OTHERWISE]
    }  # fmt: skip
    entry = schema["$defs"].pop("TaskRecipe")
    properties["tasks"]["items"] = {
        "anyOf": [{"type": "string", "description": "a model of weight 1"}, entry]
    }
    schema["$defs"] = SETTINGS
    shared = merged([*TRANSFORMS.values(), *AFTER.values()])
    schema["allOf"] = [
        {
            "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
            "then": {
                "properties": {
                    "options": {
                        "properties": of(rule.options),
                        "propertyNames": {"enum": sorted({*shared, *rule.options})},
                    }
                }
            },
        }
        for name, rule in RULES.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "gradmatch recipe",
        "description": "What is merged, and how; keys and values of `gradmatch merge recipe.yaml OUT`",
        **{key: value for key, value in schema.items() if key not in ("title", "description")},
    }


def edits(known: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A name of an edit, or a list of names and of {name: options}."""
    names = {"enum": list(known)}
    with_options = {
        "type": "object",
        "properties": {name: {"type": "object", "properties": of(one.options)} for name, one in known.items()},
        "additionalProperties": False,
    }  # fmt: skip
    items = {"type": "array", "items": {"anyOf": [names, with_options]}}
    return {"default": list(default), "anyOf": [names, items]}


def merged(owners: Iterable[Any]) -> dict[str, Any]:
    """Every option of several owners, by name; of one that several have, any of their values."""
    found: dict[str, list[dict[str, Any]]] = {}
    for owner in owners:
        for name, schema in of(owner.options).items():
            if schema not in found.setdefault(name, []):
                found[name].append(schema)
    return {name: told[0] if len(told) == 1 else {"anyOf": told} for name, told in found.items()}


def of(options: Options) -> dict[str, Any]:
    """Option -> its schema: kind, range, choices, default and meaning."""
    return {one.name: option(one) for one in dataclasses.fields(options)}


def option(one: dataclasses.Field[Any]) -> dict[str, Any]:
    """One option, which may also be a list over the depth or a table of patterns."""
    told, default = one.metadata, one.default
    value: dict[str, Any] = {}
    sample = told.get("kind") if default is None else default
    if told.get("choices"):
        value["enum"] = list(told["choices"])
    elif isinstance(sample, bool):
        value["type"] = "boolean"
    elif isinstance(sample, int):
        value["type"] = "integer"
    elif isinstance(sample, float):
        value["type"] = "number"
    elif isinstance(sample, str):
        value["type"] = "string"
    value |= interval(str(told.get("within") or ""))
    said = {"description": told["help"]} if told.get("help") else {}
    if not value:  # anything
        return said
    known = {} if default is None else {"default": default}
    empty = [{"type": "null"}] if default is None else []
    return {"anyOf": [value, *OTHERWISE, *empty], **known, **said}


def interval(within: str) -> dict[str, Any]:
    """An interval such as "(0, 1]" as JSON Schema's bounds.

    >>> interval("(0, 1]"), interval("[1, inf)")
    ({'exclusiveMinimum': 0.0, 'maximum': 1.0}, {'minimum': 1.0})
    """
    if not within:
        return {}
    low, high = (float(end) for end in within[1:-1].split(","))
    found = {"minimum" if within[0] == "[" else "exclusiveMinimum": low}
    found["maximum" if within[-1] == "]" else "exclusiveMaximum"] = high
    return {key: value for key, value in found.items() if abs(value) != float("inf")}
