"""Recipes of mixtures, ours and mergekit-moe's, as keyword arguments of `gradmatch.mixture.mix`.

    base: path/to/base
    level: ffn                       # or block, model
    router: linear                   # or mlp, spectral
    method: averaging                # of what is not mixed
    experts:
      - model: path/to/first
        positive_prompts: [2 + 2 =, Solve for x]
      - model: path/to/second
        positive_prompts: [Once upon a time]
        negative_prompts: [Theorem]

A file of mergekit-moe has `base_model:` and `source_model:` instead and is run as it is: what is not mixed is the base's, a router of
Mixtral, Qwen2-MoE or Qwen3-MoE in their gate modes. Keys that are not known are refused, where mergekit-moe drops them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmatch.common.yamltext import load_yaml
from gradmatch.estimators.errors import GradmatchError, within
from gradmatch.estimators.names import nearest
from gradmatch.mixture.request import GATES
from gradmatch.models.reference import locate
from gradmatch.models.task import Task
from gradmatch.recipes.mergekit.settings import model_name
from gradmatch.recipes.recipe import OPTIONS, SETTINGS

OURS = (
    "base", "experts", "level", "routing", "router", "top_k", "dense_layers", "method", "gate_mode", "form", "rank", "gate_rank",
    "shared", "seed", "dtype", "options",
)  # fmt: skip
OUR_EXPERT = (
    "model",
    "name",
    "weight",
    "curvature",
    "positive_prompts",
    "negative_prompts",
    "noise_scale",
    "residual_scale",
)
THEIRS = (
    "base_model",
    "experts",
    "gate_mode",
    "dtype",
    "experts_per_token",
    "shared_experts",
    "architecture",
)
THEIR_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
ARCHITECTURES = {"mixtral": "mixtral", "qwen moe": "qwen2_moe", "qwen3 moe": "qwen3_moe", "deepseek moe": ""}
SCALES = ("noise_scale", "residual_scale")


def load_mixture(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a recipe of a mixture, ours or mergekit-moe's, into keyword arguments of `gradmatch.mixture.mix`.

    Raises:
        FileNotFoundError: no such file.
        GradmatchError: not YAML, an unknown key (the nearest is named), a missing one, or a value of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    content = load_yaml(path.read_bytes(), str(path))
    with within(path, "bad_recipe"):
        if not isinstance(content, Mapping) or not isinstance(content.get("experts"), list):
            raise GradmatchError(
                "a recipe of a mixture needs `base: MODEL` and `experts:`, a list of models or of {model: ..., positive_prompts: [...]}"
            )
        if "base_model" in content:
            return _theirs(content, path.parent)
        return _ours(content, path.parent)


def _known(table: Any, known: Sequence[str], what: str) -> Mapping[str, Any]:
    """A table with keys that are known."""
    if not isinstance(table, Mapping):
        raise GradmatchError(f"{what} is {table!r:.60}; it must be a table of {', '.join(known)}")
    for key in table:
        if key not in known:
            raise GradmatchError(
                f"unknown key {key!r} of {what}{nearest(str(key), known)}; known are {', '.join(known)}",
                "unknown_name",
            )
    return table


def _prompts(entries: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """Prompts as `mix` takes them; None where no expert has any."""
    if not any("positive_prompts" in one or "negative_prompts" in one for one in entries):
        return None
    return [
        {
            "positive": one.get("positive_prompts") or [],
            **({"negative": one["negative_prompts"]} if one.get("negative_prompts") else {}),
        }
        for one in entries
    ]


def _changes(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, float]] | None:
    """Noise and scale of each expert; None where there is none."""
    found = [{key: one[key] for key in SCALES if one.get(key) is not None} for one in entries]
    for one in found:
        for key, value in one.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise GradmatchError(f"{key} is {value!r}; it must be a number")
    return found if any(found) else None


def _ours(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    known = (*OURS, *(name for name in SETTINGS if name not in OURS))
    _known(content, known, "the recipe")
    if "base" not in content:
        raise GradmatchError(
            "the recipe has no `base: MODEL`, the model that the experts were fine-tuned from"
        )
    entries = [
        {"model": one} if isinstance(one, str) else dict(_known(one, OUR_EXPERT, "an expert"))
        for one in content["experts"]
    ]
    for one in entries:
        if "model" not in one:
            raise GradmatchError(f"an expert has no model: {one}")
    tasks = [
        Task(
            locate(str(one["model"]), folder),
            locate(str(one["curvature"]), folder) if one.get("curvature") else None,
            one.get("weight", 1.0),
            str(one.get("name", "")),
        )
        for one in entries
    ]
    options = _known(content.get("options") or {}, sorted(OPTIONS), "options")
    plain = {
        key: value for key, value in content.items() if key not in ("base", "experts", "options", "shared")
    }
    found = {"base": locate(str(content["base"]), folder), "experts": tasks, **plain, **options}
    if content.get("shared"):
        found["shared"] = locate(str(content["shared"]), folder)
    return {**found, **_given(prompts=_prompts(entries), changes=_changes(entries))}


def _theirs(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    _known(content, THEIRS, "a recipe of mergekit-moe")
    entries = [_known(one, THEIR_EXPERT, "an expert") for one in content["experts"]]
    shared = [_known(one, THEIR_EXPERT, "a shared expert") for one in content.get("shared_experts") or []]
    for one in (*entries, *shared):
        if "source_model" not in one:
            raise GradmatchError(f"an expert has no source_model: {dict(one)}")
    mode = content.get("gate_mode", "hidden")
    if mode not in GATES or mode == "seen":
        known = [one for one in GATES if one != "seen"]
        raise GradmatchError(
            f"gate_mode is {mode!r}{nearest(str(mode), known)}; known are {', '.join(known)}", "unknown_name"
        )
    base, sources = (
        model_name(content["base_model"]),
        [model_name(one["source_model"]) for one in (*entries, *shared)],
    )
    if len(set(sources[: len(entries)])) == 1:
        raise GradmatchError(
            f"all experts are {sources[0]}, so that the mixture would answer as that model does; name different models"
        )
    if len(shared) > 1:
        raise GradmatchError(f"shared_experts has {len(shared)} entries; Qwen2-MoE holds one")
    form = _form(content.get("architecture"), bool(shared))
    if shared and mode not in ("random", "uniform_random") and not shared[0].get("positive_prompts"):
        raise GradmatchError(
            "the shared expert has no positive_prompts, which its gate in Qwen2-MoE is made of", "bad_prompts"
        )
    everyone = [*entries, *shared]
    prompts = None if mode in ("random", "uniform_random") else _prompts(everyone) or _missing(mode)
    top_k = content.get("experts_per_token")
    return {
        "base": locate(base, folder),
        "experts": [Task(locate(name, folder), name=f"expert {n}: {Path(name).name}") for n, name in enumerate(sources[: len(entries)])],
        "level": "ffn", "routing": "token", "router": "linear", "method": "base", "gate_mode": mode, "form": form,
        "top_k": 2 if top_k is None else top_k,
        **_given(
            prompts=prompts,
            shared=locate(sources[-1], folder) if shared else None,
            changes=_changes(everyone),
            dtype=content.get("dtype"),
        ),
    }  # fmt: skip


def _missing(mode: str) -> Any:
    raise GradmatchError(
        f"gate_mode {mode} needs positive_prompts of every expert; or say gate_mode: random", "bad_prompts"
    )


def _form(given: Any, shared: bool) -> str:
    """The architecture that a recipe of theirs names by the beginning of its name, or that it gets by itself."""
    if given is None:
        return "qwen2_moe" if shared else "auto"
    found = [form for name, form in ARCHITECTURES.items() if name.startswith(str(given).lower())]
    if not found:
        raise GradmatchError(
            f"architecture is {given!r}{nearest(str(given).lower(), ARCHITECTURES)}; known are {', '.join(ARCHITECTURES)}",
            "unknown_name",
        )
    if not found[0]:
        raise GradmatchError(
            "architecture: deepseek needs code of its own to be loaded (trust_remote_code), which is not written here; name mixtral or qwen moe",
            "bad_target",
        )
    return found[0]


def _given(**arguments: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {key: value for key, value in arguments.items() if value is not None}
