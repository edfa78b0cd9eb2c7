"""Whether curvatures of several models are in the same units: their sizes, and who estimated them, compared before a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from gradmatch.estimators.curvature import MEAN
from gradmatch.estimators.fingerprint import sum_of
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.curvatures import blocks

if TYPE_CHECKING:
    from gradmatch.estimators.curvature import Curvature

# Measured (experiments/results): Fisher, GGN and batch estimates of one model are .6 to 3.2 times one another, Adam's second moments 9 to
# 17 times smaller; Fishers of two language-model tasks 6 times, of three domains 1.1 times apart; texts ten times as long add a factor
# of ten. A mean over tokens taken for their sum is a factor of 70 on short texts, clipped gradients are one of thousands.
SAME_ESTIMATOR, OTHER_ESTIMATOR = 100.0, 30.0
HOPELESS = 1000.0  # of estimates that were made in different ways: no data explain that
BLOCKS, BLOCK = 16, 1024  # of a tensor are read: 64 kB of any file's largest


@dataclass(frozen=True)
class Apart:
    """Two curvatures whose sizes the numbers of examples do not explain.

    Attributes:
        larger, smaller: whose curvatures.
        ratio: of the traces per example, in the median tensor; inf where the smaller is zero in most tensors.
        differently: whether they were estimated in different ways.
        text: all of it in a sentence.
    """

    larger: str
    smaller: str
    ratio: float
    differently: bool
    text: str

    @property
    def hopeless(self) -> bool:
        """Whether no data explain the ratio, so that a merge refuses."""
        return self.differently and self.ratio > HOPELESS


def compare_units(curvatures: Mapping[str, Curvature]) -> list[Apart]:
    """Compare traces per example, which do not depend on the numbers of examples, each curvature against the middle one.

    Only names that two curvatures share count, tensor by tensor, so that a few very uneven tensors do not decide; of large
    tensors some evenly spaced blocks are read, the same of every curvature. Curvatures that are zero everywhere know
    nothing, which rules are made for, and are left out.

    Args:
        curvatures: whose ("base", a task) -> its curvature.

    Returns:
        One entry a curvature that is too far from the middle one; empty where all fit.
    """
    traces = {who: sampled_traces(curvature) for who, curvature in curvatures.items()}
    traces = {who: found for who, found in traces.items() if any(value > 0 for value in found.values())}
    if len(traces) < 2:
        return []
    order = sorted(traces, key=lambda who: sum(traces[who].values()))
    # The two in the middle, of an even number: the one that was estimated as most of them were.
    kinds = [estimated(curvatures[who]) for who in order]
    middle = max(
        order[(len(order) - 1) // 2 : len(order) // 2 + 1],
        key=lambda who: kinds.count(estimated(curvatures[who])),
    )
    found = (_apart(middle, who, traces, curvatures) for who in order if who != middle)
    return [apart for apart in found if apart is not None]


def sampled_traces(curvature: Curvature) -> dict[str, float]:
    """Sum of each block's per-example means (nats per squared unit of weight); of large blocks, estimated from BLOCKS parts."""
    store, file, traces = blocks(curvature), TensorFile(curvature.path) if curvature.path else None, {}

    def total(name: str, first: int, last: int) -> float:
        if file is not None:  # without torch: a dry run does not load it
            return sum_of(file, MEAN + name, first, last)
        return float(store.block(name, first, last).double().sum())

    for name in curvature:
        numel = store.spec(name).numel
        if numel <= BLOCKS * BLOCK:
            traces[name] = total(name, 0, numel)
            continue
        starts = [round(i * (numel - BLOCK) / (BLOCKS - 1)) for i in range(BLOCKS)]
        parts = [total(name, start, start + BLOCK) for start in starts]
        traces[name] = sum(parts) * numel / (BLOCKS * BLOCK)
    return traces


def estimated(curvature: Curvature) -> tuple[str, ...]:
    """How a curvature was made, as far as its units go: estimator, reduction."""
    return tuple(curvature.info.get(key, "") for key in ("estimator", "reduction"))


def _apart(
    a: str, b: str, traces: Mapping[str, Mapping[str, float]], curvatures: Mapping[str, Curvature]
) -> Apart | None:
    """How far apart two curvatures are; None where that is nothing to tell of."""
    shared = [n for n in traces[a] if n in traces[b] and (max(traces[a][n], traces[b][n]) > 0)]
    if not shared:
        return None
    quotient = median(traces[a][n] / traces[b][n] if traces[b][n] > 0 else float("inf") for n in shared)
    larger, smaller = (a, b) if quotient >= 1 else (b, a)
    ratio = max(quotient, 1 / quotient if quotient > 0 else float("inf"))
    differently = estimated(curvatures[a]) != estimated(curvatures[b])
    if ratio <= (OTHER_ESTIMATOR if differently else SAME_ESTIMATOR):
        return None
    told = [
        f"{who}'s is {sum(max(0.0, traces[who][n]) for n in shared):.3g} ({curvatures[who].info.get('estimator', '?')}, "
        f"{curvatures[who].info.get('examples_seen', '?')} examples seen)"
        for who in (larger, smaller)
    ]
    verdict = (
        "not in the same units"
        if differently
        else "far apart (other units, or a model that is certain of its data)"
    )
    return Apart(
        larger, smaller, ratio, differently,
        f"the curvatures are {verdict}: per example, the trace of {told[0]} and {told[1]}, {ratio:.3g} times apart in the "
        "median tensor, which no number of examples explains",
    )  # fmt: skip
