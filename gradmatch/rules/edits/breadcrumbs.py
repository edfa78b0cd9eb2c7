"""Model breadcrumbs: neither the largest entries nor the smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.rules.edits.ties import kept_count

if TYPE_CHECKING:
    from torch import Tensor


def breadcrumbs(tau: Tensor, density: float, gamma: float) -> Tensor:
    """Davari & Belilovsky 2024: per tensor, mask the share gamma of largest |tau|, keep the next `density`, mask the rest.

    tau: (T, *s). Returns (T, *s). Where gamma + density > 1 the density is kept and fewer outliers are masked. At least
    one entry stays. Equal magnitudes are told apart by position, so the count kept is exact.
    """
    flat = tau.reshape(tau.shape[0], -1)
    n = flat.shape[1]
    kept = kept_count(density, n)
    outliers = min(int(gamma * n + 1e-9), n - kept)
    order = flat.abs().argsort(dim=1, descending=True, stable=True)[:, outliers : outliers + kept]
    mask = flat.new_zeros(flat.shape).scatter_(1, order, 1.0)
    return (flat * mask).reshape(tau.shape)
