"""Loss along straight paths: from the base to a merge, and between fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from torch import Tensor

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - s) start + s end over the floating tensors of both; others are taken from `end`. Extrapolates outside [0, 1].

    In float32 or more: half precision would round points between its own.
    """

    def between(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point() or name not in start:
            return value
        wide = torch.promote_types(torch.promote_types(start[name].dtype, value.dtype), torch.float32)
        return torch.lerp(start[name].to(wide), value.to(wide), share)

    return {name: between(name, value) for name, value in end.items()}


def barrier_height(path: Sequence[tuple[float, float]]) -> float:
    """max_s [l(s) - ((1 - s) l(0) + s l(1))]: how far the path rises above the straight line (Frankle et al. 2020).

    Raises:
        ValueError: fewer than two points.
    """
    if len(path) < 2:
        raise GradmatchError(f"a barrier needs the loss at both ends, got {len(path)} points", "bad_data")
    (first, low), (last, high) = path[0], path[-1]
    return max(loss - (low + (high - low) * (share - first) / (last - first)) for share, loss in path)
