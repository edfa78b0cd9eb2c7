"""What the blocks of a `Curvature` must be, given as tensors or found in a file's header."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.tensorfile import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

MEAN, STANDARD_ERROR, GRADIENT = "mean/", "standard_error/", "gradient/"
FACTOR_A, FACTOR_B = "factor_a/", "factor_b/"


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of examples; numpy's whole numbers are."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if int(value) < 1:
        raise GradmatchError(f"{name} must be at least 1, got {value}", "out_of_range", name)


def units(num_examples: int, of: str = "nats") -> str:
    """What `info["units"]` says of mean blocks."""
    return f"{of} per example; of the loss summed over N = {num_examples} examples, N times as much"


def check_kind(prefix: str, name: object, value: object) -> None:
    """Refuse what has no values of a curvature."""
    import torch

    if not isinstance(name, str):
        raise TypeError(f"blocks go by the names of parameters, got {name!r}")
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.layout != torch.strided:
        kind = f"{value.layout} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{prefix}{name} is a {kind}, it must be a dense tensor of real numbers")


def check_stored(file: TensorFile) -> None:
    """What a header tells about blocks that others wrote: `save` writes no such file."""
    means = {key.removeprefix(MEAN): info.shape for key, info in file.items() if key.startswith(MEAN)}
    if not means:
        raise GradmatchError(
            f"{file.path}: a curvature file without a single mean: its names begin with {MEAN!r}",
            "bad_curvature",
            file.path,
        )
    for key, info in file.items():
        if not key.startswith((MEAN, STANDARD_ERROR, GRADIENT, FACTOR_A, FACTOR_B)):
            continue
        if info.dtype not in ("F64", "F32", "F16", "BF16"):
            raise GradmatchError(
                f"{file.path}: {key} is {info.dtype}, a curvature is of floating-point numbers",
                "bad_curvature",
                file.path,
            )
        wanted = means.get(key.partition("/")[2])
        if key.startswith((STANDARD_ERROR, GRADIENT)) and info.shape != wanted:
            has = "no mean at all" if wanted is None else str(list(wanted))
            raise GradmatchError(
                f"{file.path}: {key} has shape {list(info.shape)}, its mean has {has}",
                "shape_mismatch",
                file.path,
            )


def apart(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks in memory of their own where several lie in the same: the format refuses to write them."""
    met: set[int] = set()
    found = {}
    for key, value in blocks.items():
        place = value.untyped_storage().data_ptr()
        found[key] = value.clone() if place in met else value
        met.add(place)
    return found


def checked(key: str, value: Tensor) -> Tensor:
    """A finite floating tensor of at least single precision, detached."""
    import torch

    value = value.detach()
    if value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32)
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise GradmatchError(f"{key}: {bad} of {value.numel()} values are NaN or infinite", "not_finite", key)
    return value
