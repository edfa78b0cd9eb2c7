"""The strategies of a greedy climb: which candidates it tries, and in which mixtures (Model-GLUE, Zhao et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Weights = dict[str, float]
GRID = tuple(n / 10 for n in range(1, 10))  # the shares of what stands
Likeness = Callable[[Weights, str], float]


@dataclass(frozen=True)
class Strategy:
    """How the climb goes on.

    Attributes:
        order: (names that are left, best first alone; what stands; likeness) -> the names that are tried in this round.
        mixtures: (what stands, how many models that are, a name) -> the weights that are tried with it.
        again: whether names that were tried and not taken are tried again in later rounds.
        likens: whether `order` asks for likeness.
    """

    order: Callable[[Sequence[str], Weights, Likeness], Sequence[str]]
    mixtures: Callable[[Weights, int, str], list[Weights]]
    again: bool = False
    likens: bool = False


def mixed(standing: Weights, name: str, share: float) -> Weights:
    """share * what stands + (1 - share) * one more model.

    >>> mixed({"a": 1.0}, "b", 0.75)
    {'a': 0.75, 'b': 0.25}
    """
    found = {own: share * weight for own, weight in standing.items()}
    found[name] = found.get(name, 0.0) + 1 - share
    return found


def evenly(standing: Weights, count: int, name: str) -> list[Weights]:
    """The mean of all that were taken and one more: k/(k+1) of what stands, 1/(k+1) of the model."""
    return [dict.fromkeys((*standing, name), 1 / (count + 1))]


def by_share(standing: Weights, count: int, name: str) -> list[Weights]:
    """What stands with a share of .1 to .9."""
    return [mixed(standing, name, share) for share in GRID]


def next_best(left: Sequence[str], standing: Weights, alike: Likeness) -> Sequence[str]:
    """The best of those that are left, alone."""
    return left[:1]


STRATEGIES = {
    "average": Strategy(next_best, evenly),
    "greedy_soup": Strategy(next_best, evenly),
    "coefficient": Strategy(next_best, by_share),
    "most_similar": Strategy(
        lambda left, now, alike: [max(left, key=lambda name: alike(now, name))], evenly, likens=True
    ),
    "least_similar": Strategy(
        lambda left, now, alike: [min(left, key=lambda name: alike(now, name))], evenly, likens=True
    ),
    "exhaustive": Strategy(lambda left, now, alike: left, evenly, again=True),
}
