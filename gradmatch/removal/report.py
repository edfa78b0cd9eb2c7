"""What a removal did: which layers moved, by how much in the H0 norm, and how often the guard stepped in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradmatch.common.layers import layer_group
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Model
from gradmatch.removal.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor


def removal_report(problem: Problem, alpha: float, result: Model | None = None) -> dict[str, Any]:
    """JSON-ready report of a removal: total and per layer, the layers that moved most first.

    Args:
        problem: what was removed from what, and how.
        alpha: with which strength.
        result: the edited model as it was written; None: as the formula gives it, before any rounding.

    Returns:
        method, alpha, and `total` and `layers` with: `norm` ||d||; `h0_norm` sqrt(d'H0 d), in sqrt(nats); `h0_share`, the
        layer's share of d'H0 d; `relative`, ||d|| / ||tau||; `clamped`, the share of coordinates that the guard decided.

    Raises:
        ValueError: a result that lacks a tensor or holds other shapes.
    """
    made = problem.at(alpha)
    written: Mapping[str, Tensor] = made if result is None else open_checkpoint(result)
    sums: dict[str, dict[str, float]] = {}
    for piece in problem.pieces():
        if piece.name not in written or written[piece.name].shape != piece.theta0.shape:
            raise GradmatchError(
                f"the result lacks {piece.name!r} or holds it in another shape; it is no edit of this base",
                "shape_mismatch",
                piece.name,
            )
        d = written[piece.name].to(piece.theta0) - piece.theta0
        part = {
            "moved": float(d.double().square().sum()),
            "h0": float((piece.h0.double() * d.double().square()).sum()),
            "tau": float(piece.tau.double().square().sum()),
            "clamped": float(round(made.report.clamped.get(piece.name, 0.0) * d.numel())),
            "numel": float(d.numel()),
        }
        layer = sums.setdefault(layer_group(piece.name), dict.fromkeys(part, 0.0))
        for key, value in part.items():
            layer[key] += value
    total = {key: sum(layer[key] for layer in sums.values()) for key in next(iter(sums.values()))}
    layers = sorted(sums, key=lambda name: -sums[name]["h0"])
    return {
        "method": problem.method,
        "alpha": alpha,
        "h0": {"base_weight": problem.base_weight, "delta0": problem.delta0, "keep": problem.keep},
        "total": _line(total, total["h0"]),
        "layers": [{"layer": name, **_line(sums[name], total["h0"])} for name in layers],
    }


def _line(sums: Mapping[str, float], total_h0: float) -> dict[str, float]:
    """Norms and shares from sums of squares and counts."""
    return {
        "norm": math.sqrt(sums["moved"]),
        "h0_norm": math.sqrt(sums["h0"]),
        "h0_share": sums["h0"] / total_h0 if total_h0 else 0.0,
        "relative": math.sqrt(sums["moved"] / sums["tau"]) if sums["tau"] else 0.0,
        "clamped": sums["clamped"] / sums["numel"],
    }


def report_table(report: Mapping[str, Any], rows: int = 8) -> str:
    """The report as text: the total, then the layers that moved most in the H0 norm."""
    lines = [f"{report['method']} with alpha = {report['alpha']:g}"]
    lines.append(f"{'layer':32} {'|d|':>9} {'|d|/|tau|':>9} {'H0 norm':>9} {'share':>6} {'clamped':>8}")
    shown = [{"layer": "total", **report["total"]}, *report["layers"][:rows]]
    for line in shown:
        lines.append(
            f"{line['layer'][-32:]:32} {line['norm']:9.4g} {line['relative']:9.3f} {line['h0_norm']:9.4g} "
            f"{line['h0_share']:6.1%} {line['clamped']:8.3%}"
        )
    if len(report["layers"]) > rows:
        lines.append(f"... and {len(report['layers']) - rows} more layers")
    return "\n".join(lines)
