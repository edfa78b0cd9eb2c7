"""The system restricted to a basis: x = U Z V', with the directions of TSV-M for U and V, so that TSV-M is its limit H = I."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmatch.rules.beliefs import Known
from gradmatch.rules.kronecker import solved
from gradmatch.rules.matrix_options import is_exact
from gradmatch.rules.rule import Elementwise, Solve
from gradmatch.rules.singular import polar, triplets
from gradmatch.rules.structures import Basis, Product, Structure, Sum

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Curved


def tsv_basis(eq12: Elementwise) -> Solve:
    """Eq. 12 for the coordinates Z of every matrix in the singular directions of the task vectors.

    Of every tau_t the first r/T singular triplets U_t S_t V_t' are kept, U and V are the polar factors of all U_t and V_t side by side,
    and task t says "Z is S_t in its own rows and columns, and 0 elsewhere", with the precision that H_t has there: B (x) A becomes
    (U'BU) (x) (V'AV), a diagonal its diagonal in the basis. Where all curvatures are the same multiple of I, it is TSV-M.
    """

    def solve(theta0: Tensor, tau: Tensor, alpha: Sequence[float], curved: Curved) -> Tensor:
        import torch

        counted = [t for t, weight in enumerate(alpha) if weight]  # a task of weight 0 is none
        kept = max(1, min(theta0.shape) // max(1, len(counted)))
        found = [triplets(tau[t], kept) for t in counted]
        sizes = [len(s) for _, s, _ in found]
        if not sum(sizes):
            return theta0
        basis = Basis(
            polar(torch.cat([u for u, _, _ in found], 1)), polar(torch.cat([v for _, _, v in found])).mT
        )
        z = theta0.new_zeros(len(counted), sum(sizes), sum(sizes))
        for t, (_, s, _) in enumerate(found):
            first = sum(sizes[:t])
            z[t].diagonal()[first : first + len(s)] = s
        inside = Known(
            z.new_zeros(z.shape[1:]), z, [alpha[t] for t in counted], restricted(curved.h0, basis, theta0), [restricted(curved.h[t], basis, theta0) for t in counted],
            None, None, 0.0, curved.delta0, curved.options,
        )  # fmt: skip
        return theta0 + basis.back(solved("gradient_matching", eq12, inside, curved.health))

    return Solve(
        "theta0 + U Z V', Z by Eq. 12 in the singular directions U, V of the task vectors",
        "Eq. 12 in TSV-M's basis (after EpiMer)",
        solve,
        otherwise=eq12,
        options=eq12.options,
        needs=eq12.needs,
        single=lambda options: not is_exact(options),
        whole=True,
        lacks={"equal": "every task keeps its share of the singular triplets"},
    )


def restricted(structure: Structure, basis: Basis, like: Tensor) -> Structure:
    """U' H(U Z V') V as a map of Z (k, k); of a diagonal that is no number, its diagonal in the basis."""
    assert basis.u is not None
    assert basis.v is not None
    parts = []
    for term in structure.terms:
        flat: Tensor | float = term.diagonal
        if not isinstance(flat, (int, float)):
            flat = basis.diagonal(Product(diagonal=flat), like)
        a = None if term.a is None else basis.v.mT @ term.a @ basis.v
        b = None if term.b is None else basis.u.mT @ term.b @ basis.u
        parts.append(Product(term.scale, a, b, flat))
    return Sum(tuple(parts))
