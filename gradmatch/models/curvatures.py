"""Curvatures as a merge reads them: opened, checked to be their model's, and cut into blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmatch.common.warning import warn
from gradmatch.estimators.curvature import FACTOR_A, FACTOR_B, GRADIENT, MEAN, STANDARD_ERROR, Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.gathered import Gathered
from gradmatch.models.moved import MovedCurvature
from gradmatch.models.stores import FileStore, MemoryStore, Store
from gradmatch.models.views import Arrangement, arrange, like

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gradmatch.models.gathered import Rows


SKEW = 1e-3  # of a factor's norm: above this it is no rounding


class CurvatureStore(Gathered):
    """Blocks of a curvature as a store under the base's names: per-example means, gradients or factors, of one file or in memory.

    Args:
        curvature: as given.
        prefix: which of its blocks.
        arranged: how its names become the base's; None: they are so.

    Attributes:
        left: factors of matrices that lie within others in the base (stacked or split): they belong to none of its tensors.
    """

    def __init__(self, curvature: Curvature, prefix: str, arranged: Arrangement | None = None) -> None:
        self.num_examples, self.path = curvature.num_examples, curvature.path
        self.curvature, self._arranged = curvature, arranged
        store = blocks(curvature, prefix)
        factors = prefix in (FACTOR_A, FACTOR_B)
        kept = set(arranged.plain.values()) if arranged and factors else set(store)
        self.left = [name for name in store if name not in kept]
        super().__init__(arranged.of(store, converted=not factors) if arranged else store, {})

    def beside(self, prefix: str) -> CurvatureStore:
        """Other blocks of the same curvature, under the same names."""
        return CurvatureStore(self.curvature, prefix, self._arranged)

    def align(self, names: Iterable[str], rows: Rows) -> None:
        """Take the rows of a common vocabulary from now on; those of tokens that the model lacks are zero."""
        self.parts = {name: rows.part(self.store, name) for name in names if name in self.store}


def blocks(curvature: Curvature, prefix: str = MEAN) -> Store:
    """One kind of a curvature's blocks by its own names."""
    if isinstance(curvature, MovedCurvature):
        return curvature.store(blocks(curvature.source, prefix), prefix)
    if curvature.path:
        return FileStore([TensorFile(curvature.path)], prefix)
    read = {
        MEAN: curvature.mean,
        GRADIENT: curvature.gradient,
        FACTOR_A: curvature.factor_a,
        FACTOR_B: curvature.factor_b,
        STANDARD_ERROR: curvature.standard_error,
    }[prefix]
    found = {name: read(name) for name in curvature}
    return MemoryStore({name: value for name, value in found.items() if value is not None}, "the curvature")


@dataclass(frozen=True)
class Prior:
    """H0 = base_weight * N_0 F_0 + delta0, the curvature that holds the base: of a file's F_0, of a number, or the floor alone.

    Attributes:
        number: what is the same everywhere: delta0, and base_weight times a curvature that is a number.
        scale: factor on the base's curvature per example, base_weight * N_0.

    Example:
        >>> Prior.of(3.0, base_weight=2.0, delta0=0.5)
        Prior(number=6.5, scale=0.0)
    """

    number: float
    scale: float

    @classmethod
    def of(
        cls, given: Curvature | CurvatureStore | float | None, base_weight: float = 1.0, delta0: float = 0.0
    ) -> Prior:
        """From what a merge is given: a curvature, a number, or None."""
        if given is None or isinstance(given, int | float):
            return cls((given or 0.0) * base_weight + delta0, 0.0)
        return cls(delta0, base_weight * given.num_examples)

    def at(self, mean: Tensor) -> Tensor:
        """H0 where the base's curvature per example is `mean`, (*s,)."""
        return mean * self.scale + self.number


@dataclass(frozen=True)
class Factors:
    """The Kronecker factors of one curvature: the block of a linear layer's weight is A (x) B, with B = I where it is not stored."""

    a: CurvatureStore
    b: CurvatureStore

    @classmethod
    def of(cls, curvature: Curvature, arranged: Arrangement | None = None) -> Factors:
        """Those of a curvature; possibly none at all."""
        return cls(
            CurvatureStore(curvature, FACTOR_A, arranged), CurvatureStore(curvature, FACTOR_B, arranged)
        )

    def size(self, name: str, shape: Sequence[int], owner: str) -> int:
        """Bytes of the factors of one tensor; 0 where it has none.

        Raises:
            ValueError: factors of a matrix of another shape.
        """
        if name not in self.a:
            return 0
        a, b = self.a.spec(name), self.b.spec(name) if name in self.b else None
        out, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, 0)
        ways = [(width, out), (out, width)] if len(shape) == 2 else [(width, out)]  # as in Conv1D
        if not any(a.shape[-1] == one and (b is None or b.shape[-1] == two) for one, two in ways):
            found = f"{list(a.shape)}" + ("" if b is None else f" and {list(b.shape)}")
            raise GradmatchError(
                f"the curvature of {owner} has factors {found} for {name!r}, whose shape is {list(shape)}; it belongs to another model",
                "other_weights",
                owner,
            )
        return a.nbytes + (0 if b is None else b.nbytes)

    def read(self, name: str, dtype: torch.dtype | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """The products that sum to the block: (A (in, in), B (out, out)) each, positive, by default in float64; none where there are none.

        Raises:
            ValueError: a factor that is no matrix of second moments.
        """
        a, b = _squares(self.a, FACTOR_A + name, name, dtype), _squares(self.b, FACTOR_B + name, name, dtype)
        return [(one, b[number] if b else None) for number, one in enumerate(a)]


def _squares(store: CurvatureStore, key: str, name: str, dtype: torch.dtype | None) -> list[Tensor]:
    """Factors, one a product; raised by the rounding error of their dtype, as small eigenvalues would else be negative.

    Raises:
        ValueError: one that is not symmetric: its eigenvectors would be those of one half of it.
    """
    import torch

    if name not in store:
        return []
    spec = store.spec(name)
    stored = store.block(name, 0, spec.numel)
    factors = list(stored.to(dtype or torch.float64, copy=True).reshape(-1, *spec.shape[-2:]))
    for factor in factors:
        # by a vector: a difference of whole matrices would be held. Negative ones are what un-merging leaves in a posterior
        probe = torch.arange(len(factor), dtype=factor.dtype).cos()
        skew = float((factor @ probe - probe @ factor).norm())
        if skew > SKEW * float(factor.norm() * probe.norm()):
            raise GradmatchError(
                f"{key} of {store.path or 'a curvature'} is not symmetric, so it is no matrix of second moments: write x'x of the inputs, or "
                "g'g of the gradients, or leave the factor out",
                "bad_curvature",
                key,
            )
        factor.diagonal().add_(torch.finfo(stored.dtype).eps * float(factor.trace()))
    return factors


def arranged_curvature(
    curvature: Curvature, model: Checkpoint, base: Checkpoint, name: str, allow_mismatch: bool
) -> Arrangement | None:
    """How a curvature's blocks lie in the base's names and layout (None: as they are), after checking whose it is.

    Args:
        curvature: of the model, under the names of the module that it was estimated on.
        model: as opened.
        base: of the merge.
        name: how to call the model.
        allow_mismatch: accept a curvature of other weights.

    Raises:
        ValueError: the curvature of another model.
    """
    own = Checkpoint(blocks(curvature), path=curvature.path, aliases={})
    if not allow_mismatch and "fingerprint" in curvature.info:
        known = model if all(parameter in model for parameter in curvature) else like(model, own)
        curvature.check_model(known.sample, name)
    tied = any(alias in own and held not in own for alias, held in base.aliases.items())
    if all(parameter in base.store for parameter in own) and not tied:
        return None
    return arrange(own, base, beside=[model])


def moved_curvature(model: Checkpoint, curvature: Curvature, name: str) -> Curvature:
    """A model's curvature; of an aligned view, one of the model before is moved along with it.

    Whose it is is told by its fingerprint; one of neither of the two stays, for whoever checks it; one without any is
    taken to be of the model before, with a warning.

    Raises:
        ValueError: one that cannot be moved.
    """
    movement = model.movement
    if movement is None or isinstance(curvature, MovedCurvature):
        return curvature
    if "fingerprint" not in curvature.info:
        warn(
            f"the curvature of {name} has no fingerprint; it is taken to be that of the model before its alignment, and moved along"
        )
        return movement.of_curvature(curvature, name)
    if _owns(model, curvature) or not _owns(movement.source, curvature):
        return curvature
    return movement.of_curvature(curvature, name)


def _owns(model: Checkpoint, curvature: Curvature) -> bool:
    """Whether a curvature was taken at these weights."""
    own = Checkpoint(blocks(curvature), path=curvature.path, aliases={})
    known = model if all(parameter in model for parameter in curvature) else like(model, own)
    try:
        return fingerprint(curvature, known.sample) == curvature.info["fingerprint"]
    except KeyError:
        return False


def open_curvature(curvature: Curvature | str | os.PathLike[str]) -> Curvature:
    """A curvature as given, or loaded: a file, or what lies beside a model's weights in a folder or on the hub.

    Raises:
        TypeError: neither a Curvature nor a path.
    """
    if isinstance(curvature, Curvature):
        return curvature
    if isinstance(curvature, (str, os.PathLike)):
        return Curvature.from_pretrained(curvature)
    raise TypeError(f"a curvature is a Curvature or the path of its file, not {type(curvature).__name__}")
