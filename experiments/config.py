"""Configs: a YAML file per experiment, checked whole before anything runs, changed by `key=value` or `~key` on the command line."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class ConfigError(ValueError):
    """A config that cannot be run: says the file, the path to the key, and what to write instead."""


class Strict(BaseModel):
    """A part of a config: immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Training(Strict):
    """One fine-tuning run: AdamW (0.9, 0.999), linear warm-up, cosine decay, no dropout, clipping at 1."""

    steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(default=32, gt=0)
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)


class Study(Strict):
    """What every experiment's config holds. `name` decides the file of its records; empty: the config file's name.

    workers: processes that share its stages, unless the command says otherwise.
    """

    experiment: str
    name: str = ""
    workers: int = Field(default=1, gt=0)
    wandb: bool = False


# Each is a module with `Config` (a Study), `stages(config)`, `records(config, store)` and `report(records)`.
EXPERIMENTS = {
    "adding": "experiments.studies.adding",
    "assumption": "experiments.studies.assumption",
    "claims": "experiments.studies.claims",
    "curvature": "experiments.studies.curvature",
    "diagnosis": "experiments.studies.diagnosis",
    "forecast": "experiments.studies.forecast",
    "redundancy": "experiments.studies.redundancy",
    "removal": "experiments.studies.removal",
    "removal-proof": "experiments.studies.removal_proof",
    "search": "experiments.studies.search",
    "sentiment": "experiments.studies.sentiment",
    "theory": "experiments.studies.theory",
    "vision": "experiments.studies.vision",
}


def read(path: Path) -> dict[str, Any]:
    """The keys of a config file, unchecked. Raises ConfigError where there is no file, or where it holds no keys."""
    if not path.is_file():
        near = get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(
            f"no config at {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, but holds {type(content).__name__}")
    return content


def load(path: Path, overrides: Sequence[str] = (), *, quick: bool = False) -> Any:
    """The checked config of a YAML file, with overrides applied: `a.b=value` sets a key, `~a.b` takes it out.

    quick: first those of the config's own list `quick`.

    A config is named after its file; overrides add a short hash to the name, so that its records do not replace the
    file's own. Raises ConfigError.
    """
    content = read(path)
    name = content.get("name") or path.stem
    small = content.pop("quick", ())
    if quick and not small:
        raise ConfigError(f"{path} has no quick variant: no list `quick` of key=value")
    if quick:
        name += "-quick"
    for override in [*(small if quick else ()), *overrides]:
        _apply(content, override)
    overrides = [override for override in overrides if not override.startswith("wandb=")]  # changes no number
    if overrides and content.get("name", name) == name:
        name += "-" + hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
        content["name"] = name
    content.setdefault("name", name)
    return check(content, str(path))


def check(content: Mapping[str, Any], where: str) -> Any:
    """Validate a mapping as the config of the experiment it names. Raises ConfigError with every fault found."""
    experiment = content.get("experiment")
    if experiment not in EXPERIMENTS:
        raise ConfigError(
            f"{where}: experiment: unknown {experiment!r}{nearest(str(experiment), EXPERIMENTS)}"
        )
    model = study(experiment).Config
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, model, where))) from error


def digest(config: Study) -> str:
    """Hash of the keys that decide a config's numbers: its records carry it, so that they are known after the config changed."""
    content = config.model_dump(mode="json", exclude_defaults=True, exclude={"name", "workers", "wandb"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def study(experiment: str) -> Any:
    """The module of an experiment."""
    return importlib.import_module(EXPERIMENTS[experiment])


def _apply(content: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in nested mappings, the value read as YAML; `~a.b` deletes a key."""
    key, equals, value = override.partition("=")
    deletes = key.startswith("~") and not equals
    key = key.removeprefix("~") if deletes else key
    if not key or not (equals or deletes):
        raise ConfigError(
            f"cannot read {override!r}: overrides are written key=value, as data.test=100, or ~key to leave a key out"
        )
    *parents, last = key.split(".")
    here: Any = content
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise ConfigError(f"{override!r}: {parent} is no mapping, so it has no key {last!r}")
    if not deletes:
        here[last] = yaml.safe_load(value)
    elif last not in here:
        raise ConfigError(f"{override!r}: there is no key {last!r} to leave out{nearest(last, here)}")
    else:
        del here[last]


def _faults(error: ValidationError, model: type[BaseModel], where: str) -> Iterator[str]:
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = list(_fields_at(model, fault["loc"][:-1]))
            yield f"{where}: {path}: unknown key{nearest(str(fault['loc'][-1]), known)}"
        else:
            value = "" if fault["type"] in ("missing", "value_error") else f" (found {fault['input']!r})"
            yield f"{where}: {path + ': ' if path else ''}{fault['msg'].removeprefix('Value error, ')}{value}"


def _fields_at(model: Any, location: Sequence[int | str]) -> Mapping[str, Any]:
    """Fields of the part of a config at a path; mappings of parts (merges.GM) are followed through their value type."""
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation
        else:
            model = model.__args__[-1]
        if isinstance(model, UnionType):  # a part that may be absent: Sweep | None
            model = model.__args__[0]
    return model.model_fields


def nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """What to say after an unknown name: the nearest known one, or all of them."""
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
