"""Every key of every config, read off the classes that check them: a page, and a JSON Schema for editors."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from experiments import config as configs

EXAMPLES = {  # where neither the default nor the type shows how a value is written
    "encoder": "../models/my-encoder",
    "seeds": "[0, 1, 2]",
    "name": "mine",
    "tasks": "[shop, hotel]",
    "base": "films",
    "train": "2000",
    "validation": "0.1",
    "test": "350",
    "path": "reviews.csv",
    "text": "review",
    "label": "stars",
    "labels": "{bad: 0, good: 1}",
    "group_column": "user",
    "positive_from": "4",
    "models": "{shop: ../models/shop}",
    "mixture.Config.models": "sentiment.yaml",
    "rebasin.Config.networks": "[mlp, resnet]",
    "rebasin.Config.disjoint": "[mlp]",
    "unlearning_config.Config.relearn": "[negation, guarded]",
    "unlearning_config.Texts.prompts": "{toxic: {source: toxic prompts}}",
    "mixture.Mixture.rank": "48",
    "mixture.Mixture.near": "0.1",
    "mixture.Config.compare": "[[model, AM]]",
    "mixture.Config.levels": "[[model, ffn]]",
    "mixture.Config.small": "[rank 48]",
    "mixture.Config.whole": "[model]",
    "mixture.Config.alike": "[near]",
    "mixture.Config.merges": "[AM, TSV-M]",
    "evaluation": "my_module:scores",
    "compare": "[[GM, TA]]",
    "choose": "{base_weight: [0.01, 0.1, 1]}",
    "options": "{density: 0.5}",
    "method": "gradient_matching",
    "alphas": "[0.5, 1, 2]",
    "source": "configs/alpha.yaml",
    "sentiment": "configs/sentiment.yaml",
    "subset": "plain_text",
    "corpora": "{shop: {path: shop.csv}}",
    "language.Data.corpora": "{shop: {source: shop.txt}}",
    "sets": "{cars: {path: ../images/cars}}",
    "targets": "[query, value]",
    "task_steps": "{shop: 100}",
    "adding.Config.compare": "[GM, TA]",
    "removal_config.Config.prompts": "{toxic: {source: toxic prompts}}",
    "removal_config.Limits.validation": "100",
    "removal_proof.Config.encoder": "{}",
    "Sweep.merges": "[TA]",
    "Corpus.test": "reviews-test.csv",
    "Corpus.validation": "reviews-validation.csv",
    "ImageSet.path": "../images/cars",
    "ImageSet.test": "test",
    "ImageSet.validation": "validation",
    "Data.labels": "[bad, good]",
    "tokenizer": "../models/my-encoder",
    "delta0": "[1.0e-6, 1.0e-4]",
    "full": "500, exact GGN",
    "cases": "[healthy]",
    "encoders": "[0]",
    "a": "mnist",
    "b": "photos",
    "c": "digits",
    "target": "digits",
    "context": "article",
    "document": "page",
    "where": "toxicity",
    "minimum": "0.5",
    "equals": "'yes'",
    "limit": "1000",
    "prompts": "toxic prompts",
    "values": "[0.1, 1]",
    "low": "0.01",
    "high": "10",
    "merges": "{TA: {method: task_arithmetic}}",
    "steps": "100",
    "learning_rate": "5.0e-5",
}


def page() -> str:
    """`docs/config.md`: a table an experiment and a part, a row a key: type and range, default, an example."""
    parts = [
        "# Every key of a config\n\n"
        "Written by `python -m experiments keys`; `python -m experiments keys --json > configs/schema.json` is the same for editors (a first "
        "line `# yaml-language-server: $schema=schema.json` in a config makes them complete and check keys). A key is set on the command line by "
        "`key=value`, one in a part by `part.key=value`, and left out by `~key`.\n"
    ]
    seen: dict[type[BaseModel], str] = {}
    by_class: dict[type[BaseModel], list[str]] = {}
    for name in configs.EXPERIMENTS:
        by_class.setdefault(configs.study(name).Config, []).append(name)
    for model, names in by_class.items():
        title = " and ".join(f"`experiment: {name}`" for name in names)
        parts.append(f"## {title}\n\n{_words(model)}\n\n{_table(model)}\n")
        for part in _parts(model):
            if part not in seen:
                seen[part] = part.__name__
                parts.append(f"### Part `{_title(part)}`\n\n{_words(part)}\n\n{_table(part)}\n")
    return "\n".join(parts)


def json_schema() -> str:
    """A JSON Schema that takes what `load` takes of a config file."""
    choices, definitions = [], {}
    for name in configs.EXPERIMENTS:
        own = configs.study(name).Config.model_json_schema(ref_template=f"#/$defs/{name}-{{model}}")
        definitions |= {f"{name}-{part}": schema for part, schema in own.pop("$defs", {}).items()}
        own["properties"]["quick"] = {"type": "array", "items": {"type": "string"}}
        choices.append({"if": {"properties": {"experiment": {"const": name}}}, "then": own})
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "required": ["experiment"],
        "properties": {"experiment": {"enum": list(configs.EXPERIMENTS)}},
        "allOf": choices,
        "$defs": definitions,
    }
    return json.dumps(schema, indent=1) + "\n"


def _title(model: type[BaseModel]) -> str:
    """A part by its name and the study that it is of: several studies have a `Data`."""
    return f"{model.__module__.rpartition('.')[2]}.{model.__name__}"


def _words(model: type[BaseModel]) -> str:
    return " ".join(inspect.cleandoc(model.__doc__ or "").split())


def _parts(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The parts of a config, and theirs."""
    for field in model.model_fields.values():
        for part in _models(field.annotation):
            yield part
            yield from _parts(part)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _table(model: type[BaseModel]) -> str:
    lines = ["| key | type | default | example |", "| --- | --- | --- | --- |"]
    comments = _comments(model)
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        note = f" ({comments[name]})" if name in comments else ""
        kind = _kind(field.annotation) + _range(field.metadata)
        cells = (f"`{name}`", kind + note, default, f"`{name}: {_example(model, name, field)}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _comments(model: type[BaseModel]) -> dict[str, str]:
    """What the source says at the end of a key's line."""
    found = {}
    for parent in reversed(model.__mro__):
        if issubclass(parent, BaseModel) and parent.__module__.startswith("experiments"):
            for match in re.finditer(r"^    (\w+): .*?  # (.+)$", inspect.getsource(parent), re.MULTILINE):
                found[match[1]] = match[2]
    return found


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its own"
    if value is None or value in ("", (), {}):
        return "none"
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _kind(inner[0]) + _range(inner[1:])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _kind(part) for part in inner)
    if origin is tuple:
        return (
            f"list of {_kind(inner[0])}"
            if inner[-1] is Ellipsis
            else f"list of {len(inner)}: {_kind(inner[0])}"
        )
    if origin is dict:
        return f"mapping of {_kind(inner[0])} to {_kind(inner[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"part `{_title(annotation)}`"
    words = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        Path: "path",
        Any: "anything",
    }
    return words.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _range(metadata: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    parts = [part for own in metadata for part in (getattr(own, "metadata", None) or [own])]
    found = [
        f"{sign} {getattr(part, name)}"
        for part in parts
        for name, sign in signs.items()
        if getattr(part, name, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def _example(model: type[BaseModel], name: str, field: Any) -> str:
    default = field.default
    if name == "experiment" or (default is PydanticUndefined and get_origin(field.annotation) is Literal):
        return str(get_args(field.annotation)[0])
    own = next(
        (key for key in (f"{_title(model)}.{name}", f"{model.__name__}.{name}") if key in EXAMPLES), name
    )
    if own != name:
        return EXAMPLES[own]
    if name in EXAMPLES and (default is PydanticUndefined or default in (None, "", ()) or name in ("test",)):
        return EXAMPLES[name]
    if isinstance(default, bool):
        return str(not default).lower()
    if isinstance(default, (int, float, str)) and default != "":
        return str(default)
    if isinstance(default, tuple) and default:
        return f"[{', '.join(map(str, default))}]"
    return EXAMPLES.get(
        name,
        "{}"
        if next(iter(_models(field.annotation)), None) or get_origin(field.annotation) is dict
        else "...",
    )
