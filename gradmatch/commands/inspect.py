"""`gradmatch inspect`: what a checkpoint or curvature file holds, from headers alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from gradmatch.estimators.curvature import MEAN
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.plan.printed import readable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch inspect`."""
    parser.add_argument("path", help="checkpoint folder, safetensors file, curvature file, or adapter folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin and .pt files (weights_only)")


def run(args: argparse.Namespace) -> int:
    """Print names, shapes, dtypes and provenance."""
    content = inspect(args.path, allow_pickle=args.allow_pickle)
    if args.json:
        print(json.dumps(content, indent=2))
        return 0
    print(f"{content['kind']} {args.path}")
    errors = json.loads(content["info"].pop("relative_errors", "{}"))
    for key, value in content["info"].items():
        print(f"  {key}: {value}")
    if errors:
        print("  +-: relative error of a block's sum")
    width = max((len(name) for name in content["tensors"]), default=0)
    for name, (dtype, shape) in content["tensors"].items():
        error = errors.get(name.removeprefix(MEAN), None)
        known = "" if error is None else f"  +- {100 * error:.2g} %"
        print(f"{name:<{width}}  {dtype:<5} {shape!s:<16}{known}".rstrip())
    print(
        f"{len(content['tensors'])} tensors, {content['parameters']:,} values, {readable(content['bytes'])}"
    )
    return 0


def inspect(path: str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Kind, provenance and tensors of a file or folder.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    if Path(path).is_file() and Path(path).suffix == ".safetensors":
        file = TensorFile(path)
        if "num_examples" in file.metadata:
            return _summary("curvature", file.metadata, file)
    from gradmatch.models.adapter_config import CONFIG, described
    from gradmatch.models.opening import open_checkpoint

    folder = Path(path).expanduser()
    if (folder / CONFIG).is_file():
        file = TensorFile(folder / "adapter_model.safetensors")
        return _summary("adapter", described(folder), file)
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    wanted = (
        "architectures",
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "tie_word_embeddings",
    )
    info = {key: value for key, value in (checkpoint.config or {}).items() if key in wanted}
    info |= {f"tied {alias}": name for alias, name in checkpoint.aliases.items()}
    card = folder / "gradmatch.json"
    if card.is_file():
        content = json.loads(card.read_text(encoding="utf-8"))
        made = content["recipe"]
        info["merged by"] = f"{made['method']}: {made['formula']}"
    return _summary("checkpoint", info, {name: checkpoint.spec(name) for name in checkpoint.store})


def _summary(kind: str, info: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The table's content, of tensors with a dtype, a shape and a number of bytes."""
    return {
        "kind": kind,
        "info": dict(info),
        "tensors": {name: [one.dtype, list(one.shape)] for name, one in tensors.items()},
        "parameters": sum(prod(one.shape) for one in tensors.values()),
        "bytes": sum(one.nbytes for one in tensors.values()),
    }
