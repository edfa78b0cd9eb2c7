"""What a mergekit recipe may hold: every key at every level, checked before anything is translated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradmatch.common.kinds import leaves
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest

KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "name", "random_seed",
)  # fmt: skip
EDITING = ("weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask")
METHODS = {  # with their parameters
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    **dict.fromkeys(
        ("task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"),
        EDITING,
    ),
    "model_stock": ("filter_wise",),
    "passthrough": ("scale",),
    "karcher": ("max_iter", "tol"),
    "sce": ("select_topk", "int8_mask"),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "nearswap": ("t",),
    "arcee_fusion": (),
}  # fmt: skip
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
ENTRIES = {  # what each entry of a list holds
    "models": ("model", "parameters"),
    "slices": ("sources", "parameters"),
    "sources": ("model", "layer_range", "parameters"),
}


def check_keys(content: Mapping[str, Any]) -> str:
    """Check a whole recipe; returns its method.

    Raises:
        ValueError: an unknown or missing key, method or parameter (the nearest is named), a value that is no list, table or
            layer range where one belongs, or DELLA with `rescale: false`, which we do not have.
    """
    _known(content, KEYS, "key")
    method = str(content["merge_method"])
    if method not in METHODS:
        raise GradmatchError(
            f"merge_method {method!r} is unknown here{nearest(method, METHODS)}; known are {', '.join(METHODS)}",
            "unknown_name",
        )
    if sum(kind in content for kind in ("models", "slices", "modules")) != 1:
        raise GradmatchError("give either models or slices (or modules of these)")
    for body in (content, _module(content)):
        _check_parameters(body, method)
        for kind in ("models", "slices"):
            if kind in body:
                _check_entries(kind, body[kind], method)
    return method


def _module(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one module of a recipe by modules."""
    if "modules" not in content:
        return {}
    modules = content["modules"]
    if not isinstance(modules, Mapping) or len(modules) != 1:
        count = len(modules) if isinstance(modules, Mapping) else 0
        raise GradmatchError(
            f"modules holds {count} modules; one is supported: merge the towers of a model one by one, with patterns as weights"
        )
    name, module = next(iter(modules.items()))
    if not isinstance(module, Mapping) or ("models" in module) == ("slices" in module):
        raise GradmatchError(f"the module {name!r} must hold either models or slices")
    _known(module, ("models", "slices", "parameters"), f"key of the module {name!r}")
    return module


def _check_entries(kind: str, entries: Any, method: str) -> None:
    """A list of entries of one kind, and the lists in them."""
    known = ENTRIES[kind]
    if not isinstance(entries, list) or not entries or not all(isinstance(one, Mapping) for one in entries):
        raise GradmatchError(
            f"{kind} is {entries!r}; it must be a list of at least one table of {', '.join(known)}"
        )
    for entry in entries:
        _known(entry, known, f"key of {kind}")
        for key in known:
            if key not in entry and key != "parameters":
                raise GradmatchError(f"an entry of {kind} has no {key}: {dict(entry)}")
        _check_parameters(entry, method)
        if "sources" in entry:
            _check_entries("sources", entry["sources"], method)
        layers = entry.get("layer_range", [0, 0])
        if not isinstance(layers, list) or [type(number) for number in layers] != [int, int]:
            raise GradmatchError(f"layer_range is {layers!r}; it must be two whole numbers, [first, last]")


def _check_parameters(entry: Mapping[str, Any], method: str) -> None:
    """The parameters of the recipe or of one entry."""
    parameters = entry.get("parameters")
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise GradmatchError(f"parameters is {parameters!r}; it must be a table")
    _known(parameters, METHODS[method], f"parameter of {method}")
    for name, setting in parameters.items():
        try:
            list(leaves(setting))
        except TypeError as error:
            raise GradmatchError(f"{name}: {error}") from error
        tables = [one for one in setting if isinstance(one, Mapping)] if isinstance(setting, list) else []
        if any("value" not in one for one in tables):
            raise GradmatchError(f"{name} has a filter without a value: {setting!r}")
    if method.startswith("della") and parameters.get("rescale") is False:
        raise GradmatchError(
            f"{method} with rescale: false is not supported; what stays is divided by its probability, so leave it out"
        )


def _known(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse keys that a table does not have."""
    for key in table:
        if key not in known:
            raise GradmatchError(
                f"unknown {what} {key!r}{nearest(key, known)}; known are {', '.join(known)}", "unknown_name"
            )
