"""LoRA adapters as models: base weights plus scaled low-rank products, expanded range by range and never stored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError, within
from gradmatch.estimators.files import read_json
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.adapter_config import CONFIG, check_config, scale_of
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.orientation import CONV1D, conv1d_weights
from gradmatch.models.reference import published
from gradmatch.models.stores import FileStore, Spec, Store, torch_dtype, unpickled
from gradmatch.models.views import by_module

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FACTOR = re.compile(r"\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?$")
ROWS = 256  # products are made of so many rows at a time, so that their bits do not depend on the range that is asked for
OUTPUT = re.compile(r"(lm_head|embed_out|decoder)\.weight$")  # output embeddings


@dataclass(frozen=True)
class LowRank:
    """One adapted weight: theta0 + scale * product of two stored factors."""

    a: str
    b: str
    scale: float
    transposed: bool


class Added:
    """The base's tensors with an adapter's updates.

    Args:
        base: the base's own.
        factors: the adapter's tensors.
        low_rank: adapted weights.
        replaced: tensors that the adapter holds whole, by the name in its file.
        added: biases, by the name in its file, with the factor on them.
        freed: names that were tied to another tensor of the base and are no longer -> that tensor.
    """

    def __init__(
        self,
        base: Store,
        factors: Store,
        low_rank: Mapping[str, LowRank],
        replaced: Mapping[str, str],
        added: Mapping[str, tuple[str, float]],
        freed: Mapping[str, str],
    ) -> None:
        self._base, self._factors, self._low_rank = base, factors, low_rank
        self._replaced, self._added, self._freed = replaced, added, freed
        self._own = dict.fromkeys((*base, *replaced, *freed))

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def spec(self, name: str) -> Spec:
        """Shape of the base's tensor; what is expanded is at least float32."""
        store, key = self._source(name)
        spec = store.spec(key)
        expanded = name in self._low_rank or name in self._added
        return Spec("F32", spec.shape) if expanded and spec.dtype != "F64" else spec

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements of the expanded tensor."""
        store, key = self._source(name)
        values = store.block(key, first, last)
        if name in self._added:
            bias, scale = self._added[name]
            dtype = torch_dtype(self.spec(name).dtype)
            values = values.to(dtype) + scale * self._factors.block(bias, first, last).to(dtype)
        if name in self._low_rank:
            values = self._expanded(self._low_rank[name], name, values, first, last)
        return values

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """Byte ranges of the base or its replacement, and of the factors."""
        store, key = self._source(name)
        low_rank = self._low_rank.get(name)
        keys = [low_rank.a, low_rank.b] if low_rank else []
        keys += [self._added[name][0]] if name in self._added else []
        return [*store.files(key), *(found for one in keys for found in self._factors.files(one))]

    def _source(self, name: str) -> tuple[Store, str]:
        """Where a tensor lies before anything is added to it."""
        if name in self._replaced:
            return self._factors, self._replaced[name]
        return self._base, self._freed.get(name, name)

    def _expanded(self, low_rank: LowRank, name: str, values: Tensor, first: int, last: int) -> Tensor:
        """theta0 + scale * B A, for the rows that a flat range touches."""
        import torch

        spec = self.spec(name)
        dtype = torch_dtype(spec.dtype)
        a, b = (self._whole(key).to(dtype) for key in (low_rank.a, low_rank.b))
        left, right = b.flatten(1), a.flatten(1)  # (out, r), (r, in)
        if low_rank.transposed:
            left, right = right.T, left.T
        width = math.prod(spec.shape[1:])
        start = first // (width * ROWS) * ROWS
        rows = [left[row : row + ROWS] @ right for row in range(start, -(-last // width), ROWS)]
        delta = torch.cat(rows).reshape(-1)[first - start * width : last - start * width]
        return values.to(dtype) + low_rank.scale * delta

    def _whole(self, key: str) -> Tensor:
        spec = self._factors.spec(key)
        return self._factors.block(key, 0, spec.numel).reshape(spec.shape)


def open_adapter(path: Path, base: Checkpoint, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a PEFT adapter folder on its base.

    Modules that were saved whole break ties: a trained head of a tied base is a tensor of its own, and the config says so.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors.
        base: the model it was trained on; of another adapter on its base, the base, unless this one names that adapter.
        allow_pickle: read adapter_model.bin too, with weights_only.

    Raises:
        ValueError: a config with a key that is not understood (peft's merge_and_unload may know it), tensors that are no
            LoRA's, or an adapter whose weights the base does not have in these shapes.
        FileNotFoundError: no adapter_model.safetensors.
    """
    with within(path, "bad_adapter"):
        return _opened(path, base, allow_pickle)


def _opened(path: Path, base: Checkpoint, allow_pickle: bool) -> Checkpoint:
    config = read_json(path / CONFIG)
    check_config(config)
    if base.under is not None and not _names(config, base.path):
        base = base.under  # two adapters of one base: this one was not trained on the other
    factors = _factors(path, allow_pickle)
    saved = config.get("modules_to_save") or ()
    ties = dict(base.aliases)
    if saved or not _has_all(base, factors):
        base = by_module(base)  # every name of tied tensors too
        ties |= base.aliases
    low_rank: dict[str, LowRank] = {}
    replaced: dict[str, str] = {}
    added: dict[str, tuple[str, float]] = {}
    for key in sorted(factors, key=lambda key: not FACTOR.search(key)):  # what is adapted comes first
        name = key.removeprefix(PREFIX)
        if found := FACTOR.search(key):
            if found.group(2) == "B":
                continue
            target = _target(FACTOR.sub("", name), ".weight", base)
            if target in low_rank:
                raise GradmatchError(
                    f"both {low_rank[target].a!r} and {key!r} adapt {target!r}; save the adapter again, with one of them"
                )
            low_rank[target] = _low_rank(key, target, factors, config, base)
        elif key.endswith(".lora_B.bias") and config.get("lora_bias"):
            module = name.removesuffix(".lora_B.bias")
            first = key.replace(".lora_B.bias", ".lora_A.weight")
            scale = scale_of(config, module, first, factors.spec(first).shape[0])
            added[_target(module, ".bias", base)] = (key, scale)
        else:
            whole = _plain(name)
            if whole not in base and not _of(whole, saved):
                raise GradmatchError(
                    f"{key!r} is no factor (lora_A, lora_B), no tensor of {base.where} and of none of modules_to_save "
                    f"{list(saved)}; this is no plain LoRA, or an adapter for another base: merge it with peft's merge_and_unload first"
                )
            replaced[whole] = key
    if not low_rank:
        raise GradmatchError(f"{WEIGHTS} holds no LoRA factors")
    for name, key in replaced.items():
        if name in base and base.spec(name).shape != factors.spec(key).shape and not _of(name, saved):
            raise GradmatchError(_other_base(name, factors.spec(key), base.spec(name)), "shape_mismatch")
    trained = {name for name in replaced if _of(name, saved)}
    freed = {alias: held for alias, held in ties.items() if trained & {alias, held}}
    store = Added(base.store, factors, low_rank, replaced, added, freed)
    aliases = {alias: held for alias, held in base.aliases.items() if alias not in freed}
    changed = {**base.config, "tie_word_embeddings": False} if base.config and freed else base.changed
    opened = Checkpoint(
        store,
        path=path,
        config=changed or base.config,
        aliases=aliases,
        changed=changed,
        folder=base.folder,
        names=(*base.names, published(path)),
    )
    opened.untied, opened.under = frozenset(freed), base
    return opened


def _names(config: Mapping[str, Any], path: Path | None) -> bool:
    """Whether an adapter's config names this folder as its base."""
    named = config.get("base_model_name_or_path")
    return (
        path is not None and isinstance(named, str) and Path(named).expanduser().resolve() == path.resolve()
    )


def _has_all(base: Checkpoint, factors: Store) -> bool:
    """Whether the base has every adapted tensor under the adapter's own names, which are the module's."""
    names = (FACTOR.sub(".weight", key.removeprefix(PREFIX)) for key in factors)
    return all(name in base.store for name in map(_plain, names))


def _factors(path: Path, allow_pickle: bool) -> Store:
    """The adapter's tensors, as safetensors where it has them so."""
    if (path / WEIGHTS).is_file() or not (path / PICKLE).is_file():
        return FileStore([TensorFile(path / WEIGHTS)])
    return unpickled(path / PICKLE, allow_pickle)


def _low_rank(key: str, target: str, factors: Store, config: Mapping[str, Any], base: Checkpoint) -> LowRank:
    """The pair of factors of one weight, checked against its shape."""
    other = re.sub(r"lora_(embedding_)?A", lambda found: f"lora_{found.group(1) or ''}B", key)
    if other not in factors:
        raise GradmatchError(f"{key!r} has no counterpart {other!r}; the adapter is incomplete")
    a, b, whole = factors.spec(key).shape, factors.spec(other).shape, base.spec(target)
    if len(a) < 2 or len(b) != len(a) or b[1] != a[0]:
        raise GradmatchError(
            f"{key!r} {list(a)} and {other!r} {list(b)} are no pair of factors; save the adapter again",
            "shape_mismatch",
        )
    straight, turned = (b[0], *a[1:]) == whole.shape, len(a) == 2 and (a[1], b[0]) == whole.shape
    if "lora_embedding_A" in key:
        straight = False
    if not straight and not turned:
        raise GradmatchError(_other_base(target, f"update {[b[0], *a[1:]]}", whole), "shape_mismatch")
    scale = scale_of(config, target.removesuffix(".weight"), key, a[0])
    if straight and turned:
        turned = _stored_in_out(target, config, base)
    return LowRank(key, other, scale, turned)


def _stored_in_out(target: str, config: Mapping[str, Any], base: Checkpoint) -> bool:
    """Whether a square weight is stored [in, out], as its own module tells; peft's flag is that of the last layer it made.

    Raises:
        ValueError: the base's modules are unknown, and its name or the flag says that it may be.
    """
    known = conv1d_weights(base)
    if target in known:
        return known[target]
    if config.get("fan_in_fan_out") or CONV1D.search(target):
        raise GradmatchError(
            f"adapts {target!r}, which is square: GPT-2's Conv1D stores it [in, out], nn.Linear [out, in], and {base.where} "
            "has no config that tells which; give the base as a folder with its config.json, or as a module"
        )
    return False


def _target(module: str, suffix: str, base: Checkpoint) -> str:
    """The base's tensor that an adapted module holds.

    Raises:
        ValueError: the base has no such module, or its tensor is another's: an update of the output embeddings would change
            the input embeddings. (That of the input embeddings changes both, as merging with peft does.)
    """
    name = module + suffix
    if name in base.aliases and OUTPUT.search(name):
        raise GradmatchError(
            f"adapts {name!r}, which is tied to another tensor in {base.where}, so that its update would change both; untie "
            "the base (tie_word_embeddings=False), save it, and merge the adapter into that with peft's merge_and_unload"
        )
    if f"{module}.in_proj_weight" in base:
        raise GradmatchError(
            f"adapts {module!r}, an nn.MultiheadAttention that keeps its projections in one tensor; merge the adapter with "
            "peft's merge_and_unload first"
        )
    if name not in base:
        raise GradmatchError(
            f"adapts {name!r}, which {base.where} does not have; it is an adapter for another base"
        )
    return name


def _plain(name: str) -> str:
    """modules_to_save and biases under the model's own names."""
    return (
        name.replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", ".")
        .replace(".original_module.", ".")
    )


def _of(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of these modules, as peft finds them: by the end of the module's name."""
    return any(f".{module}." in f".{name}" for module in modules)


def _other_base(name: str, found: object, expected: object) -> str:
    return f"{name!r} is {found}, the base's is {expected}; it is an adapter for another base"
