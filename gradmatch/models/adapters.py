"""LoRA adapters as models: base weights plus scaled low-rank products, expanded range by range and never stored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.common.files import read_json
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.stores import FileStore, Spec, Store, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
A, B = (
    re.compile(r"\.lora_(?:embedding_)?A(?:\.default)?(?:\.weight)?$"),
    re.compile(r"\.lora_(?:embedding_)?B(?:\.default)?(?:\.weight)?$"),
)

OUTPUT = re.compile(r"(lm_head|embed_out|decoder)\.weight$")  # output embeddings


@dataclass(frozen=True)
class LowRank:
    """One adapted weight: theta0 + scale * product of two stored factors."""

    a: str
    b: str
    scale: float
    embedding: bool
    transposed: bool


class AdapterStore:
    """The base's tensors with an adapter's updates."""

    def __init__(
        self,
        base: Store,
        factors: FileStore,
        low_rank: Mapping[str, LowRank],
        replaced: Mapping[str, str],
        added: Mapping[str, tuple[str, float]],
    ) -> None:
        self._base, self._factors, self._low_rank = base, factors, low_rank
        self._replaced, self._added = replaced, added

    def __iter__(self) -> Iterator[str]:
        yield from self._base
        yield from (name for name in self._replaced if name not in self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._base or name in self._replaced

    def spec(self, name: str) -> Spec:
        """Shape of the base's tensor; what is expanded is at least float32."""
        spec = self._factors.spec(self._replaced[name]) if name in self._replaced else self._base.spec(name)
        expanded = name in self._low_rank or name in self._added
        return Spec("F32", spec.shape) if expanded and spec.dtype != "F64" else spec

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements of the expanded tensor."""
        if name in self._replaced:
            values = self._factors.block(self._replaced[name], first, last)
        else:
            values = self._base.block(name, first, last)
        if name in self._added:
            key, scale = self._added[name]
            dtype = torch_dtype(self.spec(name).dtype)
            values = values.to(dtype) + scale * self._factors.block(key, first, last).to(dtype)
        if name in self._low_rank:
            values = self._expanded(self._low_rank[name], name, values, first, last)
        return values

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """Byte ranges of the base or its replacement, and of the factors."""
        keys = [self._replaced[name]] if name in self._replaced else []
        if name in self._low_rank:
            keys += [self._low_rank[name].a, self._low_rank[name].b]
        if name in self._added:
            keys.append(self._added[name][0])
        own = [] if name in self._replaced else self._base.files(name)
        return [*own, *(found for key in keys for found in self._factors.files(key))]

    def _expanded(self, low_rank: LowRank, name: str, values: Tensor, first: int, last: int) -> Tensor:
        """theta0 + scale * B A, for the rows that a flat range touches."""
        spec = self.spec(name)
        dtype = torch_dtype(spec.dtype)
        a, b = (self._whole(key).to(dtype) for key in (low_rank.a, low_rank.b))
        left, right = b.flatten(1), a.flatten(1)  # (out, r), (r, in)
        if low_rank.embedding or low_rank.transposed:
            left, right = right.T, left.T
        width = math.prod(spec.shape[1:])
        start = first // width
        delta = left[start : -(-last // width)] @ right
        return (
            values.to(dtype)
            + low_rank.scale * delta.reshape(-1)[first - start * width : last - start * width]
        )

    def _whole(self, key: str) -> Tensor:
        spec = self._factors.spec(key)
        return self._factors.block(key, 0, spec.numel).reshape(spec.shape)


def named_base(path: Path) -> str:
    """The model that an adapter's config says it was trained on.

    Raises:
        ValueError: it names none.
    """
    named = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{path} is an adapter and names no base model; open it with base=...")
    return str(named)


def open_adapter(path: Path, base: Checkpoint) -> Checkpoint:
    """Open a PEFT adapter folder on its base.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors.
        base: the model it was trained on.

    Raises:
        ValueError: no LoRA, DoRA, or an adapter whose weights the base does not have in these shapes.
        FileNotFoundError: no adapter_model.safetensors.
    """
    config = read_json(path / "adapter_config.json")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(
            f"{path} is a {kind} adapter; only LoRA can be expanded into weights: merge it with peft first"
        )
    file = TensorFile(path / "adapter_model.safetensors")
    if config.get("use_dora") or any("lora_magnitude_vector" in name for name in file):
        raise ValueError(
            f"{path} is a DoRA adapter, whose update is no low-rank sum; merge it with peft's merge_and_unload first"
        )
    if single := next((name for name in file if "trainable_tokens" in name), None):
        raise ValueError(
            f"{path} trains single tokens ({single!r}), whose update is no low-rank sum; merge it with peft's merge_and_unload first"
        )
    factors = FileStore([file])
    low_rank: dict[str, LowRank] = {}
    replaced: dict[str, str] = {}
    added: dict[str, tuple[str, float]] = {}
    for key in factors:
        name = key.removeprefix(PREFIX)
        if A.search(key):
            target = _target(A.sub("", name), ".weight", base, path)
            if target in low_rank:
                raise ValueError(
                    f"{path}: both {low_rank[target].a!r} and {key!r} adapt {target!r}; save the adapter again, with one of them"
                )
            low_rank[target] = _low_rank(key, target, factors, config, base, path)
        elif key.endswith(".lora_B.bias"):
            module = name.removesuffix(".lora_B.bias")
            added[_target(module, ".bias", base, path)] = (
                key,
                _scale(config, module, factors, _first_factor(key)),
            )
        elif not B.search(key):
            replaced[_plain(name)] = key
    if not low_rank:
        raise ValueError(f"{path}: adapter_model.safetensors holds no LoRA factors")
    store = AdapterStore(base.store, factors, low_rank, replaced, added)
    for name in replaced:
        if name in base and base.spec(name).shape != store.spec(name).shape and not _is_head(name, config):
            raise ValueError(_other_base(path, name, store.spec(name), base.spec(name)))
    return Checkpoint(store, path=path, config=base.config, aliases=base.aliases)


def _low_rank(
    key: str, target: str, factors: FileStore, config: Mapping[str, Any], base: Checkpoint, path: Path
) -> LowRank:
    """The pair of factors of one weight, checked against its shape."""
    other = re.sub(r"lora_(embedding_)?A", lambda found: f"lora_{found.group(1) or ''}B", key)
    if other not in factors:
        raise ValueError(f"{path}: {key!r} has no counterpart {other!r}; the adapter is incomplete")
    embedding = "lora_embedding_A" in key
    a, b, whole = factors.spec(key).shape, factors.spec(other).shape, base.spec(target)
    product = (b[0], *a[1:])
    transposed = bool(config.get("fan_in_fan_out")) and not embedding
    expected = (a[1], b[0]) if embedding or transposed else product
    if b[1] != a[0] or math.prod(expected) != whole.numel or expected[0] != whole.shape[0]:
        raise ValueError(_other_base(path, target, f"update {list(expected)}", whole))
    return LowRank(
        key, other, _scale(config, target.removesuffix(".weight"), factors, key), embedding, transposed
    )


def _scale(config: Mapping[str, Any], module: str, factors: FileStore, key: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; both may be set by name pattern."""
    rank = factors.spec(key).shape[0]
    alpha = float(config.get("lora_alpha") or rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.search(rf"(^|.*\.){pattern}$", module):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _first_factor(key: str) -> str:
    return key.replace(".lora_B.bias", ".lora_A.weight")


def _target(module: str, suffix: str, base: Checkpoint, path: Path) -> str:
    """The base's tensor that an adapted module holds.

    Raises:
        ValueError: the base has no such module, or its tensor is another's: an update of the output embeddings would change
            the input embeddings. (That of the input embeddings changes both, as merging with peft does.)
    """
    name = module + suffix
    ties = bool((base.config or {}).get("tie_word_embeddings", True))
    if name in base.aliases or (name not in base and base.config and ties and OUTPUT.search(name)):
        raise ValueError(
            f"{path} adapts {name!r}, which is tied to another tensor in {base.where}, so that its update would change both; untie "
            "the base (tie_word_embeddings=False), save it, and merge the adapter into that with peft's merge_and_unload"
        )
    if name not in base:
        raise ValueError(
            f"{path} adapts {name!r}, which {base.where} does not have; it is an adapter for another base"
        )
    return name


def _plain(name: str) -> str:
    """modules_to_save and biases under the model's own names."""
    return (
        name.replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", ".")
        .replace(".original_module.", ".")
    )


def _is_head(name: str, config: Mapping[str, Any]) -> bool:
    return any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ())


def _other_base(path: Path, name: str, found: object, expected: object) -> str:
    return f"{path}: {name!r} is {found}, the base's is {expected}; it is an adapter for another base"
