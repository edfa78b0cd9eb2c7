"""The noun of this package: the curvature of one model's loss, with its units and where it came from.

A `Curvature` maps parameter names to blocks of the model's shape. Blocks are **per-example means**; the curvature of the
summed loss, which merging needs, is `num_examples * mean`. It lives in memory or in a safetensors file that is read
block by block, and that can be published beside the weights: its header names the estimator, the number of examples,
the labels, the seed and a fingerprint of the weights it was taken at.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.blocks import (
    FACTOR_A,
    FACTOR_B,
    GRADIENT,
    MEAN,
    STANDARD_ERROR,
    apart,
    check_count,
    check_kind,
    check_stored,
    checked,
)
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import replacing
from gradmatch.estimators.fingerprint import Sample, fingerprint, model_sampler
from gradmatch.estimators.published import Published
from gradmatch.estimators.shown import frame, html
from gradmatch.estimators.tensorfile import TensorFile

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT_VERSION = "1"
__all__ = ["FACTOR_A", "FACTOR_B", "GRADIENT", "MEAN", "STANDARD_ERROR", "Curvature"]


class Curvature(Published, Mapping[str, "Tensor"]):
    """Curvature of a summed loss, by parameter name. `mean` blocks are per example; total = num_examples * mean.

    Made by `gradmatch.estimators.estimate`, `Curvature.load` or `Curvature.from_dict`. As a mapping it yields the mean blocks,
    read from the file when asked for.

    Attributes:
        num_examples: N that the loss sums over (the size of the training set), not the number of examples seen.
        info: provenance, as strings: estimator, reduction, units, trace, examples_seen, samples, labels, likelihood,
            seed, fingerprint of the model, library versions.
        path: the file it is read from, or None when it is in memory.

    Example:
        >>> import torch
        >>> curvature = Curvature.from_dict({"w": torch.tensor([1.0, 3.0])}, num_examples=10)
        >>> curvature.total("w"), curvature.trace()
        (tensor([10., 30.]), 4.0)
    """

    def __init__(
        self,
        blocks: Mapping[str, Tensor] | TensorFile,
        num_examples: int,
        info: Mapping[str, str],
    ) -> None:
        self._blocks = blocks
        self.num_examples = int(num_examples)
        self.info: Mapping[str, str] = dict(info)
        self.path = blocks.path if isinstance(blocks, TensorFile) else None

    @classmethod
    def from_dict(
        cls,
        mean: Mapping[str, Tensor],
        num_examples: int,
        info: Mapping[str, str] | None = None,
        *,
        standard_error: Mapping[str, Tensor] | None = None,
        gradient: Mapping[str, Tensor] | None = None,
        factor_a: Mapping[str, Tensor] | None = None,
        factor_b: Mapping[str, Tensor] | None = None,
    ) -> Curvature:
        """Wrap one's own estimate.

        Args:
            mean: parameter name -> per-example mean curvature, in the parameter's shape. Half precision is widened to
                float32; float32 and float64 are kept.
            num_examples: N of the summed loss.
            info: provenance to keep with it.
            standard_error: name -> standard error of `mean`, same units and shapes.
            gradient: name -> gradient of the *summed* loss at the fine-tuned weights (true labels).
            factor_a: name -> second moments of a linear layer's inputs, (in, in), per example.
            factor_b: name -> those of the gradients at its outputs, (out, out); absent means the identity. The block of
                the weight is the Kronecker product of the two; of stacks (k, in, in) and (k, out, out) it is the sum of k products.

        Raises:
            ValueError: nothing given, N < 1, a value that is not finite, or shapes that disagree; the tensor is named.
            TypeError: N is not a whole number, or a block no tensor of real numbers.
        """
        check_count("num_examples", num_examples)
        if not isinstance(mean, Mapping):
            raise TypeError(
                f"`mean` maps the name of each parameter to a tensor of its shape, a {type(mean).__name__} does not: of a "
                "linear operator (curvlinops, say) use Curvature.from_operator"
            )
        if not mean:
            raise GradmatchError("a Curvature needs at least one parameter; `mean` is empty", "bad_curvature")
        blocks: dict[str, Tensor] = {}
        for prefix, part in ((MEAN, mean), (STANDARD_ERROR, standard_error), (GRADIENT, gradient)):
            for name, value in (part or {}).items():
                check_kind(prefix, name, value)
                if name not in mean or value.shape != mean[name].shape:
                    expected = list(mean[name].shape) if name in mean else "no mean at all"
                    raise GradmatchError(
                        f"{prefix}{name} has shape {list(value.shape)}, its mean has {expected}",
                        "shape_mismatch",
                        name,
                    )
                blocks[prefix + name] = checked(prefix + name, value)
        for prefix, part in ((FACTOR_A, factor_a), (FACTOR_B, factor_b)):
            for name, value in (part or {}).items():
                beside = (factor_a or {}).get(name)
                alone = name not in mean or value.dim() not in (2, 3) or value.shape[-2] != value.shape[-1]
                if alone or beside is None or value.shape[:-2] != beside.shape[:-2]:
                    raise GradmatchError(
                        f"{prefix}{name} of shape {list(value.shape)} is no square factor of a known mean",
                        "bad_curvature",
                        name,
                    )
                blocks[prefix + name] = checked(prefix + name, value)
        notes = {key: str(value) for key, value in (info or {}).items()}
        found = cls(blocks, num_examples, {"estimator": "given", **notes})
        # its own, whatever `info` was copied from
        found.info = {**found.info, "trace": f"{found._sum():.9g}"}
        return found

    @classmethod
    def from_operator(cls, operator: Any, model: nn.Module, **options: Any) -> Curvature:
        """Curvature from a linear operator such as curvlinops': see `gradmatch.estimators.operators.from_operator`.

        Raises:
            ValueError: an operator of another size, or in units that are not known.

        Example:
            >>> Curvature.from_operator(curvlinops.GGNLinearOperator(model, loss, params, data), model)  # doctest: +SKIP
        """
        found: Curvature = import_module("gradmatch.estimators.operators").from_operator(
            operator, model, **options
        )
        return found

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | Mapping[str, Tensor] | None = None,
        allow_mismatch: bool = False,
    ) -> Curvature:
        """Open a curvature file. Only its header is read; blocks follow when asked for.

        Args:
            path: the file.
            model: where given, the weights that the curvature must have been taken at.
            allow_mismatch: accept a curvature of other weights all the same.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: truncated or corrupt, no curvature file, blocks that do not fit together, or taken at other
                weights than `model`.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            hint = "it is a folder: name the file in it" if path.is_dir() else "it must be a local file"
            raise FileNotFoundError(f"no curvature file {path}; {hint}")
        file = TensorFile(path)
        metadata = dict(file.metadata)
        version = metadata.pop("format_version", None)
        if version is None or "num_examples" not in metadata:
            raise GradmatchError(
                f"{path}: not a curvature file (no format_version and num_examples in its header); "
                "make one with `gradmatch estimate` or Curvature.save",
                "unreadable_file",
                path,
            )
        if version != FORMAT_VERSION:
            raise GradmatchError(
                f"{path}: format version {version}, this library reads {FORMAT_VERSION}; update gradmatch",
                "unreadable_file",
                path,
            )
        text = metadata.pop("num_examples")
        if not text.isdecimal() or int(text) < 1:
            raise GradmatchError(
                f"{path}: num_examples is {text!r}, it must be a whole number of at least 1",
                "out_of_range",
                path,
            )
        check_stored(file)
        curvature = cls(file, int(text), metadata)
        if model is not None and not allow_mismatch:
            curvature.check_model(model_sampler(model), "the given model")
        return curvature

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all: aside, synced, then renamed over `path` (or over the file that it links to).

        Raises:
            OSError: no space, no permission or a folder; `path` is left as it was.
        """
        from safetensors.torch import save_file

        metadata = {**self.info, "format_version": FORMAT_VERSION, "num_examples": str(self.num_examples)}
        blocks = apart({key: self._block(key).contiguous() for key in self._blocks})
        with replacing(path) as aside:
            save_file(blocks, aside, metadata=metadata)

    def __getitem__(self, name: str) -> Tensor:
        return self.mean(name)

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(MEAN) for key in self._blocks if key.startswith(MEAN))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and MEAN + name in self._blocks

    def __repr__(self) -> str:
        seen = self.info.get("examples_seen", "?")
        kind = self.info.get("estimator", "?")
        return f"Curvature({kind}, {len(self)} tensors, N = {self.num_examples}, examples seen = {seen})"

    def to_frame(self) -> Any:
        """The parameters as a pandas DataFrame: shape, mean and trace of each block per example, and which factors there are.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = []
        for name in self:
            block = self.mean(name).double()
            kinds = [
                kind for kind, prefix in (("A", FACTOR_A), ("B", FACTOR_B)) if prefix + name in self._blocks
            ]
            rows.append(
                {
                    "name": name, "shape": tuple(block.shape), "mean": float(block.mean()), "trace": float(block.sum()),
                    "factors": " ".join(kinds),
                }
            )  # fmt: skip
        return frame(rows)

    def _repr_html_(self) -> str:
        told = {"N": self.num_examples, "tensors": len(self), **self.info}
        rows = [
            {"": key, "value": value if len(str(value)) < 80 else f"{str(value)[:76]} ..."}
            for key, value in told.items()
        ]
        return html(repr(self), rows)

    def mean(self, name: str) -> Tensor:
        """Per-example mean of a parameter's curvature, in the parameter's shape (nats per squared unit of weight).

        Raises:
            KeyError: no such parameter.
        """
        return self._block(MEAN + name)

    def total(self, name: str) -> Tensor:
        """Curvature of the summed loss: num_examples * mean(name)."""
        return self.mean(name) * self.num_examples

    def trace(self) -> float:
        """Sum of all mean blocks: the trace of the curvature of one example, in the units that `info["units"]` names.

        Of the summed loss it is num_examples times that. It costs nothing where the file's header states it; else the
        blocks are read one after the other. Two curvatures of comparable models whose traces differ by orders of
        magnitude are not in the same units.
        """
        try:
            stored = float(self.info["trace"])
        except (KeyError, ValueError):
            return self._sum()
        return stored if math.isfinite(stored) else self._sum()

    def _sum(self) -> float:
        from torch import float64

        return math.fsum(float(self.mean(name).sum(dtype=float64)) for name in self)

    def standard_error(self, name: str) -> Tensor | None:
        """Standard error of `mean(name)` over examples (or draws), or None where it was not asked for."""
        key = STANDARD_ERROR + name
        return self._block(key) if key in self._blocks else None

    def gradient(self, name: str) -> Tensor | None:
        """Gradient of the loss summed over num_examples at these weights (true labels), or None where not measured."""
        key = GRADIENT + name
        return self._block(key) if key in self._blocks else None

    def factor_a(self, name: str) -> Tensor | None:
        """Second moments of a layer's inputs per example, (in, in), or None where the block is not a Kronecker product."""
        key = FACTOR_A + name
        return self._block(key) if key in self._blocks else None

    def factor_b(self, name: str) -> Tensor | None:
        """Second moments of the gradients at a layer's outputs, (out, out), or None for the identity."""
        key = FACTOR_B + name
        return self._block(key) if key in self._blocks else None

    @property
    def has_gradient(self) -> bool:
        """Whether the measured gradient was stored."""
        return any(key.startswith(GRADIENT) for key in self._blocks)

    def check_model(self, sample: Callable[[str], Sample], where: str) -> None:
        """Compare the stored fingerprint with that of a model; curvatures without one pass.

        Args:
            sample: parameter name -> (shape, sampled bytes), see `model_sampler` and `sample_file`. KeyError where the
                model has no such parameter.
            where: how to call the model in the error.

        Raises:
            ValueError: another model's curvature.
        """
        stored = self.info.get("fingerprint")
        if stored is None:
            return
        try:
            found = fingerprint(self, sample)
        except KeyError as error:
            raise GradmatchError(
                f"{self._name()} holds parameter {error.args[0]!r}, which {where} lacks; it belongs to another model",
                "other_weights",
                where,
            ) from error
        if found != stored:
            raise GradmatchError(
                f"{self._name()} was taken at other weights than {where} (fingerprint {stored[:12]} against {found[:12]}); "
                "estimate it again at these weights, or pass allow_mismatch=True if you know better",
                "other_weights",
                where,
            )

    def _name(self) -> str:
        return f"the curvature {self.path}" if self.path else "the curvature"

    def _block(self, key: str) -> Tensor:
        if key not in self._blocks:
            raise KeyError(key)
        if isinstance(self._blocks, TensorFile):
            value = self._blocks.read(key)
            return value.float() if value.itemsize < 4 else value  # written by others in half precision
        return self._blocks[key]
