"""The models of a zoo by name: given one by one, or found in folders; what holds none is listed with its reason."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.adapter_config import CONFIG
from gradmatch.models.files import INDEX, PICKLES
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Task, is_model

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

Models = Union["Mapping[str, Model]", "Sequence[Model | Task]", str, "os.PathLike[str]"]
DEEPEST = 4  # folders below a named one in which models are looked for
UNFINISHED = ".partial"


@dataclass
class Found:
    """What a zoo consists of.

    Attributes:
        tasks: name -> task (model, curvature file where one was given).
        opened: name -> the model, opened, an adapter on its base.
        skipped: place -> why no model was read there.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    opened: dict[str, Checkpoint] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def find(models: Models, base: Checkpoint | None = None, *, allow_pickle: bool = False) -> Found:
    """Open every model of a zoo; of folders those that lie in them.

    A model that is named must be one. What is found in a folder and cannot be opened is skipped, with the reason.

    Args:
        models: name -> model; or a list of models, tasks and folders with models in them; or one such folder.
        base: what adapters are expanded on; None: the base that each names.
        allow_pickle: read .bin and .pt files too.

    Raises:
        GradmatchError: no model at all, or one that is named twice.
        FileNotFoundError: a named model is not there.
        TypeError: something that is no model.

    >>> import torch
    >>> sorted(find({"a": {"w": torch.ones(2)}, "b": {"w": torch.zeros(2)}}).opened)
    ['a', 'b']
    """
    found = Found()
    places: list[Path] = []
    called: set[str] = set()
    for name, one in _given(models):
        task = one if isinstance(one, Task) else Task(one, name=name)
        name = name or task.name
        if not name and isinstance(task.model, (str, os.PathLike)):
            folder = Path(task.model).expanduser()
            if folder.is_dir() and not _holds_weights(folder) and not task.curvature:
                places += _inside(folder, found, base, allow_pickle)
                continue
            places.append(folder)
            found.tasks[str(folder)] = task
            found.opened[str(folder)] = open_checkpoint(task.model, base=base, allow_pickle=allow_pickle)
            continue
        name = name or f"model {len(found.tasks) + 1}"
        if name in called:
            raise GradmatchError(
                f"two models are called {name!r}; give each a name of its own", "bad_tasks", name
            )
        called.add(name)
        found.tasks[name] = task
        found.opened[name] = open_checkpoint(task.model, base=base, allow_pickle=allow_pickle)
    short = short_names(places)
    twice = [name for name in short.values() if name in called]
    if twice or len(short) < len(places):
        name = twice[0] if twice else str(max(places, key=places.count))
        raise GradmatchError(f"{name} is given twice; each model is one of the zoo once", "bad_tasks", name)
    names = {str(place): name for place, name in short.items()}
    found.tasks = {names.get(name, name): task for name, task in found.tasks.items()}
    found.opened = {names.get(name, name): model for name, model in found.opened.items()}
    if not found.opened:
        why = next(iter(found.skipped.items()), None)
        more = f" ({why[0]}: {why[1]})" if why else ""
        raise GradmatchError(
            f"no model was found{more}; name folders with models, or folders of such folders", "bad_tasks"
        )
    return found


def _given(models: Any) -> Iterator[tuple[str, Any]]:
    """(name or "", model) of whatever form the models come in."""
    if isinstance(models, (str, os.PathLike, Task)):
        yield "", models
        return
    if isinstance(models, Mapping):
        if models and all(hasattr(value, "dtype") and hasattr(value, "shape") for value in models.values()):
            raise TypeError("models is one state dict; give a table of models by name, or a list of them")
        pairs: Any = models.items()
    elif isinstance(models, Sequence):
        pairs = (("", one) for one in models)
    else:
        raise TypeError(
            f"models is a {type(models).__name__}; give a list of models, a table of models by name, or a folder"
        )
    for name, one in pairs:
        if not isinstance(one, Task) and not is_model(one):
            raise TypeError(
                f"{name or 'an entry of models'} is a {type(one).__name__}; a model is a path, a hub id, a state dict, a module or a Task"
            )
        yield str(name), one


def _inside(folder: Path, found: Found, base: Checkpoint | None, allow_pickle: bool) -> list[Path]:
    """The models below a folder, opened into `found`, and their paths; nothing but models is an error of its own."""
    places: list[Path] = []

    def look(place: Path, depth: int) -> bool:
        """Whether a model, or a reason for none, was found here or below."""
        if place.name.endswith((UNFINISHED, ".replaced")):
            found.skipped[str(place)] = "the unfinished output of a merge"
            return True
        if depth and _holds_weights(place):
            if measured := _curvatures_alone(place):
                found.skipped[str(place)] = f"holds the curvature file {measured} and no model"
                return True
            try:
                found.opened[str(place)] = open_checkpoint(place, base=base, allow_pickle=allow_pickle)
            except (ValueError, OSError) as error:
                found.skipped[str(place)] = str(error)
            else:
                found.tasks[str(place)] = Task(str(place))
                places.append(place)
            return True
        children = sorted(child for child in place.iterdir() if child.is_dir() and child.name[0] not in "._")
        told = [look(child, depth + 1) for child in children] if depth < DEEPEST else []
        if not any(told):
            holds = (
                "holds a config.json and no weights"
                if (place / "config.json").is_file()
                else "holds no model"
            )
            found.skipped[str(place)] = holds
        return True

    look(folder, 0)
    return places


def _holds_weights(folder: Path) -> bool:
    """Whether files of weights lie in the folder itself."""
    if (folder / INDEX).is_file() or (folder / CONFIG).is_file():
        return True
    return any(
        file.suffix == ".safetensors" or (file.suffix in PICKLES and "model" in file.name)
        for file in folder.iterdir()
    )


def _curvatures_alone(folder: Path) -> str:
    """The name of a curvature file where a folder's weights are nothing else; "" otherwise."""
    files = sorted(folder.glob("*.safetensors"))
    try:
        alone = [file for file in files if "num_examples" in TensorFile(file).metadata]
    except (ValueError, OSError):
        return ""
    return alone[0].name if alone and len(alone) == len(files) and not (folder / INDEX).is_file() else ""


def short_names(places: Sequence[Path]) -> dict[Path, str]:
    """Every path by its last part, or by as many as tell it from the others.

    >>> list(short_names([Path("a/model"), Path("b/model"), Path("c")]).values())
    ['a/model', 'b/model', 'c']
    """
    parts = {place: place.absolute().parts for place in places}
    names = {}
    for place, own in parts.items():
        others = [other for one, other in parts.items() if one != place]
        count = 1
        while count < len(own) and any(other[-count:] == own[-count:] for other in others):
            count += 1
        names[place] = "/".join(own[-count:])
    return names


def strays(model: Checkpoint) -> list[str]:
    """Files of weights in a model's folder that its index does not name, and that are not read."""
    folder = model.path
    if folder is None or not folder.is_dir() or not (folder / INDEX).is_file():
        return []
    read = {file.path.name for name in model.store for file, _, _ in model.store.files(name)}
    return [file.name for file in sorted(folder.glob("*.safetensors")) if read and file.name not in read]
