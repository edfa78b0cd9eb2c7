"""mergekit-evolve's configs, as arguments of `gradmatch.zoo.evolve`.

    genome: {models, merge_method, base_model, layer_granularity, normalize, allow_negative_weights, filters, smooth, tokenizer_source}
    tasks: [{name, weight: 1.0, metric: "acc,none"}]           lm-eval's; a negative weight where lower is better
    limit, num_fewshot, shuffle, random_init, apply_chat_template, fewshot_as_multiturn

Written from the schema of mergekit 0.1.5. What differs is told in the notes of the translation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.reference import locate
from gradmatch.zoo.planfile import read_file
from gradmatch.zoo.space import Space
from gradmatch.zoo.tasks import Told

if TYPE_CHECKING:
    from collections.abc import Mapping

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
DENSITY = ("ties", "dare_ties")


class Genome(BaseModel):
    """The `genome` of a config."""

    model_config = ConfigDict(extra="forbid")

    models: list[str] = Field(min_length=1)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = Field(default=0, ge=0)
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: list[str] | None = None
    smooth: bool = False


class Scored(BaseModel):
    """One of the `tasks`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    weight: float = 1.0
    metric: str = "acc,none"


class Config(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    genome: Genome
    tasks: list[Scored] = Field(min_length=1)
    limit: int | None = None
    num_fewshot: int | None = None
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True


@dataclass(frozen=True)
class Evolving:
    """What a config asks for.

    Attributes:
        base: the base model; where the config names none, the first model, which then plays no role.
        models: name -> path.
        space: to search.
        scored: lm-eval's tasks.
        start: "uniform" or "random".
        settings: of `gradmatch.zoo.tasks.OnTasks`.
        options: of `merge`.
        notes: what differs from mergekit.
    """

    base: str
    models: dict[str, str]
    space: Space
    scored: list[Told]
    start: str
    settings: dict[str, Any]
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_evolving(path: str | os.PathLike[str]) -> Evolving:
    """Read a config of mergekit-evolve.

    Raises:
        FileNotFoundError: no such file.
        GradmatchError: an unknown key, or a combination that cannot be searched; it is named.
    """
    return translate(read_file(path, Config), Path(path).expanduser().parent)


def translate(config: Config, folder: Path) -> Evolving:
    """A config as arguments; relative paths are taken from its folder.

    Raises:
        GradmatchError: SLERP of other than two models, a granularity that does not divide the layers, or a method without the base that it needs.
    """
    genome = config.genome
    method, notes = genome.merge_method, []
    if method == "slerp" and len(genome.models) != 2:
        raise GradmatchError(
            f"slerp goes between two models, and {len(genome.models)} are named; mergekit takes the two largest weights in every group, "
            "which is no single merge; name two",
            "bad_recipe",
            "models",
        )
    if method not in ("linear", "slerp") and genome.base_model is None:
        raise GradmatchError(f"{method} needs a base_model", "bad_recipe", "base_model")
    paths = [locate(model, folder) for model in genome.models]
    base = locate(genome.base_model, folder) if genome.base_model else paths[0]
    models: dict[str, str] = {}
    for model in paths:
        name = Path(model).name
        if name in models:
            name = model
        models[name] = model
    kept = {name: model for name, model in models.items() if model != base or method in ("linear", "slerp")}
    if len(kept) < len(models):
        notes.append("the base is among the models; it has no task vector, so its weight is not searched")
    opened = open_checkpoint(base)
    chosen: dict[str, Any] = {
        "filters": tuple(genome.filters or ()),
        "negative": genome.allow_negative_weights,
        "smooth": genome.smooth,
        "per_model": ("density",) if method in DENSITY else (),
        "normalize": genome.normalize
        if genome.normalize is not None
        else method in ("linear", "ties", "dare_ties"),
    }
    space = Space.of(opened, list(kept), method, **chosen)
    if genome.layer_granularity:
        count = len(space.layers)
        if not count or count % genome.layer_granularity:
            raise GradmatchError(
                f"layer_granularity is {genome.layer_granularity}, which does not divide the {count} layers",
                "bad_recipe",
                "layer_granularity",
            )
        space = Space.of(opened, list(kept), method, groups=count // genome.layer_granularity, **chosen)
    if config.limit is not None and not config.shuffle:
        notes.append(
            "with a limit, examples are drawn by the seed over the whole task; mergekit takes the first ones unless shuffle is set"
        )
    notes.append("weights are searched between their bounds; mergekit folds them by their absolute value")
    options: dict[str, Any] = {"dtype": "bfloat16"}
    if genome.tokenizer_source not in (None, "union", "base"):
        options["tokenizer"] = next(
            (n for n, p in models.items() if p == locate(str(genome.tokenizer_source), folder)),
            genome.tokenizer_source,
        )
    elif genome.tokenizer_source:
        options |= {"embeddings": "union"} if genome.tokenizer_source == "union" else {"tokenizer": "base"}
    settings: Mapping[str, Any] = {
        "limit": config.limit,
        "shots": config.num_fewshot,
        "chat": config.apply_chat_template,
        "multiturn": config.fewshot_as_multiturn,
    }
    return Evolving(
        base=base, models=kept, space=space, scored=[Told(one.name, one.metric, one.weight) for one in config.tasks],
        start="random" if config.random_init else "uniform", settings=dict(settings), options=options, notes=notes,
    )  # fmt: skip
