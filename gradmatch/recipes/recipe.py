"""Recipes: a merge as a YAML file.

    base: path/to/base
    method: gradient_matching
    base_curvature: curvature/base.safetensors
    transforms: [dare, ties]            # edits of the task vectors, optional
    after: [svc]                        # edits of the merged update, optional
    options: {density: 0.5}             # of the method, the transforms and the edits
    dtype: float32
    align: weights                      # tasks of another beginning than the base's are brought into its order of units first
    weights: auto                       # instead of numbers: chosen by forecast, with --data or products: FILE
    tasks:
      - model: path/to/first
        curvature: curvature/first.safetensors
        weight: 1.0                     # or a list over the depth, or {"*mlp*": 0.7, "*": 0.3}
      - model: path/to/second
        curvature: curvature/second.safetensors

Relative paths are relative to the recipe. mergekit's files (`merge_method:`) are understood too, see `gradmatch.recipes.mergekit.translation`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from gradmatch.common.yamltext import load_yaml
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.models.reference import locate
from gradmatch.models.task import Task
from gradmatch.plan.request import Request
from gradmatch.rules import RULES
from gradmatch.rules.after import AFTER
from gradmatch.rules.edits import TRANSFORMS


class TaskRecipe(BaseModel):
    """One entry of `tasks`."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _of_a_path(cls, given: Any) -> Any:
        """A model by its path alone is a task of weight 1."""
        return {"model": given} if isinstance(given, str) else given

    model: str
    curvature: str | None = None
    weight: Any = 1.0  # Task and the plan say what it may be
    name: str = ""
    options: dict[str, Any] = Field(default_factory=dict)


class Sources(BaseModel):
    """What a recipe merges, and with which options of the method; the rest of its keys are the fields of `Request`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    base: str
    tasks: list[TaskRecipe] = Field(min_length=1)
    base_curvature: str | float | None = None
    weights: Literal["auto"] | None = None
    products: str | None = None
    align: str | dict[str, Any] | None = None  # gradmatch.rebasin says what it may be
    options: dict[str, Any] = Field(default_factory=dict)
    allow_mismatch: bool = False
    allow_pickle: bool = False

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Keyword arguments of `gradmatch.merge`, with paths taken from the recipe's folder."""
        tasks = [
            Task(
                locate(task.model, folder),
                _optional(task.curvature, folder),
                task.weight,
                task.name,
                task.options,
            )
            for task in self.tasks
        ]
        curvature = self.base_curvature
        align = self.align
        if isinstance(align, dict) and isinstance(align.get("data"), str):
            align = {**align, "data": locate(align["data"], folder)}
        chosen = {"weights": self.weights, "products": _optional(self.products, folder), "align": align}
        return {
            **{name: getattr(self, name) for name in SETTINGS},
            "base": locate(self.base, folder),
            "tasks": tasks,
            "base_curvature": _optional(curvature, folder) if isinstance(curvature, str) else curvature,
            "allow_mismatch": self.allow_mismatch,
            "allow_pickle": self.allow_pickle,
            **{name: value for name, value in chosen.items() if value is not None},
            **options_alone(self.options),
        }


KINDS = get_type_hints(Request)
SETTINGS: dict[str, Any] = {  # name -> (kind, default)
    one.name: (KINDS[one.name], one.default)
    for one in fields(Request)
    if one.name not in ("options", "notes")
}
Recipe: type[Sources] = create_model("Recipe", __base__=Sources, **SETTINGS)


NEEDED = "a recipe needs `base: MODEL` and `tasks:`, a list of models or of {model: ..., curvature: ..., weight: ...}"
OPTIONS = frozenset(
    option for known in (RULES, TRANSFORMS, AFTER) for one in known.values() for option in one.options
)
ARGUMENTS = frozenset(
    {*Recipe.model_fields, "out", "overwrite", "batches", "progress", "notes", "task", "data"}
)


def options_alone(options: Mapping[str, Any], also: Iterable[str] = ()) -> Mapping[str, Any]:
    """Options of a method as given, after a check that none of them is an argument of its own (`also`: more of these).

    Raises:
        ValueError: one is, and would change another part of the request.
    """
    for name in options:
        if name in ARGUMENTS or name in also:
            raise GradmatchError(
                f"{name!r} is no option of a method but a key (and flag) of its own; write it beside the options",
                "unknown_option",
                name,
            )
    return options


def load_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a recipe, ours or mergekit's, into keyword arguments of `gradmatch.merge`.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: not YAML, an unknown key (the nearest is named), a missing one, or a value of another kind.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder, a recipe is a YAML file; models go with flags: --base MODEL --task MODEL"
        )
    if not path.is_file():
        beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"no recipe {path}{nearest(path.name, beside)}")
    content = load_yaml(path.read_bytes(), str(path))
    if not isinstance(content, Mapping):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise GradmatchError(f"{path} holds {found}, a recipe is a table of keys", "bad_recipe", path)
    if "merge_method" in content:
        from gradmatch.recipes.mergekit.translation import translate

        return translate(dict(content), path.parent, str(path))
    if "experts" in content:
        raise GradmatchError(
            f"{path} describes a mixture of experts, and no merge; `gradmatch mix {path}` makes it",
            "bad_recipe",
            path,
        )
    return parse_recipe(content, path.parent, str(path))


def parse_recipe(content: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A recipe's content as keyword arguments of `gradmatch.merge`; `where` names it in errors.

    Raises:
        ValueError: see `load_recipe`.
    """
    try:
        return Recipe.model_validate(dict(content)).arguments(folder)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = TaskRecipe.model_fields if problem["loc"][0] == "tasks" else Recipe.model_fields
                last = str(problem["loc"][-1])
                if last in OPTIONS:
                    lines.append(
                        f"{key!r} is an option of the method or a transform: write options: {{{last}: ...}}"
                    )
                    continue
                lines.append(f"unknown key {key!r}{nearest(last, known)}; known are {', '.join(known)}")
            elif problem["type"] == "missing":
                lines.append(f"{key} is missing; {NEEDED}")
            elif key == "tasks":
                lines.append(f"tasks is {problem['input']!r}; {NEEDED}")
            else:
                lines.append(f"{key} is {problem['input']!r}: {problem['msg']}")
        raise GradmatchError(f"{where}: " + "; ".join(lines), "bad_recipe", where) from None


def _optional(path: str | None, folder: Path) -> str | None:
    return None if path is None else locate(path, folder)
