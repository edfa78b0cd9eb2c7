"""mergekit's recipes, translated: their methods, tokenizers and names of models; `settings` has their parameters.

Where a method of theirs differs from ours on purpose, the translation says so in the plan's notes; the table stands in
`gradmatch/rules/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradmatch.common.settings import numbers, times
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.reference import locate
from gradmatch.models.slices import Slice, stack
from gradmatch.models.task import Task
from gradmatch.recipes.mergekit.keys import RANDOM, check_keys
from gradmatch.recipes.mergekit.settings import Entry, Part, Source, layer_count, model_name, without_zeros

NORMALIZED = ("ties", "della")  # the methods where they normalise by default
DEFAULTS = {"density": 1.0, "epsilon": 0.15, "gamma": 0.01}  # theirs, where none is given
EQUALS = ("linear", "karcher", "passthrough")  # where the base_model is one of the models and nothing else


def translate(content: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A mergekit recipe as keyword arguments of `gradmatch.merge`.

    Args:
        content: the YAML's content.
        folder: that relative paths are relative to.
        where: how to call the recipe in errors.

    Raises:
        ValueError: an unknown key, method or parameter (the nearest is named), or something of theirs that we do not have.
    """
    try:
        return _translated(content, folder, where)
    except GradmatchError as error:
        if where in str(error):
            raise
        raise GradmatchError(f"{where}: {error.message}", error.code, error.where, error.remedy) from error


def _translated(content: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """See `translate`; what is refused does not always name the recipe."""
    method = check_keys(content, where)
    module: dict[str, Any] = next(iter((content.get("modules") or {}).values()), {})
    body = {**content, **module}
    shared = [one.get("parameters") or {} for one in (module, content) if one.get("parameters")]
    base = None if content.get("base_model") is None else model_name(content["base_model"])
    if "models" in body:
        part = _of_models(body["models"], base, shared, folder)
    else:
        part = _of_slices(body["slices"], method, base, shared, folder, where)
    settings = _tokenizer(content, part, where)
    if "random_seed" in content:
        settings["seed"] = content["random_seed"]
    dtype = content.get("out_dtype") or content.get("dtype")
    if dtype:
        settings["dtype"] = str(dtype)
    return {**settings, **_method(method, part, where)}


def _of_models(models: Any, base: str | None, shared: list[Mapping[str, Any]], folder: Path) -> Part:
    """Whole models."""
    entries = [
        Entry(name := model_name(one["model"]), locate(name, folder), (one.get("parameters") or {},))
        for one in models
    ]
    own = None if base is None else Entry(base, locate(base, folder), ({},))
    return Part(entries, own, [(0, None, {})], shared)


def _of_slices(
    slices: Any, method: str, base: str | None, shared: list[Mapping[str, Any]], folder: Path, where: str
) -> Part:
    """Layer slices: the k-th sources of all slices, stacked, are the k-th model; the base is stacked by itself."""
    counts = {len(one["sources"]) for one in slices}
    if len(counts) != 1:
        raise GradmatchError(
            f"{where}: the slices have {sorted(counts)} sources; all must have the same number",
            "bad_recipe",
            where,
        )
    rows: list[list[Source]] = []
    own: list[Source] = []
    places: list[tuple[int, int | None, Mapping[str, Any]]] = []
    done = 0
    for one in slices:
        sources = [Source.of(source) for source in one["sources"]]
        lengths = {source.last - source.first for source in sources}
        if len(lengths) != 1:
            raise GradmatchError(
                f"{where}: a slice has sources of {sorted(lengths)} layers; all must be of one length",
                "bad_recipe",
                where,
            )
        if base is not None and method not in EQUALS:
            named = [source for source in sources if source.name == base]
            own.append(named[0] if named else replace(sources[0], name=base, parameters={}))
            sources = [source for source in sources if source.name != base]
        rows.append(sources)
        places.append((done, done + lengths.copy().pop(), one.get("parameters") or {}))
        done += lengths.pop()
    if len({len(sources) for sources in rows}) != 1:
        raise GradmatchError(
            f"{where}: a slice names the base_model and another does not, or twice; name it once in each",
            "bad_recipe",
            where,
        )
    entries = [_stacked(list(column), folder) for column in zip(*rows, strict=True)]
    first = _stacked(own, folder) if own else None
    if base is not None and first is None:
        first = next((entry for entry in entries if entry.name == base), None)
    return Part(entries, first, places, shared)


def _stacked(sources: Sequence[Source], folder: Path) -> Entry:
    """One model of layers of several."""
    layers = [Slice(locate(one.name, folder), one.first, one.last) for one in sources]
    return Entry(sources[0].name, stack(layers), tuple(one.parameters for one in sources))


def _tokenizer(content: Mapping[str, Any], part: Part, where: str) -> dict[str, Any]:
    """Their tokenizer and chat template as our policies.

    Raises:
        ValueError: tokens with a source of their own, or the tokenizer of a model that is not merged.
    """
    found: dict[str, Any] = {}
    if content.get("chat_template"):
        found["chat_template"] = str(content["chat_template"])
    tokenizer = content.get("tokenizer")
    given = set(tokenizer or ()) - {"source"}
    if given:
        raise GradmatchError(
            f"{where}: of `tokenizer` only `source` is supported, not {sorted(given)}", "bad_recipe", where
        )
    source = content.get("tokenizer_source") or (tokenizer or {}).get("source")
    if source is None:
        return {**found, "embeddings": "union"} if tokenizer is not None else found
    if source == "union":
        return {**found, "embeddings": "union"}
    source = source if source == "base" else model_name(source)
    if source == "base" or (part.base is not None and source == part.base.name):
        return {**found, "tokenizer": "base"}
    entry = next((entry for entry in part.entries if entry.name == source), None)
    if entry is None:
        raise GradmatchError(
            f"{where}: tokenizer source {source!r} is none of the models; use base, union or one of them",
            "unknown_name",
            where,
        )
    return {**found, "tokenizer": _unique(entry, part.entries)}


def _method(method: str, part: Part, where: str) -> dict[str, Any]:
    """Base, tasks and options for one of their methods.

    Raises:
        ValueError: another number of models than the method takes, or no base_model where it needs one.
    """
    base, value = part.base, part.value
    entries = part.entries
    others = [entry for entry in entries if base is None or entry.name != base.name]

    def task(entry: Entry, weight: Any = 1.0) -> Task:
        return Task(entry.model, weight=weight, name=_unique(entry, entries))

    if method in EQUALS:
        if method == "karcher" and base is not None and len(others) == len(entries):
            entries = [*entries, base]  # there the base counts as a model of its own
        tasks = [task(entry, value("weight", entry, 1.0)) for entry in entries]
        options: dict[str, Any] = {}
        if method == "linear":
            options["normalize"] = bool(part.one("normalize", True))
        if method == "karcher":
            options = {"iterations": part.one("max_iter", 10), "tolerance": part.one("tol", 1e-5)}
        if method == "passthrough":
            if len(entries) != 1:
                raise GradmatchError(
                    f"{where}: passthrough takes one source a slice, got {len(entries)}", "bad_recipe", where
                )
            options["scale"] = value("scale", entries[0], 1.0)
        return {"base": (base or entries[0]).model, "tasks": tasks, "method": method, **options}
    if method == "slerp":
        if base is None or len(others) != 1:
            raise GradmatchError(
                f"{where}: slerp takes two models, one of them the base_model", "bad_recipe", where
            )
        first = Task(base.model, name=base.name if base.name != others[0].name else "base")
        tasks = [first, task(others[0])]
        return {"base": base.model, "tasks": tasks, "method": "slerp", "t": value("t", others[0], 0.5)}
    if method == "nuslerp":
        return _nuslerp(part, others, where)
    if method == "multislerp":
        options = {
            "normalize_weights": bool(part.one("normalize_weights", True)),
            "eps": part.one("eps", 1e-8),
            "origin": "zero" if base is None else "base",
        }
        tasks = [task(entry, value("weight", entry, 1.0)) for entry in others]
        return {"base": (base or others[0]).model, "tasks": tasks, "method": method, **options}
    if base is None:
        raise GradmatchError(f"{where}: {method} needs a base_model", "bad_recipe", where)
    if method in ("nearswap", "arcee_fusion"):
        if len(others) != 1:
            raise GradmatchError(
                f"{where}: {method} takes one model beside the base_model, got {len(others)}",
                "bad_recipe",
                where,
            )
        options = {"t": value("t", default=None)} if method == "nearswap" else {}
        if method == "nearswap" and options["t"] is None:
            raise GradmatchError(f"{where}: nearswap needs parameters: {{t: ...}}", "bad_recipe", where)
        return {"base": base.model, "tasks": [task(others[0])], "method": method, **options}
    if method == "sce":
        options = {"select_topk": value("select_topk", default=1.0)}
        return {"base": base.model, "tasks": [task(one) for one in others], "method": method, **options}
    if method == "model_stock":
        along = "rows" if part.one("filter_wise") else "tensor"
        tasks = [task(entry) for entry in others]
        return {"base": base.model, "tasks": tasks, "method": "model_stock", "along": along}
    tasks = [task(entry, value("weight", entry, 1.0)) for entry in others]
    return {"base": base.model, **_editing(method, part, others, tasks, where)}


def _nuslerp(part: Part, others: Sequence[Entry], where: str) -> dict[str, Any]:
    """With a base: of task vectors; without: of the weights, at the position that the two weights give."""
    along = "tensor"
    if not part.one("nuslerp_flatten", True):  # where they flatten, row_wise plays no role
        along = "columns" if part.one("nuslerp_row_wise") else "rows"  # theirs run along the first axis
    if len(others) != 2:
        raise GradmatchError(
            f"{where}: nuslerp takes two models beside the base, got {len(others)}", "bad_recipe", where
        )
    weights = [part.value("weight", entry, 1.0) for entry in others]
    names = [_unique(entry, part.entries) for entry in others]
    if part.base is not None:
        tasks = [Task(one.model, None, w, n) for one, w, n in zip(others, weights, names, strict=True)]
        return {"base": part.base.model, "tasks": tasks, "method": "nuslerp", "along": along}
    if not all(isinstance(weight, (int, float)) for weight in weights):
        raise GradmatchError(
            f"{where}: nuslerp without a base_model takes one number as each weight, not {weights}",
            "bad_recipe",
            where,
        )
    total = sum(weights)
    t = weights[1] / total if abs(total) > 1e-6 else 0.5
    tasks = [Task(one.model, name=name) for one, name in zip(others, names, strict=True)]
    return {"base": others[0].model, "tasks": tasks, "method": "slerp", "t": t, "along": along}


def _editing(
    method: str, part: Part, others: Sequence[Entry], tasks: Sequence[Task], where: str
) -> dict[str, Any]:
    """Task arithmetic with their sparsifiers and sign consensus; a density of its own goes with each task."""
    options: dict[str, Any] = {"scale": part.value("lambda", default=1.0)}
    normalize = bool(part.one("normalize", method in NORMALIZED))
    kind = method.partition("_")[0]
    taken = {
        "ties": ("density",),
        "dare": ("density",),
        "della": ("density", "epsilon"),
        "breadcrumbs": ("density", "gamma"),
    }
    votes = kind == "ties" or method in ("dare_ties", "della", "breadcrumbs_ties")
    edited = []
    for task, entry in zip(tasks, others, strict=True):
        own = {key: part.value(key, entry, DEFAULTS[key]) for key in taken.get(kind, ())}
        weight = task.weight
        if any(number == 0 for number in numbers(own.get("density"))):
            if normalize and not votes:
                raise GradmatchError(
                    f"{where}: {method} with normalize and a density of 0 is not supported; set the weight to 0 there",
                    "bad_recipe",
                    where,
                )
            density = part.value("density", entry, 1.0, layer_count(entry.model))
            weight, own["density"] = without_zeros(weight, density)
        if "epsilon" in own:
            # Their epsilon is half the width of the range of probabilities, the published one its whole width; at density 1
            # nothing is dropped whatever it is.
            keeps_all = any(number >= 1 for number in numbers(own["density"]))
            own["epsilon"] = 0.0 if keeps_all else times(own["epsilon"], 2.0)
        edited.append(replace(task, weight=weight, options=own))
    unscaled = {"rescale": "none"} if kind == "dare" and part.one("rescale", True) is False else {}
    transforms: list[dict[str, Any]] = [{kind: unscaled}] if kind in taken else []
    if kind == "ties":
        transforms = [{"ties": {"trim": "tensor", "normalize": normalize}}]
    elif votes:
        transforms.append({"ties": {"density": 1.0, "trim": "tensor", "normalize": normalize}})
    elif normalize:
        options["normalize"] = True
    notes = []
    if method in RANDOM and not unscaled:
        notes.append(
            f"{method}: what stays is divided by its probability (unbiased, as published); mergekit restores the tensor's L1 norm"
        )
    return {"tasks": edited, "method": "task_arithmetic", "transforms": transforms, "notes": notes, **options}


def _unique(entry: Entry, entries: Sequence[Entry]) -> str:
    """A task's name: the model's folder, or its whole reference where two folders are called the same."""
    short = Path(entry.name).name
    clash = [other for other in entries if Path(other.name).name == short]
    if len(clash) <= 1:
        return short
    if [other.name for other in entries].count(entry.name) == 1:
        return entry.name
    return f"{entry.name} {[id(other) for other in entries].index(id(entry)) + 1}"
