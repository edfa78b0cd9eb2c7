"""The preconditioned mismatch ||H0^-1 m|| (Eq. 10) at any floor delta0 of H0 = h0 + delta0, from a small table.

A gradient is measured once, and the floor is a choice: sum_i m_i^2 / (h0_i + delta0)^2 is read off a histogram of h0 whose bins are 1/256
of an octave wide and hold the sum of m_i^2 and the mean of h0 that m_i^2 weighs. The first-order error within a bin is nothing, and the
second-order one below 1e-5 of the sum, at any floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

FILE = "preconditioned.npz"
SHIFT, BINS = (
    15,
    2**16,
)  # of a float32's bits, the sign (0), the exponent and 8 bits of the fraction number a bin


def save(out: Path, vectors: Mapping[str, Tensor], h0: Mapping[str, Tensor]) -> None:
    """Write the table of a mismatch m and the base's curvature h0, by tensor; a tensor that h0 lacks has 0.

    Raises:
        ValueError: a negative curvature (tensor named).
    """
    import torch

    squares, weighted = torch.zeros(2, BINS, dtype=torch.float64)
    for name, vector in vectors.items():
        m = vector.detach().cpu().double().flatten().square()
        h = h0[name].detach().cpu().float().flatten() if name in h0 else torch.zeros(len(m))
        if (h < 0).any():
            raise ValueError(f"{name}: the base's curvature is negative on {int((h < 0).sum())} weights")
        bins = h.abs().view(torch.int32) >> SHIFT  # abs: a zero may have a sign
        squares += torch.bincount(bins, m, BINS)
        weighted += torch.bincount(bins, m * h, BINS)
    used = squares > 0
    np.savez(out / FILE, h=(weighted[used] / squares[used]).numpy(), squares=squares[used].numpy())


def norm(folder: Path, delta0: float) -> float | None:
    """||(h0 + delta0)^-1 m|| of the table in a folder; None where it is infinite: without a floor, where h0 is 0 and m is not."""
    with np.load(folder / FILE) as table:
        h, squares = table["h"] + delta0, table["squares"]
    return float(np.sqrt((squares / h**2).sum())) if (h > 0).all() else None
