"""ZOO.yaml and PLAN.yaml: what is asked for, and what is going to be done; checked key by key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gradmatch.common.yamltext import load_yaml
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.models.reference import locate

Kind = TypeVar("Kind", bound=BaseModel)


class Strict(BaseModel):
    """A part of a file; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Entry(Strict):
    """A model, or a folder of models; a path alone is short for it."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_path(cls, given: Any) -> Any:
        return {"model": given} if isinstance(given, str) else given

    model: str
    curvature: str | None = None
    name: str = ""


class Scoring(Strict):
    """What merges are scored by: `data`, examples in files, or `tasks` of lm-eval."""

    data: dict[str, str] = Field(default_factory=dict)
    metric: str = "auto"
    text: list[str] = Field(default_factory=list)
    label: str | None = None
    split: str = "train"
    max_length: int | None = None
    tasks: list[str] = Field(default_factory=list)
    include: str | None = None
    shots: int | None = None
    chat: bool = False
    limit: int | None = None
    seed: int = 0
    batch_size: int = 32

    @model_validator(mode="after")
    def _one(self) -> Scoring:
        if bool(self.data) == bool(self.tasks):
            raise ValueError("give either `data: {NAME: FILE}` or `tasks: [NAME]` of lm-eval")
        return self

    def score(self, base: str) -> Any:
        """The score function, with the base's architecture and tokenizer."""
        if self.tasks:
            from gradmatch.zoo.tasks import OnTasks, parse_told

            return OnTasks(
                base, [parse_told(text) for text in self.tasks], include=self.include, limit=self.limit, shots=self.shots,
                seed=self.seed, chat=self.chat, batch_size=self.batch_size,
            )  # fmt: skip
        from gradmatch.zoo.scores import OnExamples

        return OnExamples(
            base, self.data, self.metric, text=self.text, label=self.label, split=self.split, limit=self.limit, seed=self.seed,
            max_length=self.max_length, batch_size=self.batch_size,
        )  # fmt: skip


class ZooFile(Strict):
    """What is asked for.

    models: models and folders of models. base: what they were fine-tuned from. score: see `Scoring`; it may come from Python instead.
    budget: evaluations for each family. threshold: least similarity of a family. methods: rules that are tried, the first on every set of models.
    options: of these rules, and policies of merge.
    """

    models: list[Entry] = Field(min_length=1)
    base: str
    score: Scoring | None = None
    budget: int = Field(default=5, ge=1)
    threshold: float = Field(default=0.95, ge=-1, le=1)
    methods: list[str] = Field(default=["linear"], min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)

    def located(self, folder: Path) -> ZooFile:
        """The same with paths from the file's folder."""
        models = [
            one.model_copy(
                update={
                    "model": locate(one.model, folder),
                    "curvature": locate(one.curvature, folder) if one.curvature else None,
                }
            )
            for one in self.models
        ]
        score = self.score and self.score.model_copy(
            update={
                "data": {name: locate(file, folder) for name, file in self.score.data.items()},
                "include": locate(self.score.include, folder) if self.score.include else None,
            }
        )
        return self.model_copy(update={"models": models, "base": locate(self.base, folder), "score": score})


class Planned(Strict):
    """One family: its members, best first by what is known without an evaluation, and who is left out."""

    members: list[Entry] = Field(min_length=2)
    left_out: dict[str, str] = Field(default_factory=dict)
    ranked_by: str = ""
    fingerprints: dict[str, str] = Field(default_factory=dict)


class PlanFile(Strict):
    """What is going to be done; edit it as you like: take members out, change their order, the budget, the methods."""

    version: int = 1
    base: str
    score: Scoring | None = None
    budget: int = Field(ge=1)
    methods: list[str] = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)
    families: list[Planned] = Field(default_factory=list)
    alone: dict[str, str] = Field(default_factory=dict)  # model -> why it is in no family
    skipped: dict[str, str] = Field(default_factory=dict)
    singles: list[Entry] = Field(
        default_factory=list
    )  # of those alone, who takes part in a mixture of the families' merges
    mixture: dict[str, Any] = Field(default_factory=dict)  # its settings; none: no mixture
    price: dict[str, Any] = Field(default_factory=dict)


def _absolute(path: str) -> str:
    """A path from the root where there is such a file; a hub id as it is."""
    return str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path


def as_yaml(plan: PlanFile) -> str:
    """A plan as text, without what it does not say; paths are absolute, so that it can lie anywhere."""
    import yaml

    content = plan.model_dump(mode="json", exclude_defaults=True)
    content["base"] = _absolute(content["base"])
    for family in content.get("families", ()):
        for one in family["members"]:
            one |= {key: _absolute(one[key]) for key in ("model", "curvature") if one.get(key)}
    told = content.get("score", {})
    told |= (
        {"data": {name: _absolute(file) for name, file in told["data"].items()}} if told.get("data") else {}
    )
    told |= {"include": _absolute(told["include"])} if told.get("include") else {}
    return "# gradmatch zoo run PLAN.yaml OUT\n" + yaml.safe_dump(content, sort_keys=False, width=120)


def described(plan: PlanFile) -> list[str]:
    """A plan in words: who is merged, who is left out and why, and what it costs."""
    lines = []
    for number, family in enumerate(plan.families, 1):
        names = ", ".join(one.name or one.model for one in family.members)
        lines.append(
            f"family {number}: {len(family.members)} models, ranked by {family.ranked_by or 'hand'}: {names}"
        )
        lines += [f"  left out {name}: {why}" for name, why in family.left_out.items()]
    lines += [f"in no family: {name}: {why}" for name, why in plan.alone.items()]
    lines += [f"skipped {place}: {why}" for place, why in plan.skipped.items()]
    if plan.mixture:
        who = ["the merge of each family", *(one.name or one.model for one in plan.singles)]
        lines.append(
            f"side by side: {', '.join(who)} ({', '.join(f'{key} {value}' for key, value in plan.mixture.items())})"
        )
    told = ", ".join(f"{what} {value}" for what, value in plan.price.items())
    lines.append(
        f"price: {told or 'unknown'} (budget {plan.budget} a family; methods {', '.join(plan.methods)})"
    )
    return lines


def read_file(path: str | os.PathLike[str], kind: type[Kind]) -> Kind:
    """A checked YAML file.

    Raises:
        FileNotFoundError: no such file.
        GradmatchError: not YAML, or keys or values that it cannot have; each is named.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"no file {place}")
    return checked(load_yaml(place.read_bytes(), str(place)), kind, str(place))


def checked(content: Any, kind: type[Kind], where: str) -> Kind:
    """A table as a file of some kind; errors name the key.

    Raises:
        GradmatchError: see `read_file`.
    """
    if not isinstance(content, Mapping):
        raise GradmatchError(f"{where} holds no table of keys", "bad_recipe", where)
    try:
        return kind.model_validate(dict(content))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "it"
            if problem["type"] == "extra_forbidden":
                known = _fields(kind, problem["loc"][:-1])
                lines.append(
                    f"unknown key {key!r}{nearest(problem['loc'][-1], known)}; known are {', '.join(known)}"
                )
            elif problem["type"] == "missing":
                lines.append(f"{key} is missing")
            else:
                lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
        raise GradmatchError(f"{where}: " + "; ".join(lines), "bad_recipe", where) from None


def _fields(kind: type[BaseModel], inside: tuple[int | str, ...]) -> list[str]:
    """The keys that the part of a file at some place has."""
    parts: dict[str, type[BaseModel]] = {
        "score": Scoring,
        "models": Entry,
        "members": Entry,
        "singles": Entry,
        "families": Planned,
    }
    found: type[BaseModel] = kind
    for part in inside:
        found = parts.get(str(part), found)
    return list(found.model_fields)
