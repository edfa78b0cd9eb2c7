"""mergekit's recipes, translated: their keys, their precedence of parameters, their layer slices.

Where a method of theirs differs from ours on purpose, the translation says so in the plan's notes; the table stands in
`gradmatch/rules/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradmatch.common.files import locate
from gradmatch.common.settings import numbers, times
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.slices import Slice, stack
from gradmatch.models.task import Model, Task
from gradmatch.recipes.mergekit.keys import RANDOM, check_keys

NORMALIZED = ("ties", "della")  # the methods where they normalise by default
DEFAULTS = {"density": 1.0, "epsilon": 0.15, "gamma": 0.01}  # theirs, where none is given


def translate(content: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A mergekit recipe as keyword arguments of `gradmatch.merge`.

    Args:
        content: the YAML's content.
        folder: that relative paths are relative to.
        where: how to call the recipe in errors.

    Raises:
        ValueError: an unknown key, method or parameter (the nearest is named), or something of theirs that we do not have.
    """
    method = check_keys(content, where)
    entries, base = (_from_models if "models" in content else _from_slices)(content, folder, where)
    settings = _tokenizer(content, base, where)
    if "random_seed" in content:
        settings["seed"] = content["random_seed"]
    dtype = content.get("out_dtype") or content.get("dtype")
    if dtype:
        settings["dtype"] = str(dtype)
    shared = content.get("parameters") or {}
    return {**settings, **_method(method, entries, base, shared, where)}


Entry = tuple[str, Any, Mapping[str, Any]]  # name, model, parameters


def _from_models(
    content: Mapping[str, Any], folder: Path, where: str
) -> tuple[list[Entry], tuple[str, Any] | None]:
    """Whole models."""
    entries = [
        (_name(e["model"]), _model(_name(e["model"]), folder), e.get("parameters") or {})
        for e in content["models"]
    ]
    base = content.get("base_model")
    return entries, None if base is None else (_name(base), _model(_name(base), folder))


def _from_slices(
    content: Mapping[str, Any], folder: Path, where: str
) -> tuple[list[Entry], tuple[str, Any] | None]:
    """Layer slices: the k-th sources of all slices, stacked, are the k-th model."""
    slices = content["slices"]
    counts = {len(entry["sources"]) for entry in slices}
    if len(counts) != 1:
        raise ValueError(f"{where}: the slices have {sorted(counts)} sources; all must have the same number")
    stacks: list[list[Slice]] = [[] for _ in range(counts.pop())]
    names: list[list[str]] = [[] for _ in stacks]
    scales: list[dict[str, Any]] = [{} for _ in stacks]
    done = 0
    for entry in slices:
        lengths = {source["layer_range"][1] - source["layer_range"][0] for source in entry["sources"]}
        if len(lengths) != 1:
            raise ValueError(
                f"{where}: a slice has sources of {sorted(lengths)} layers; all must be of one length"
            )
        for position, source in enumerate(entry["sources"]):
            first, last = source["layer_range"]
            stacks[position].append(Slice(_model(_name(source["model"]), folder), int(first), int(last)))
            names[position].append(_name(source["model"]))
            parameters = {**(entry.get("parameters") or {}), **(source.get("parameters") or {})}
            if parameters and len(slices) > 1:
                parameters = {
                    k: _only_layers(v, done, done + lengths.copy().pop()) for k, v in parameters.items()
                }
            for key, value in parameters.items():
                scales[position][key] = [*scales[position].get(key, []), *value] if len(slices) > 1 else value
        done += lengths.pop()
    entries: list[Entry] = []
    for position, own in enumerate(stacks):
        defaults = content.get("parameters") or {}
        parameters = {k: _or_default(v, defaults.get(k), len(slices)) for k, v in scales[position].items()}
        entries.append((names[position][0], stack(own), parameters))
    base = content.get("base_model")
    if base is None:
        return entries, None
    match = next((entry for entry in entries if entry[0] == _name(base)), None)
    if match is None:
        layers = [Slice(_model(_name(base), folder), one.first, one.last) for one in stacks[0]]
        return entries, (_name(base), stack(layers))
    return entries, (match[0], match[1])


def _only_layers(value: Any, first: int, last: int) -> list[dict[str, Any]]:
    """A setting that holds in layers first to last of the output only.

    Raises:
        ValueError: a gradient, which would be interpolated over the slice.
    """
    if isinstance(value, list) and value and not isinstance(value[0], Mapping):
        raise ValueError(
            "a list over the layers of one slice among several is not supported; give one value a slice"
        )
    conditions = value if isinstance(value, list) else [{"value": value}]
    found = []
    for condition in conditions:
        part = condition.get("filter")
        found += [
            {
                "layer": index,
                "value": condition["value"],
                **({"filter": part} if part not in (None, "*") else {}),
            }
            for index in range(first, last)
        ]
    return found


def _or_default(value: Any, default: Any, slices: int) -> Any:
    """Settings by layer, with what holds elsewhere."""
    if slices == 1:
        return value
    return [*value, {"value": 1.0 if default is None else default}]


def _name(model: Any) -> str:
    """A model reference as text; their other form is {"model": {"path": ...}, "lora": {"path": ...}}.

    Raises:
        ValueError: a reference that is not understood.
    """
    if isinstance(model, Mapping):
        adapter = model.get("lora")
        model = model.get("path", model.get("model"))
        model = model.get("path") if isinstance(model, Mapping) else model
        if adapter:
            return f"{_name(model)}+{_name(adapter)}"
    if not isinstance(model, str):
        raise ValueError(f"a model is a path or a hub id, not {model!r}")
    return model


def _model(name: str, folder: Path) -> Model | Checkpoint:
    """What a reference stands for: a folder or hub id, or for "model+adapter" the adapter expanded on that model."""
    return locate(name, folder)


def _tokenizer(content: Mapping[str, Any], base: tuple[str, Any] | None, where: str) -> dict[str, Any]:
    """Their tokenizer_source as our policy; a model is understood where it is the base."""
    if content.get("chat_template"):
        raise ValueError(
            f"{where}: chat_template is not supported; put the template into the output's tokenizer yourself"
        )
    tokenizer = content.get("tokenizer") or {}
    if set(tokenizer) - {"source"}:
        raise ValueError(
            f"{where}: of `tokenizer` only `source` is supported, not {sorted(set(tokenizer) - {'source'})}"
        )
    source = content.get("tokenizer_source") or tokenizer.get("source")
    if isinstance(source, Mapping):
        source = _name(source)
    if source in (None, "base", base[0] if base else "base"):
        return {}
    if source == "union":
        return {"embeddings": "union"}
    raise ValueError(
        f"{where}: tokenizer source {source!r} is not supported; use base, union or the base_model"
    )


def _method(
    method: str, entries: Sequence[Entry], base: tuple[str, Any] | None, shared: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Base, tasks and options for one of their methods."""

    def value(entry: Entry, key: str, default: Any = None) -> Any:
        return theirs(entry[2].get(key, shared.get(key, default)))

    def task(entry: Entry, weight: Any = 1.0) -> Task:
        return Task(entry[1], weight=weight, name=_unique(entry, entries))

    others = [entry for entry in entries if base is None or entry[0] != base[0]]
    if method in ("linear", "karcher", "passthrough"):
        tasks = [task(entry, value(entry, "weight", 1.0)) for entry in entries]
        options: dict[str, Any] = {}
        if method == "linear":
            options["normalize"] = bool(shared.get("normalize", True))
        if method == "karcher":
            options = {"iterations": shared.get("max_iter", 10), "tolerance": shared.get("tol", 1e-5)}
        if method == "passthrough":
            if len(entries) != 1:
                raise ValueError(f"{where}: passthrough takes one source a slice, got {len(entries)}")
            options["scale"] = value(entries[0], "scale", 1.0)
        return {"base": base[1] if base else entries[0][1], "tasks": tasks, "method": method, **options}
    if method == "slerp":
        if base is None or len(others) != 1:
            raise ValueError(f"{where}: slerp takes two models, one of them the base_model")
        first = Task(base[1], name=base[0] if base[0] != others[0][0] else "base")
        return {
            "base": base[1],
            "tasks": [first, task(others[0])],
            "method": "slerp",
            "t": shared.get("t", value(others[0], "t", 0.5)),
        }
    if method == "nuslerp":
        return _nuslerp(others, base, value, task, shared, where)
    if base is None:
        raise ValueError(f"{where}: {method} needs a base_model")
    tasks = [task(entry, value(entry, "weight", 1.0)) for entry in others]
    if method == "model_stock":
        along = "rows" if shared.get("filter_wise") else "tensor"
        return {"base": base[1], "tasks": tasks, "method": "model_stock", "along": along}
    return {"base": base[1], **_editing(method, others, tasks, value, shared, where)}


def _nuslerp(
    others: Any, base: Any, value: Any, task: Any, shared: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """With a base: of task vectors; without: of the weights, at the position that the two weights give."""
    along = "tensor"
    if not shared.get("nuslerp_flatten", True):  # where they flatten, row_wise plays no role
        along = "columns" if shared.get("nuslerp_row_wise") else "rows"  # theirs run along the first axis
    if len(others) != 2:
        raise ValueError(f"{where}: nuslerp takes two models beside the base, got {len(others)}")
    weights = [value(entry, "weight", 1.0) for entry in others]
    if base is not None:
        tasks = [task(entry, weight) for entry, weight in zip(others, weights, strict=True)]
        return {"base": base[1], "tasks": tasks, "method": "nuslerp", "along": along}
    if not all(isinstance(weight, (int, float)) for weight in weights):
        raise ValueError(
            f"{where}: nuslerp without a base_model takes one number as each weight, not {weights}"
        )
    total = sum(weights)
    t = weights[1] / total if abs(total) > 1e-6 else 0.5
    tasks = [task(entry) for entry in others]
    return {"base": others[0][1], "tasks": tasks, "method": "slerp", "t": t, "along": along}


def _editing(
    method: str, others: Sequence[Entry], tasks: list[Task], value: Any, shared: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Task arithmetic with their sparsifiers and sign consensus; a density of its own goes with each task."""
    options: dict[str, Any] = {"scale": shared.get("lambda", 1.0)}
    normalize = bool(shared.get("normalize", method in NORMALIZED))
    kind = method.partition("_")[0]
    taken = {
        "ties": ("density",),
        "dare": ("density",),
        "della": ("density", "epsilon"),
        "breadcrumbs": ("density", "gamma"),
    }
    tasks = [
        replace(task, options=_own_options(taken.get(kind, ()), entry, value))
        for task, entry in zip(tasks, others, strict=True)
    ]
    own = {"rescale": "none"} if kind == "dare" and shared.get("rescale") is False else {}
    transforms: list[dict[str, Any]] = [{kind: own}] if kind in taken else []
    if kind == "ties":
        transforms = [{"ties": {"trim": "tensor", "normalize": normalize}}]
    elif method in ("dare_ties", "della", "breadcrumbs_ties"):
        transforms.append({"ties": {"density": 1.0, "trim": "tensor", "normalize": normalize}})
    elif normalize:
        options["normalize"] = True
    notes = []
    if method in RANDOM and not own:
        notes.append(
            f"{method}: what stays is divided by its probability (unbiased, as published); mergekit restores the tensor's L1 norm"
        )
    return {"tasks": tasks, "method": "task_arithmetic", "transforms": transforms, "notes": notes, **options}


def _own_options(keys: Sequence[str], entry: Entry, value: Any) -> dict[str, Any]:
    """Density, epsilon and gamma of one model.

    Their epsilon is half the width of the range of probabilities, the published one its whole width; at density 1 nothing
    is dropped whatever it is.
    """
    own = {key: value(entry, key, DEFAULTS[key]) for key in keys}
    if "epsilon" in own:
        keeps_all = any(number >= 1 for number in numbers(own["density"]))
        own["epsilon"] = 0.0 if keeps_all else times(own["epsilon"], 2.0)
    return own


def theirs(setting: Any) -> Any:
    """A gradient as mergekit reads it: outside the layers (also after the last one) its first value holds."""
    if isinstance(setting, list) and setting:
        if isinstance(setting[0], Mapping):
            return [{**entry, "value": theirs(entry["value"])} for entry in setting]
        return [{"layer": None, "value": setting[0]}, {"value": setting}]
    return setting


def _unique(entry: Entry, entries: Sequence[Entry]) -> str:
    """A task's name: the model's folder, or its whole reference where two folders are called the same."""
    short = Path(entry[0]).name
    clash = [other for other in entries if Path(other[0]).name == short]
    if len(clash) == 1:
        return short
    if [other[0] for other in entries].count(entry[0]) == 1:
        return entry[0]
    return f"{entry[0]} {[id(other) for other in entries].index(id(entry)) + 1}"
