"""Curvatures as a merge reads them: opened, checked to be their model's, and cut into blocks."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.curvature import FACTOR_A, FACTOR_B, GRADIENT, MEAN, Curvature
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.renamed import file_names
from gradmatch.models.stores import SAFETENSORS_NAME, FileStore, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.gathered import Rows


class CurvatureStore:
    """Blocks of a curvature as a store: per-example means, gradients or input factors, of one file or in memory."""

    def __init__(self, curvature: Curvature, prefix: str, aliases: Mapping[str, Sequence[str]]) -> None:
        self.num_examples, self.path = curvature.num_examples, curvature.path
        self.curvature, self._prefix, self._aliases = curvature, prefix, aliases
        self._file = FileStore([TensorFile(curvature.path)], prefix) if curvature.path else None
        self._flat: dict[str, Tensor] = {}
        self.rows: Mapping[str, Rows] = {}

    def key(self, name: str) -> str | None:
        """The name under which a parameter is stored (a tied one may go by any of its names), or None."""
        return next((known for known in (name, *self._aliases.get(name, ())) if known in self), None)

    def __iter__(self) -> Any:
        return iter(self._file if self._file else self.curvature)

    def __contains__(self, name: object) -> bool:
        if self._file:
            return name in self._file
        return isinstance(name, str) and self._tensor(name) is not None

    def spec(self, name: str) -> Spec:
        """Shape and dtype of a block."""
        if self._file:
            spec = self._file.spec(name)
        else:
            tensor = self._tensor(name)
            assert tensor is not None
            spec = Spec(SAFETENSORS_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        return self.rows[name].shape(spec) if name in self.rows else spec

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements of a block, flat; rows of tokens that the model lacks are zero."""
        if name in self.rows:
            plain = copy.copy(self)
            plain.rows = {}
            values, absent, low = self.rows[name].gather(plain, name, first, last)
            values[absent] = 0
            start = first - low * values.shape[1]
            return values.reshape(-1)[start : start + last - first]
        if self._file:
            return self._file.block(name, first, last)
        if name not in self._flat:
            tensor = self._tensor(name)
            assert tensor is not None
            self._flat[name] = tensor.detach().to("cpu").reshape(-1)
        return self._flat[name][first:last]

    def file(self, name: str) -> FileStore | None:
        """The file whose blocks are this store's as they are, or None."""
        return None if name in self.rows else self._file

    def files(self, name: str) -> Sequence[tuple[TensorFile, int, int]]:
        """Its byte range, for read-ahead."""
        return self._file.files(name) if self._file else ()

    def _tensor(self, name: str) -> Tensor | None:
        if self._prefix == MEAN:
            return self.curvature.mean(name) if name in self.curvature else None
        if self._prefix == GRADIENT:
            return self.curvature.gradient(name)
        factor = self.curvature.factor_a if self._prefix == FACTOR_A else self.curvature.factor_b
        return factor(name)


@dataclass(frozen=True)
class Factors:
    """The Kronecker factors of one curvature: the block of a linear layer's weight is A (x) B, with B = I where it is not stored."""

    a: CurvatureStore
    b: CurvatureStore

    @classmethod
    def of(cls, curvature: Curvature, aliases: Mapping[str, Sequence[str]]) -> Factors:
        """Those of a curvature; possibly none at all."""
        return cls(CurvatureStore(curvature, FACTOR_A, aliases), CurvatureStore(curvature, FACTOR_B, aliases))

    def size(self, name: str, shape: Sequence[int], owner: str) -> int:
        """Bytes of the factors of one tensor; 0 where it has none.

        Raises:
            ValueError: factors of a matrix of another shape.
        """
        key, other = self.a.key(name), self.b.key(name)
        if key is None:
            return 0
        a, b = self.a.spec(key), None if other is None else self.b.spec(other)
        out, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, 0)
        ways = [(width, out), (out, width)] if len(shape) == 2 else [(width, out)]  # as in Conv1D
        if not any(a.shape[0] == one and (b is None or b.shape[0] == two) for one, two in ways):
            found = f"{list(a.shape)}" + ("" if b is None else f" and {list(b.shape)}")
            raise ValueError(
                f"the curvature of {owner} has factors {found} for {name!r}, whose shape is {list(shape)}; it belongs to another model"
            )
        return a.nbytes + (0 if b is None else b.nbytes)

    def read(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        """A (in, in) and B (out, out) in float64, positive; None where the tensor has none."""
        a = _square(self.a, name)
        return None if a is None else (a, _square(self.b, name))


def _square(store: CurvatureStore, name: str) -> Tensor | None:
    """One factor in float64, or None; raised by the rounding error of its dtype, as small eigenvalues would else be negative."""
    import torch

    key = store.key(name)
    if key is None:
        return None
    spec = store.spec(key)
    stored = store.block(key, 0, spec.numel)
    factor = stored.to(torch.float64).reshape(spec.shape)
    return factor + torch.finfo(stored.dtype).eps * factor.trace() * torch.eye(
        len(factor), dtype=factor.dtype
    )


def checked_aliases(
    curvature: Curvature,
    model: Checkpoint,
    name: str,
    aliases: Mapping[str, Sequence[str]],
    allow_mismatch: bool,
) -> Mapping[str, Sequence[str]]:
    """Other names of the model's tensors, with those of its module where the curvature uses them; checked to be its model's.

    Raises:
        ValueError: the curvature of another model.
    """
    renamed = file_names(model, curvature)
    if not allow_mismatch:
        curvature.check_model(lambda parameter: model.sample(renamed.get(parameter, parameter)), name)
    if not renamed:
        return aliases
    return {**aliases, **{file: (*aliases.get(file, ()), module) for module, file in renamed.items()}}


def open_curvature(curvature: Curvature | str | os.PathLike[str]) -> Curvature:
    """A curvature as given, or loaded from its file.

    Raises:
        TypeError: neither a Curvature nor a path.
    """
    if isinstance(curvature, Curvature):
        return curvature
    if isinstance(curvature, (str, os.PathLike)):
        return Curvature.load(curvature)
    raise TypeError(f"a curvature is a Curvature or the path of its file, not {type(curvature).__name__}")
