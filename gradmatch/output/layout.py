"""What an output's shards hold: which tensor lies where, their headers, the index."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.header import ITEM_SIZE

if TYPE_CHECKING:
    from gradmatch.models.stores import Spec

ALIGN = 64  # bytes; where a shard's data begin
INDEX = "model.safetensors.index.json"


class Layout:
    """Which shard holds each tensor, and where; the same for the same tensors.

    Args:
        specs: name -> shape and dtype, in the order in which they are written.
        shard_bytes: largest size of a file's values.
        aliases: tied names -> the name that holds the values, told in the header of its shard.
        apart: names of a shard -> the tensors that it holds and no other, whatever their size.
        metadata: of the shards in `apart`.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        shard_bytes: int,
        aliases: Mapping[str, str] | None = None,
        apart: Mapping[str, Sequence[str]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.specs, self.index_name = specs, INDEX
        away = {name for names in (apart or {}).values() for name in names}
        groups: list[list[str]] = [[]]
        size = 0
        for name, spec in specs.items():
            if name in away:
                continue
            if groups[-1] and size + spec.nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += spec.nbytes
        total = len(groups)
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
        if total == 1 and not away:
            names = ["model.safetensors"]
        self.shards: dict[str, Sequence[str]] = {
            **dict(zip(names, groups, strict=True)),
            **{shard: held for shard, held in (apart or {}).items() if held},
        }
        self._headers: dict[str, tuple[bytes, int]] = {}
        self.place: dict[str, tuple[str, int]] = {}
        for shard, held in self.shards.items():
            tied = {alias: name for alias, name in (aliases or {}).items() if name in held}
            self._headers[shard] = self._build(
                shard, held, tied if shard in names else {**tied, **(metadata or {})}
            )

    def header(self, shard: str) -> tuple[bytes, int]:
        """The header's bytes, and the size of the whole file."""
        return self._headers[shard]

    def index(self) -> bytes:
        """The index of a checkpoint of several shards."""
        total = sum(spec.nbytes for spec in self.specs.values())
        weight_map = {name: shard for shard, names in self.shards.items() for name in names}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(content, indent=2, sort_keys=True).encode()

    def _build(self, shard: str, names: Sequence[str], metadata: Mapping[str, str]) -> tuple[bytes, int]:
        """A header whose data begin at an aligned byte; wide dtypes first, so that every tensor is aligned too."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        offset = 0
        for name in sorted(names, key=lambda name: -ITEM_SIZE[self.specs[name].dtype]):
            spec = self.specs[name]
            end = offset + spec.nbytes
            table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            self.place[name] = (shard, offset)
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        start = 8 + len(text)
        for name in names:
            self.place[name] = (shard, start + self.place[name][1])
        return struct.pack("<Q", len(text)) + text, start + offset
