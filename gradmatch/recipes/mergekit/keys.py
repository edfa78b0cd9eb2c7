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
METHODS = (
    "linear", "slerp", "nuslerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear",
    "breadcrumbs", "breadcrumbs_ties", "model_stock", "passthrough", "karcher", "sce",
    "multislerp", "nearswap", "arcee_fusion",
)  # fmt: skip
PARAMETERS = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "model_stock": ("filter_wise",),
    "passthrough": ("scale",),
    "karcher": ("max_iter", "tol"),
    "sce": ("select_topk", "int8_mask"),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "nearswap": ("t",),
    "arcee_fusion": (),
}
EDITING = ("weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
ENTRIES = {  # what each entry of a list holds
    "models": ("model", "parameters"),
    "slices": ("sources", "parameters"),
    "sources": ("model", "layer_range", "parameters"),
}


def check_keys(content: Mapping[str, Any], where: str) -> str:
    """Check a whole recipe; returns its method.

    Raises:
        ValueError: an unknown or missing key, method or parameter (the nearest is named), a value that is no list, table or
            layer range where one belongs, or DELLA with `rescale: false`, which we do not have.
    """
    _known(content, KEYS, "key", where)
    method = str(content["merge_method"])
    if method not in METHODS:
        raise GradmatchError(
            f"{where}: merge_method {method!r} is unknown here{nearest(method, METHODS)}; known are {', '.join(METHODS)}",
            "unknown_name",
            where,
        )
    if sum(kind in content for kind in ("models", "slices", "modules")) != 1:
        raise GradmatchError(
            f"{where}: give either models or slices (or modules of these)", "bad_recipe", where
        )
    for body in (content, _module(content, where)):
        _check_parameters(body, method, where)
        for kind in ("models", "slices"):
            if kind in body:
                _check_entries(kind, body[kind], method, where)
    return method


def _module(content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The one module of a recipe by modules.

    Raises:
        ValueError: several, of which each would be merged by itself, or one without models.
    """
    if "modules" not in content:
        return {}
    modules = content["modules"]
    if not isinstance(modules, Mapping) or len(modules) != 1:
        count = len(modules) if isinstance(modules, Mapping) else 0
        raise GradmatchError(
            f"{where}: modules holds {count} modules; one is supported: merge the towers of a model one by one, with patterns as weights",
            "bad_recipe",
            where,
        )
    name, module = next(iter(modules.items()))
    if not isinstance(module, Mapping) or ("models" in module) == ("slices" in module):
        raise GradmatchError(
            f"{where}: the module {name!r} must hold either models or slices", "bad_recipe", where
        )
    _known(module, ("models", "slices", "parameters"), f"key of the module {name!r}", where)
    return module


def _check_entries(kind: str, entries: Any, method: str, where: str) -> None:
    """A list of entries of one kind, and the lists in them."""
    known = ENTRIES[kind]
    if not isinstance(entries, list) or not entries or not all(isinstance(one, Mapping) for one in entries):
        raise GradmatchError(
            f"{where}: {kind} is {entries!r}; it must be a list of at least one table of {', '.join(known)}",
            "bad_recipe",
            where,
        )
    for entry in entries:
        _known(entry, known, f"key of {kind}", where)
        for key in known:
            if key not in entry and key != "parameters":
                raise GradmatchError(
                    f"{where}: an entry of {kind} has no {key}: {dict(entry)}", "bad_recipe", where
                )
        _check_parameters(entry, method, where)
        if "sources" in entry:
            _check_entries("sources", entry["sources"], method, where)
        layers = entry.get("layer_range", [0, 0])
        if not isinstance(layers, list) or [type(number) for number in layers] != [int, int]:
            raise GradmatchError(
                f"{where}: layer_range is {layers!r}; it must be two whole numbers, [first, last]",
                "bad_recipe",
                where,
            )


def _check_parameters(entry: Mapping[str, Any], method: str, where: str) -> None:
    """The parameters of the recipe or of one entry."""
    parameters = entry.get("parameters")
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise GradmatchError(
            f"{where}: parameters is {parameters!r}; it must be a table", "bad_recipe", where
        )
    _known(parameters, PARAMETERS.get(method, EDITING), f"parameter of {method}", where)
    for name, setting in parameters.items():
        try:
            list(leaves(setting))
        except TypeError as error:
            raise GradmatchError(f"{where}: {name}: {error}", "bad_recipe", where) from error
        tables = [one for one in setting if isinstance(one, Mapping)] if isinstance(setting, list) else []
        if any("value" not in one for one in tables):
            raise GradmatchError(
                f"{where}: {name} has a filter without a value: {setting!r}", "bad_recipe", where
            )
    if method.startswith("della") and parameters.get("rescale") is False:
        raise GradmatchError(
            f"{where}: {method} with rescale: false is not supported; what stays is divided by its probability, so leave it out",
            "bad_recipe",
            where,
        )


def _known(table: Mapping[str, Any], known: Sequence[str], what: str, where: str) -> None:
    """Refuse keys that a table does not have."""
    for key in table:
        if key not in known:
            raise GradmatchError(
                f"{where}: unknown {what} {key!r}{nearest(key, known)}; known are {', '.join(known)}",
                "unknown_name",
                where,
            )
