"""Configs: a YAML file per experiment, checked whole before anything runs, changed by `key=value` or `~key` on the command line."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from experiments import provenance
from gradmatch.common.yamltext import load_yaml
from gradmatch.estimators import names


class ConfigError(ValueError):
    """A config that cannot be run: says the file, the path to the key, and what to write instead."""


class Strict(BaseModel):
    """A part of a config: immutable; a key that it does not know, and a number that is not finite, are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Values = TypeVar("Values", bound=Sequence[Any])


def different(values: Values) -> Values:
    """The values, each of which may stand once. Raises ValueError."""
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"{twice[0]!r} stands twice in {list(values)}; each may stand once")
    return values


Count = Annotated[int, Field(gt=0)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], AfterValidator(different)]
Weights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], AfterValidator(different)]  # to try
Pair = Annotated[tuple[str, str], AfterValidator(different)]  # of what is compared


class Lora(Strict):
    """Adapters of low rank instead of all weights; merged into the model when the training ends.

    targets: names of the layers; empty: every linear layer but the head, which is trained whole.
    """

    rank: Count = 8
    alpha: float = Field(default=16.0, gt=0)
    targets: tuple[str, ...] = ()


class Training(Strict):
    """One fine-tuning run: AdamW (0.9, 0.999), linear warm-up, cosine decay, no dropout, clipping at 1."""

    steps: Count
    learning_rate: float = Field(gt=0)
    batch_size: Count = 32
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    lora: Lora | None = None


class Study(Strict):
    """What every experiment's config holds. `name` decides the file of its records; empty: the config file's name.

    workers: processes that share its stages, unless the command says otherwise.
    """

    experiment: str
    name: str = ""
    workers: Count = 1
    wandb: bool = False  # a run of Weights & Biases a model and seed; WANDB_MODE=offline needs no network

    @field_validator("name")
    @classmethod
    def _a_files(cls, name: str) -> str:
        if name != Path(name).name or name.startswith("."):
            raise ValueError(f"{name!r} cannot name the file of the records: write a name without folders")
        return name


# Each is a module with `Config` (a Study), `stages(config)`, `records(config, store)` and `report(records)`.
EXPERIMENTS = {
    "adding": "experiments.studies.adding",
    "assumption": "experiments.studies.assumption",
    "claims": "experiments.studies.claims",
    "curvature": "experiments.studies.curvature",
    "diagnosis": "experiments.studies.diagnosis",
    "forecast": "experiments.studies.forecast",
    "language": "experiments.studies.language",
    "mixture": "experiments.studies.mixture",
    "rebasin": "experiments.studies.rebasin",
    "redundancy": "experiments.studies.redundancy",
    "removal": "experiments.studies.removal",
    "removal-proof": "experiments.studies.removal_proof",
    "search": "experiments.studies.search",
    "sentiment": "experiments.studies.sentiment",
    "texts": "experiments.studies.sentiment",
    "theory": "experiments.studies.theory",
    "unlearning": "experiments.studies.unlearning",
    "vision": "experiments.studies.vision",
    "zoo": "experiments.studies.zoo",
}


def read(path: Path) -> dict[str, Any]:
    """The keys of a config file, unchecked. Raises ConfigError where there is no file, or where it holds no keys."""
    if str(path) in _recorded:
        return copy.deepcopy(dict(_recorded[str(path)]))
    if not path.is_file():
        beside = [str(file) for file in path.parent.glob("*.yaml")]
        raise ConfigError(f"no config at {path}{names.nearest(path, beside)}")
    content = _yaml(path.read_bytes(), str(path))
    if content is None:
        raise ConfigError(f"{path} is empty: its first key is `experiment`, one of {', '.join(EXPERIMENTS)}")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, but holds {type(content).__name__}")
    return content


def _yaml(text: str | bytes, where: str) -> Any:
    try:
        return load_yaml(text, where)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def load(path: Path, overrides: Sequence[str] = (), *, quick: bool = False) -> Any:
    """The checked config of a YAML file, with overrides applied: `a.b=value` sets a key, `~a.b` takes it out.

    quick: first those of the config's own list `quick`.

    A config is named after its file; overrides add a short hash to the name, so that its records do not replace the
    file's own. Raises ConfigError.
    """
    return check(content_of(path, overrides, quick=quick), str(path))


def content_of(path: Path, overrides: Sequence[str] = (), *, quick: bool = False) -> dict[str, Any]:
    """What `load` checks: the keys of a file with overrides applied, its name among them."""
    content = read(path)
    name = str(content.get("name") or path.stem)
    small = content.pop("quick", [])
    if not isinstance(small, list) or not all(isinstance(override, str) for override in small):
        raise ConfigError(f"{path}: quick: must be a list of key=value, as [data.test=100] (found {small!r})")
    if quick and not small:
        raise ConfigError(f"{path} has no quick variant: no list `quick` of key=value")
    if quick:
        name += "-quick"
    for override in [*(small if quick else ()), *overrides]:
        _apply(content, override, str(path))
    overrides = [override for override in overrides if not override.startswith("wandb=")]  # changes no number
    if overrides and content.get("name", name) == name:
        name += "-" + hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
        content["name"] = name
    content.setdefault("name", name)
    return content


def made_of(path: Path, overrides: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """What a study was made of, for its record: file, overrides, the keys that came out, and the configs that these name."""
    content = content_of(path, overrides, quick=quick)
    sources: dict[str, Any] = {}
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif (
            isinstance(value, str)
            and value.endswith(".yaml")
            and value not in sources
            and Path(value).is_file()
        ):
            sources[value] = read(Path(value))
            waiting.append(sources[value])
    return {
        "file": str(path),
        "overrides": list(overrides),
        "quick": quick,
        "content": content,
        "sources": sources,
    }


def from_record(study: Mapping[str, Any]) -> Any:
    """The checked config of a study's record; the configs that it names are taken from the record, whatever the files hold now."""
    _recorded.clear()
    _recorded.update(study["sources"])
    return check(study["content"], f"the record of {study['file']}")


_recorded: dict[str, Any] = {}  # file -> its keys, of a record that is run again


def check(content: Mapping[str, Any], where: str) -> Any:
    """Validate a mapping as the config of the experiment it names. Raises ConfigError with every fault found."""
    if "experiment" not in content:
        raise ConfigError(f"{where}: experiment: missing; write one of {', '.join(EXPERIMENTS)}")
    experiment = content["experiment"]
    if not isinstance(experiment, str) or experiment not in EXPERIMENTS:
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


def records(config: Study, store: Path) -> list[dict[str, Any]]:
    """The records of a config's study, each with the study's name, the config's, and its digest.

    One that is computed from several stages carries what computed it: commit, versions and machine.
    """
    named, own = {"experiment": config.experiment, "name": config.name}, {"config": digest(config)}
    here = {"commit": provenance.commit(), "versions": provenance.versions(), "machine": provenance.machine()}
    found = study(config.experiment).records(config, store)
    return [({} if "commit" in record else here) | named | record | own for record in found]


def study(experiment: str) -> Any:
    """The module of an experiment."""
    return importlib.import_module(EXPERIMENTS[experiment])


def _apply(content: dict[str, Any], override: str, where: str) -> None:
    """Set `a.b=value` in nested mappings, the value read as YAML; `~a.b` deletes a key."""
    key, equals, value = override.partition("=")
    deletes = key.startswith("~") and not equals
    key = key.removeprefix("~") if deletes else key
    if not key or not (equals or deletes):
        raise ConfigError(
            f"{where}: cannot read {override!r}: overrides are written key=value, as data.test=100, or ~key to leave a key out"
        )
    *parents, last = key.split(".")
    here: Any = content
    for parent in parents:
        if deletes and parent not in here:
            raise ConfigError(_nothing_to_leave_out(where, override, parent, here))
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise ConfigError(f"{where}: {override!r}: {parent} is no mapping, so it has no key {last!r}")
    if not deletes:
        here[last] = _yaml(value, f"{where}: {override!r}")
    elif last not in here:
        raise ConfigError(_nothing_to_leave_out(where, override, last, here))
    else:
        del here[last]


def _nothing_to_leave_out(where: str, override: str, key: str, known: Mapping[str, Any]) -> str:
    return f"{where}: {override!r}: there is no key {key!r} to leave out{nearest(key, known)}"


def _faults(error: ValidationError, model: type[BaseModel], where: str) -> Iterator[str]:
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = list(_fields_at(model, fault["loc"][:-1]))
            yield f"{where}: {path}: unknown key{nearest(str(fault['loc'][-1]), known)}"
        elif fault["type"] == "tuple_type":
            example = "[0, 1]" if isinstance(fault["input"], (int, float)) else "[a, b]"
            yield f"{where}: {path}: must be a list, as {example} (found {fault['input']!r})"
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


def under(key: str, given: Any) -> Any:
    """A mapping whose bare texts are short for `{key: text}`; anything else as it is, for the schema to refuse."""
    if not isinstance(given, dict):
        return given
    return {name: {key: own} if isinstance(own, str) else own for name, own in given.items()}


def nearest(name: str, known: Iterable[Any]) -> str:
    """What to say after an unknown name: the nearest known one, or all of them."""
    told = [str(one) for one in known]
    return names.nearest(name, told) or f"; known: {', '.join(told) or 'none'}"
