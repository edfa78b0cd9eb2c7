"""Model breadcrumbs: neither the largest entries nor the smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.rules.edits.ties import kept_count, whole_part

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Cut


def ranks(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """(outliers, outliers + kept) of `numel` entries: the last masked outlier and the last kept entry, by rank from the largest.

    Where gamma + density > 1 the density is kept and fewer outliers are masked. At least one entry stays.

    Example:
        >>> ranks(0.4, 0.1, 10)
        (1, 5)
    """
    kept = kept_count(density, numel)
    outliers = min(whole_part(gamma, numel), numel - kept)
    return outliers, outliers + kept


def breadcrumbs(tau: Tensor, outliers: Cut, kept: Cut, first: int = 0) -> Tensor:
    """Davari & Belilovsky 2024: per tensor, mask the share gamma of largest |tau|, keep the next `density`, mask the rest.

    tau: (T, *s), a piece that begins at place `first` of its tensor; the cuts are at `ranks`. Returns (T, *s). Equal
    magnitudes are told apart by position, so the count kept is exact.
    """
    # torch multiplies by floats several times faster than by booleans
    return tau * (kept.holds(tau, first) & ~outliers.holds(tau, first)).to(tau.dtype)
