"""What an output's shards hold: which tensor lies where, their headers, the index."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.header import ITEM_SIZE

if TYPE_CHECKING:
    from gradmatch.plan.step import Plan, Step

ALIGN = 64  # bytes; where a shard's data begin


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
