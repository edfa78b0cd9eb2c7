"""Adapters by their factors, for a merge that never expands them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.models.adapter_config import CONFIG
from gradmatch.models.adapters import FACTOR
from gradmatch.models.added import Added, LowRank
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.stores import Spec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """One adapter of a merge.

    Attributes:
        name: of its task.
        config: its adapter_config.json.
        store: its weights on its base.
    """

    name: str
    config: Mapping[str, Any]
    store: Added

    @property
    def weights(self) -> Mapping[str, LowRank]:
        """The weights that it adapts, with the keys of their factors."""
        return self.store.low_rank

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the adapted weight."""
        return self.store.spec(name).shape

    def stored(self, name: str) -> tuple[Spec, Spec]:
        """Shape and dtype of the factors A and B as its file holds them."""
        known = self.weights[name]
        return self.store.factors.spec(known.a), self.store.factors.spec(known.b)

    def rank(self, name: str) -> int:
        """Of its update of a weight."""
        return self.stored(name)[0].shape[0]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """L (m, r) and R (r, n) in float64, with L R = theta - theta0 (the kernels of a convolution as rows): the scale is in L.

        Raises:
            ValueError: NaN or infinite values in a factor.
        """
        known = self.weights[name]
        a, b = (self._read(key) for key in (known.a, known.b))
        left, right = (a.T, b.T) if known.transposed else (b, a)
        return known.scale * left, right

    def _read(self, key: str) -> Tensor:
        spec = self.store.factors.spec(key)
        values = (
            self.store.factors.block(key, 0, spec.numel).reshape(spec.shape).to(torch_dtype("F64")).flatten(1)
        )
        if bad := int((~values.isfinite()).sum()):
            raise GradmatchError(
                f"{key!r} holds {bad} NaN or infinite values in {self.name}; repair that input",
                "not_finite",
                key,
            )
        return values


def adapter_of(name: str, task: Checkpoint, base: Checkpoint) -> Adapter:
    """A task as an adapter of the base that the others are adapters of too.

    Raises:
        ValueError: it is none, is one of another base, or holds more than factors.
    """
    own = task.original
    store, under = own.store, own.under
    if not isinstance(store, Added) or under is None or own.path is None:
        raise GradmatchError(
            f"space='core' merges adapters, and {name} ({own.where}) is none; give folders that hold {CONFIG}, or merge whole models "
            "(space='weights')",
            "bad_adapter",
            name,
        )
    ours, theirs = base.original, under.original
    if not (ours is theirs or (ours.path is not None and _same(ours.path, theirs.path))):
        raise GradmatchError(
            f"{name} is an adapter on {theirs.where}, and the merge's base is {ours.where}; cores of adapters of one base alone can be "
            "merged: name that base, or take space='weights'",
            "bad_adapter",
            name,
        )
    if whole := store.whole():
        raise GradmatchError(
            f"{name} holds {whole[0]!r} beside its factors (modules_to_save, or biases), which has no core; take "
            "space='weights', which gives a whole model",
            "bad_adapter",
            name,
        )
    return Adapter(name, read_json(own.path / CONFIG), store)


def _same(path: Path, other: Path | None) -> bool:
    return other is not None and path.resolve() == other.resolve()


def factored(name: str, like: Adapter, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """left (m, k) @ right (k, n), an update of a weight, as the two tensors that peft saves for a module of this adapter's kind.

    Keys and shapes are peft's own; the scale that belongs to them is 1.
    """
    known, k = like.weights[name], right.shape[0]
    a, b = (left.T, right.T) if known.transposed else (right, left)
    stored_a, stored_b = like.stored(name)
    shapes = ((k, *stored_a.shape[1:]), (stored_b.shape[0], k, *stored_b.shape[2:]))
    module = FACTOR.sub("", known.a)
    end = (
        ("lora_embedding_A", "lora_embedding_B")
        if "lora_embedding_" in known.a
        else ("lora_A.weight", "lora_B.weight")
    )
    return {
        f"{module}.{key}": value.reshape(shape).contiguous()
        for key, value, shape in zip(end, (a, b), shapes, strict=True)
    }
