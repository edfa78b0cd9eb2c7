"""The folder of a merged adapter: factors and config as peft's save_pretrained writes them, with the card; it appears whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.files import write_atomically
from gradmatch.models.adapter_config import CONFIG
from gradmatch.models.adapter_saved import PREFIX
from gradmatch.models.adapters import FACTOR, WEIGHTS
from gradmatch.output.card import card_files
from gradmatch.output.identity import check_apart, identity
from gradmatch.output.publishing import appearing, place

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.output.report import Report
    from gradmatch.plan.step import Plan


def adapter_config(made: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The adapter_config.json of merged factors, whose scale is 1: alpha is the rank of every module.

    The most frequent rank is `r`; modules of another one stand in rank_pattern and alpha_pattern.
    """
    ranks = {
        FACTOR.sub("", key).removeprefix(PREFIX): len(value)
        for key, value in tensors.items()
        if (found := FACTOR.search(key)) and found.group(2) == "A"
    }
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in sorted(ranks.items()) if rank != usual}
    configs = [adapter.config for adapter in made.adapters]

    def shared(key: str, otherwise: Any = None) -> Any:
        values = [config.get(key) for config in configs]
        return values[0] if all(value == values[0] for value in values) else otherwise

    return {
        "peft_type": "LORA",
        "task_type": shared("task_type"),
        "base_model_name_or_path": shared("base_model_name_or_path", "+".join(made.inputs.base.names)),
        "revision": shared("revision"),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def write_adapter(
    out: Path, made: Plan, tensors: Mapping[str, Tensor], report: Report, *, overwrite: bool = False
) -> Path:
    """Write the folder aside, and rename it into place; returns where it is, links followed.

    Raises:
        ValueError: `out` lies on an input.
        FileExistsError: `out` is there and holds something, or what stands there is no merge.
        NotADirectoryError, PermissionError: `out` would lie in a file, or where nothing may be written.
        BlockingIOError: another process is writing it.
        OSError: no space left.
    """
    from safetensors.torch import save

    out = place(out)
    check_apart(out, made.inputs)
    with appearing(out, identity(made), overwrite) as folder:
        files = card_files(made, report)
        files[WEIGHTS] = save(dict(tensors), metadata={"format": "pt"})
        files[CONFIG] = (json.dumps(adapter_config(made, tensors), indent=2) + "\n").encode()
        for name, content in files.items():
            write_atomically(folder / name, content)
    return out
