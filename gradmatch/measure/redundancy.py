"""How much of a task vector can be dropped: the redundancy curve of Yu et al. 2024 (DARE)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from torch import Tensor

SHARES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class RedundancyPoint:
    """One point of the curve.

    Attributes:
        dropped: share p of the task vector's entries that were set to zero.
        plain: score with the rest as it was.
        rescaled: score with the rest divided by 1 - p.
    """

    dropped: float
    plain: float
    rescaled: float


def drop(tau: Mapping[str, Tensor], share: float, *, rescale: bool, seed: int = 0) -> dict[str, Tensor]:
    """tau with each entry zeroed with probability p; the rest divided by 1 - p where `rescale`.

    Each tensor draws from a generator of its own name, so that order does not matter.

    Raises:
        ValueError: a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise GradmatchError(f"the dropped share must be in [0, 1), got {share}", "out_of_range")
    kept = {}
    for name, value in tau.items():
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        mask = torch.rand(value.shape, generator=generator) >= share
        kept[name] = value * mask / (1 - share if rescale else 1.0)
    return kept


def redundancy_curve(
    base: Mapping[str, Tensor],
    tau: Mapping[str, Tensor],
    score: Callable[[Mapping[str, Tensor]], float],
    shares: Sequence[float] = SHARES,
    *,
    seed: int = 0,
) -> list[RedundancyPoint]:
    """Score theta0 + drop(tau, p) for each p, plain and rescaled.

    Args:
        base: theta0 by name.
        tau: the task vector by name.
        score: of a model's weights; e.g. `Objective.loss`, in nats.
        shares: of entries to drop.
        seed: of the draws.
    """

    def scored(share: float, rescale: bool) -> float:
        dropped = drop(tau, share, rescale=rescale, seed=seed)
        return score({name: base[name] + value for name, value in dropped.items()})

    curve = []
    for share in shares:
        plain = scored(share, False)
        curve.append(RedundancyPoint(share, plain, scored(share, True) if share else plain))
    return curve
