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
from gradmatch.estimators.errors import GradmatchError, within
from gradmatch.models.reference import locate
from gradmatch.models.slices import Slice, stack
from gradmatch.models.task import Task
from gradmatch.recipes.mergekit.keys import EDITING, METHODS, RANDOM, check_keys
from gradmatch.recipes.mergekit.settings import Entry, Part, Source, layer_count, model_name, without_zeros

NORMALIZED = ("ties", "della")  # the methods where they normalise by default
TAKEN = {
    "ties": ("density",), "dare": ("density",), "della": ("density", "epsilon"), "breadcrumbs": ("density", "gamma"),
}  # fmt: skip
DEFAULTS = {"density": 1.0, "epsilon": 0.15, "gamma": 0.01}  # theirs, where none is given
SINGLE = {"passthrough": "source a slice"} | dict.fromkeys(
    ("nearswap", "arcee_fusion"), "model beside the base_model"
)
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
    with within(where, "bad_recipe"):
        return _translated(content, folder)


def _translated(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    method = check_keys(content)
    module: dict[str, Any] = next(iter((content.get("modules") or {}).values()), {})
    body = {**content, **module}
    shared = [one.get("parameters") or {} for one in (module, content) if one.get("parameters")]
    base = None if content.get("base_model") is None else model_name(content["base_model"])
    if "models" in body:
        part = _of_models(body["models"], base, shared, folder)
    else:
        part = _of_slices(body["slices"], method, base, shared, folder)
    settings = _tokenizer(content, part)
    if "random_seed" in content:
        settings["seed"] = content["random_seed"]
    dtype = content.get("out_dtype") or content.get("dtype")
    if dtype:
        settings["dtype"] = str(dtype)
    return {**settings, **_method(method, part)}


def _of_models(models: Any, base: str | None, shared: list[Mapping[str, Any]], folder: Path) -> Part:
    """Whole models."""
    entries = [
        Entry(name := model_name(one["model"]), locate(name, folder), (one.get("parameters") or {},))
        for one in models
    ]
    own = None if base is None else Entry(base, locate(base, folder), ({},))
    return Part(entries, own, [(0, None, {})], shared)


def _of_slices(
    slices: Any, method: str, base: str | None, shared: list[Mapping[str, Any]], folder: Path
) -> Part:
    """Layer slices: the k-th sources of all slices, stacked, are the k-th model; the base is stacked by itself."""
    counts = {len(one["sources"]) for one in slices}
    if len(counts) != 1:
        raise GradmatchError(f"the slices have {sorted(counts)} sources; all must have the same number")
    rows: list[list[Source]] = []
    own: list[Source] = []
    places: list[tuple[int, int | None, Mapping[str, Any]]] = []
    done = 0
    for one in slices:
        sources = [Source.of(source) for source in one["sources"]]
        lengths = {source.last - source.first for source in sources}
        if len(lengths) != 1:
            raise GradmatchError(
                f"a slice has sources of {sorted(lengths)} layers; all must be of one length"
            )
        if base is not None and method not in EQUALS:
            named = [source for source in sources if source.name == base]
            own.append(named[0] if named else replace(sources[0], name=base, parameters={}))
            sources = [source for source in sources if source.name != base]
        rows.append(sources)
        places.append((done, done + sum(lengths), one.get("parameters") or {}))
        done += sum(lengths)
    if len({len(sources) for sources in rows}) != 1:
        raise GradmatchError(
            "a slice names the base_model and another does not, or twice; name it once in each"
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


def _tokenizer(content: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """Their tokenizer and chat template as our policies."""
    found: dict[str, Any] = {}
    if content.get("chat_template"):
        found["chat_template"] = str(content["chat_template"])
    tokenizer = content.get("tokenizer")
    given = set(tokenizer or ()) - {"source"}
    if given:
        raise GradmatchError(f"of `tokenizer` only `source` is supported, not {sorted(given)}")
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
            f"tokenizer source {source!r} is none of the models; use base, union or one of them",
            "unknown_name",
        )
    return {**found, "tokenizer": _unique(entry, part.entries)}


def _method(method: str, part: Part) -> dict[str, Any]:
    """Base, tasks and options for one of their methods."""
    base, value, one, entries = part.base, part.value, part.one, part.entries
    others = [entry for entry in entries if base is None or entry.name != base.name]
    if method == "slerp":
        if base is None or len(others) != 1:
            raise GradmatchError("slerp takes two models, one of them the base_model")
        name = base.name if base.name != others[0].name else "base"
        tasks = [Task(base.model, name=name), Task(others[0].model, name=_unique(others[0], entries))]
        return {"base": base.model, "tasks": tasks, "method": method, "t": value("t", others[0], 0.5)}
    if method == "nuslerp":
        return _nuslerp(part, others)
    if method in EQUALS:
        others = list(entries)
        if method == "karcher" and base is not None and base.name not in {entry.name for entry in entries}:
            others.append(base)  # there the base counts as a model of its own
    elif base is None and method != "multislerp":
        raise GradmatchError(f"{method} needs a base_model")
    if method in SINGLE and len(others) != 1:
        raise GradmatchError(f"{method} takes one {SINGLE[method]}, got {len(others)}")
    options: dict[str, Any] = {}
    if method == "linear":
        options = {"normalize": bool(one("normalize", True))}
    elif method == "karcher":
        options = {"iterations": one("max_iter", 10), "tolerance": one("tol", 1e-5)}
    elif method == "passthrough":
        options = {"scale": value("scale", others[0], 1.0)}
    elif method == "multislerp":
        options = {"normalize_weights": bool(one("normalize_weights", True)), "eps": one("eps", 1e-8)}
        options["origin"] = "zero" if base is None else "base"
    elif method == "nearswap":
        options = {"t": value("t")}
        if options["t"] is None:
            raise GradmatchError("nearswap needs parameters: {t: ...}")
    elif method == "sce":
        options = {"select_topk": value("select_topk", default=1.0)}
    elif method == "model_stock":
        options = {"along": "rows" if one("filter_wise") else "tensor", "clamp": False}
    weighed = "weight" in METHODS[method]
    tasks = [
        Task(entry.model, None, value("weight", entry, 1.0) if weighed else 1.0, _unique(entry, entries))
        for entry in others
    ]
    translated = {"base": (base or others[0]).model, "tasks": tasks, "method": method, **options}
    return translated | (_editing(method, part, others, tasks) if METHODS[method] is EDITING else {})


def _nuslerp(part: Part, others: Sequence[Entry]) -> dict[str, Any]:
    """With a base: of task vectors; without: of the weights, at the position that the two weights give."""
    along = "tensor"
    if not part.one("nuslerp_flatten", True):  # where they flatten, row_wise plays no role
        along = "columns" if part.one("nuslerp_row_wise") else "rows"  # theirs run along the first axis
    if len(others) != 2:
        raise GradmatchError(f"nuslerp takes two models beside the base, got {len(others)}")
    weights = [part.value("weight", entry, 1.0) for entry in others]
    names = [_unique(entry, part.entries) for entry in others]
    if part.base is not None:
        tasks = [Task(one.model, None, w, n) for one, w, n in zip(others, weights, names, strict=True)]
        return {"base": part.base.model, "tasks": tasks, "method": "nuslerp", "along": along}
    if not all(isinstance(weight, (int, float)) for weight in weights):
        raise GradmatchError(f"nuslerp without a base_model takes one number as each weight, not {weights}")
    total = sum(weights)
    t = weights[1] / total if abs(total) > 1e-6 else 0.5
    tasks = [Task(one.model, name=name) for one, name in zip(others, names, strict=True)]
    return {"base": others[0].model, "tasks": tasks, "method": "slerp", "t": t, "along": along}


def _editing(method: str, part: Part, others: Sequence[Entry], tasks: Sequence[Task]) -> dict[str, Any]:
    """Task arithmetic with their sparsifiers and sign consensus; a density of its own goes with each task."""
    options: dict[str, Any] = {"scale": part.value("lambda", default=1.0)}
    normalize = bool(part.one("normalize", method in NORMALIZED))
    kind = method.partition("_")[0]
    votes = kind == "ties" or method in ("dare_ties", "della", "breadcrumbs_ties")
    edited = []
    for task, entry in zip(tasks, others, strict=True):
        own = {key: part.value(key, entry, DEFAULTS[key]) for key in TAKEN.get(kind, ())}
        weight = task.weight
        if any(number == 0 for number in numbers(own.get("density"))):
            if normalize and not votes:
                raise GradmatchError(
                    f"{method} with normalize and a density of 0 is not supported; set the weight to 0 there"
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
    transforms: list[dict[str, Any]] = [{kind: unscaled}] if kind in TAKEN else []
    if kind == "ties":
        transforms = [{"ties": {"trim": "tensor", "normalize": normalize, "cancelled": "positive"}}]
    elif votes:
        votes_of = {"density": 1.0, "trim": "tensor", "normalize": normalize, "cancelled": "positive"}
        transforms.append({"ties": votes_of})
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
