"""adapter_config.json: what an adapter's config may say so that its update is W + s B A; anything else is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json

CONFIG = "adapter_config.json"

# Keys that say how an adapter was found or trained, and change nothing of what its factors mean.
FREE = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
    "runtime_config",
)  # fmt: skip
STARTS = ("gaussian", "eva", "orthogonal", "mica")  # of A and B; others take B A off the base


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _table(value: Any, of: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(of, value.values())))


# Keys that count, with what is understood of each; every other key must be null, false or empty.
UNDERSTOOD: Mapping[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "init_lora_weights": lambda value: isinstance(value, bool | None) or str(value).lower() in STARTS,
    "r": _positive,
    "lora_alpha": _number,
    "rank_pattern": lambda value: _table(value, _positive),
    "alpha_pattern": lambda value: _table(value, _number),
    "use_rslora": lambda value: isinstance(value, bool | None),
    "lora_bias": lambda value: isinstance(value, bool | None),
    "fan_in_fan_out": lambda value: isinstance(value, bool | None),
    "bias": lambda value: value in (None, "none", "all", "lora_only"),
    "modules_to_save": lambda value: (
        value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))
    ),
}
MEANING = {
    "peft_type": "only LoRA can be expanded into weights",
    "init_lora_weights": "a start that changed the base's weights, so that B A does not belong on the base as it is; convert the "
    "adapter when saving it (peft's path_initial_model_for_weight_conversion)",
    "use_dora": "DoRA, whose update is no low-rank sum",
    "alora_invocation_tokens": "aLoRA, which acts after these tokens alone and cannot be merged into weights",
    "kasa_config": "KaSA, which cuts the base and puts a diagonal between B and A",
    "layer_replication": "layers are repeated, so that the model is another one than the base",
    "target_parameters": "LoRA on parameters that are no layer's weight, such as stacked experts",
    "trainable_token_indices": "single rows of the embeddings are trained",
    "ensure_weight_tying": "adapters tied to one another",
}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose config holds anything that W + s B A does not say.

    Raises:
        ValueError: the key and its value are named.
    """
    for key, value in config.items():
        fits = UNDERSTOOD.get(key, lambda value: value in (None, False) or value in ({}, [], ""))
        if key not in FREE and not fits(value):
            why = MEANING.get(key, "not understood here")
            raise GradmatchError(
                f"{key}={value!r} in its {CONFIG}: {why}; merge it with peft's merge_and_unload first, where peft can, and give the result",
                "bad_adapter",
            )


def scale_of(config: Mapping[str, Any], module: str, key: str, stored: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; both may be set by name pattern. `stored` is the rank of the factor `key`.

    Raises:
        ValueError: the factors have another rank than the config says.
    """
    rank = _by_pattern(config, "rank_pattern", module, config.get("r", 8))
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if stored != rank:
        raise GradmatchError(
            f"{key!r} has rank {stored}, its {CONFIG} says {rank} (r, rank_pattern); it belongs to another config",
            "shape_mismatch",
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Mapping[str, Any], table: str, module: str, default: Any) -> Any:
    """The value of the first pattern that is the whole name of a module, or the whole of it behind a dot."""
    for pattern, value in (config.get(table) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise GradmatchError(
                f"{table} has {pattern!r}, which is no regular expression ({error})"
            ) from None
    return default


def named_base(path: Path) -> str:
    """The model that an adapter's config says it was trained on, with its revision where one is given ("me/base@v2").

    Raises:
        ValueError: it names none, or itself, over other adapters too.
    """
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        config = read_json(path / CONFIG)
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not named or not isinstance(named, str):
            raise GradmatchError(
                f"{path} is an adapter and names no base model; open it with base=...", "bad_adapter", path
            )
        path = Path(named).expanduser()
        if path.resolve() in seen:
            raise GradmatchError(
                f"{seen[0]} is an adapter whose base, {named}, leads back to itself; name another base",
                "bad_adapter",
                seen[0],
            )
        if len(seen) == 1:
            found = named if path.exists() or not isinstance(revision, str) else f"{named}@{revision}"
        if not (path / CONFIG).is_file():
            return found


def described(path: Path) -> dict[str, str]:
    """What an adapter is: of which base, its rank and scale, which modules it adapts, and whether it can be expanded.

    Raises:
        ValueError: adapter_config.json is no JSON table.
    """
    config = read_json(path / CONFIG)
    targets, saved = config.get("target_modules"), config.get("modules_to_save")
    found = {
        "adapter": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "revision of the base": config.get("revision"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "rank by module": config.get("rank_pattern"),
        "alpha by module": config.get("alpha_pattern"),
        "targets": ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else targets,
        "modules saved whole": ", ".join(map(str, saved)) if isinstance(saved, list) else saved,
        "bias": config.get("bias"),
    }
    try:
        check_config(config)
    except ValueError as error:
        found["cannot be merged here"] = str(error)
    return {key: str(value) for key, value in found.items() if value}
