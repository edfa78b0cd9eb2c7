"""What an output folder holds: shards and their headers, the index, and what is carried along from the base."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.tensorfile import ITEM_SIZE

if TYPE_CHECKING:
    from gradmatch.plan.step import Plan, Step

ALIGN = 64  # bytes; where a shard's data begin
NOT_CARRIED = ("README.md", "gradmatch.json", "trainer_state.json", "adapter_config.json", "optimizer.pt")
CARRIED = (".json", ".txt", ".model", ".jinja")


class Layout:
    """Which shard holds each tensor, and where; the same for the same plan."""

    def __init__(self, plan: Plan) -> None:
        groups: list[list[Step]] = [[]]
        size = 0
        for step in plan.steps:
            if groups[-1] and size + step.spec.nbytes > plan.request.shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(step)
            size += step.spec.nbytes
        total = len(groups)
        self.index_name = "model.safetensors.index.json"
        names = (
            ["model.safetensors"]
            if total == 1
            else [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
        )
        self.shards: dict[str, list[Step]] = dict(zip(names, groups, strict=True))
        self._aliases = plan.inputs.base.aliases if plan.inputs.base.config is None else {}
        self._headers: dict[str, tuple[bytes, int]] = {}
        self.place: dict[str, tuple[str, int]] = {}
        for shard, steps in self.shards.items():
            self._headers[shard] = self._build(shard, steps)

    def header(self, shard: str) -> tuple[bytes, int]:
        """The header's bytes, and the size of the whole file."""
        return self._headers[shard]

    def index(self) -> bytes:
        """The index of a checkpoint of several shards."""
        total = sum(step.spec.nbytes for steps in self.shards.values() for step in steps)
        weight_map = {step.name: shard for shard, steps in self.shards.items() for step in steps}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(content, indent=2, sort_keys=True).encode()

    def _build(self, shard: str, steps: Sequence[Step]) -> tuple[bytes, int]:
        """A header whose data begin at an aligned byte; wide dtypes first, so that every tensor is aligned too."""
        held = {step.name for step in steps}
        metadata = {"format": "pt", **{alias: name for alias, name in self._aliases.items() if name in held}}
        table: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for step in sorted(steps, key=lambda step: -ITEM_SIZE[step.spec.dtype]):
            end = offset + step.spec.nbytes
            table[step.name] = {
                "dtype": step.spec.dtype,
                "shape": list(step.spec.shape),
                "data_offsets": [offset, end],
            }
            self.place[step.name] = (shard, offset)
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        start = 8 + len(text)
        for step in steps:
            self.place[step.name] = (shard, start + self.place[step.name][1])
        return struct.pack("<Q", len(text)) + text, start + offset


def carried(base: Path) -> list[str]:
    """Files of a model's folder that go into the output as they are, relative to it: configs, tokenizers, and modules beside it.

    Text alone (CARRIED), from the folder itself. Where sentence-transformers' modules.json names subfolders (1_Pooling, 2_Dense),
    theirs too, and their weights as safetensors; neither code nor pickles, nothing that a link brings in from elsewhere.

    Raises:
        ValueError: modules.json names a folder outside.
    """
    names = [
        source.name
        for source in sorted(base.iterdir())
        if source.is_file()
        and source.suffix in CARRIED
        and not source.name.endswith(".index.json")
        and source.name not in NOT_CARRIED
    ]
    for module in modules(base):
        names += [
            source.relative_to(base).as_posix()
            for source in sorted((base / module).rglob("*"))
            if source.is_file() and source.suffix in (*CARRIED, ".safetensors") and _inside(source, base)
        ]
    return names


def modules(base: Path) -> list[str]:
    """Subfolders that sentence-transformers' modules.json names; none where there is no such file.

    Raises:
        ValueError: one of them lies outside.
    """
    if not (base / "modules.json").is_file():
        return []
    try:
        listed = json.loads((base / "modules.json").read_text(encoding="utf-8"))
        found = [str(entry["path"]) for entry in listed if entry["path"] not in ("", ".")]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{base / 'modules.json'} is no list of modules with a path each ({error}); fetch it again, or remove it"
        ) from error
    for name in found:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not _inside(base / name, base):
            raise ValueError(
                f"{base / 'modules.json'} points outside its folder: {name!r}; do not trust this checkpoint"
            )
    return found


def _inside(path: Path, base: Path) -> bool:
    """Whether a path, links followed, stays in the model's folder (or in the blobs that a snapshot of the hub links to)."""
    roots = [
        base.resolve(),
        *([base.resolve().parents[1] / "blobs"] if base.parent.name == "snapshots" else []),
    ]
    return any(path.resolve().is_relative_to(root) for root in roots)


def module_notes(base: Path) -> list[str]:
    """What a plan says of modules beside the model: their weights are the base's, and what is not text or safetensors stays behind."""
    known, notes = set(carried(base)), []
    for module in modules(base):
        for source in sorted((base / module).rglob("*")):
            name = source.relative_to(base).as_posix()
            if name in known and source.suffix == ".safetensors":
                notes.append(f"{name}: the base's, not merged; modules beside the model are carried along")
            elif source.is_file() and name not in known:
                notes.append(f"{name}: not carried along (only text and safetensors of this folder are)")
    return notes


def carry_along(plan: Plan, folder: Path) -> list[str]:
    """Copy config and tokenizer files of the base into the folder; returns their names."""
    base = plan.inputs.base
    names = []
    if base.folder:
        for name in carried(base.folder):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.folder / name, folder / name)
            names.append(name)
    elif hasattr(getattr(base.module, "config", None), "save_pretrained"):
        before = set(os.listdir(folder))
        base.module.config.save_pretrained(folder)
        names += sorted(set(os.listdir(folder)) - before)
    for name, content in plan.files.items():
        (folder / name).write_bytes(content)
        names += [name] if name not in names else []
    if (plan.request.dtype or base.changed) and (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if base.changed:
            config = {
                **base.changed,
                **{key: value for key, value in config.items() if key.endswith("_token_id")},
            }
        if plan.request.dtype:
            config.pop("torch_dtype", None)
            config["dtype"] = plan.request.dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return names
