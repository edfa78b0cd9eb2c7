"""Families: which models of a zoo can be merged with which, and what the others would need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.zoo.alike import Similarity, opened_for, similarity_of
from gradmatch.zoo.cards import tokenizer_of
from gradmatch.zoo.finding import Models
from gradmatch.zoo.pairs import aligned, layout

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

STRANGERS = 0.5  # cosine of weights below which two models of one layout were drawn from other random weights


@dataclass(frozen=True)
class Apart:
    """Why a family does not go with the largest one.

    Attributes:
        members: of the family.
        kind: "shapes", "tokenizer", "initialisation", "broken" or "distance".
        why: in words, with both values.
        helps: the wing that can bring them together: "rebasin", "mixture", or "" where none can.
    """

    members: tuple[str, ...]
    kind: str
    why: str
    helps: str


@dataclass(frozen=True)
class Families:
    """A partition of the models of a zoo.

    Attributes:
        families: names of the members, each model in exactly one; the largest first.
        apart: why each of the others is not one with the largest.
        similarity: what they were told apart by.
        threshold: the least mean similarity of two families that become one.
        skipped: place -> why no model was read there.
    """

    families: list[tuple[str, ...]]
    apart: list[Apart]
    similarity: Similarity
    threshold: float
    skipped: dict[str, str]

    def of(self, name: str) -> tuple[str, ...]:
        """The family of a model.

        Raises:
            GradmatchError: no such model.
        """
        for family in self.families:
            if name in family:
                return family
        names = [name for family in self.families for name in family]
        choose("model", name, names)
        raise AssertionError

    def to_dict(self) -> dict[str, Any]:
        """What `gradmatch zoo cluster --json` prints."""
        return {
            "families": [list(family) for family in self.families],
            "apart": [asdict(one) for one in self.apart],
            "threshold": self.threshold,
            "similarity": self.similarity.to_dict(),
            "skipped": self.skipped,
        }

    def summary(self) -> str:
        """The families as text, with what the others would need."""
        lines = []
        why = {one.members: one for one in self.apart}
        for number, family in enumerate(self.families, 1):
            inside = [self.similarity.of(a, b) for a in family for b in family if a < b]
            told = f", {self.similarity.by} similarity {min(inside):.3f} or more" if inside else ""
            lines.append(f"family {number}: {', '.join(family)}{told}")
            if family in why:
                helps = HELP.get(why[family].helps, "")
                lines.append(f"  apart: {why[family].why}{f'; {helps}' if helps else ''}")
        return "\n".join([*lines, *(f"skipped {place}: {why}" for place, why in self.skipped.items())])


HELP = {
    "rebasin": "re-basin may bring it over (`gradmatch align`), a mixture of experts does without (`gradmatch mix`)",
    "mixture": "a mixture of experts can hold both (`gradmatch mix`)",
    "tokenizer": "a merge needs a common vocabulary: `tokenizer` or `embeddings` of `gradmatch merge` say whose",
}


def cluster(
    models: Models,
    threshold: float = 0.95,
    by: str = "weights",
    *,
    base: Model | None = None,
    allow_pickle: bool = False,
    progress: bool = False,
) -> Families:
    """Divide a zoo into families that can be merged; every model is in exactly one.

    Models of other layers or another vocabulary are never of one family. Among the rest, families become one while their mean similarity is
    at least `threshold` (average linkage), which does not depend on the order of the models.

    Args:
        models: as for `inspect`.
        threshold: the least mean similarity; with cosines of weights fine-tunes of one base are above .95 and strangers far below.
        by: "weights", "task_vectors", "mismatch" or "gradients", see `similarity`.
        base: needed for "task_vectors" and "mismatch".
        allow_pickle: read .bin and .pt files too.
        progress: show a progress bar.

    Raises:
        GradmatchError: a threshold outside [-1, 1], an unknown measure, or as `inspect`.

    >>> import torch
    >>> w = torch.tensor([3.0, 4.0])
    >>> cluster({"a": {"w": w}, "b": {"w": w + 0.1}, "c": {"w": -w}}).families
    [('a', 'b'), ('c',)]
    """
    if not -1 <= threshold <= 1:
        raise GradmatchError(f"threshold is {threshold}, it must lie in [-1, 1]", "out_of_range", "threshold")
    found, opened = opened_for(by, models, base, allow_pickle)
    return families_of(similarity_of(found, opened, by, progress), opened, threshold)


def families_of(alike: Similarity, base: Checkpoint | None, threshold: float) -> Families:
    """`cluster` from similarities that are there."""
    models = aligned(alike.found.opened, base)
    kinds = _kinds(alike, models)
    families: list[list[int]] = []
    for kind in dict.fromkeys(kinds):
        members = [place for place, own in enumerate(kinds) if own == kind]
        families += _linked(alike.matrix, members, threshold)
    families.sort(key=lambda family: (-len(family), family))
    named = [tuple(alike.names[place] for place in family) for family in families]
    apart = [_why(alike, models, named[0], family, threshold) for family in named[1:]]
    return Families(named, apart, alike, threshold, alike.found.skipped)


def _kinds(alike: Similarity, models: dict[str, Checkpoint]) -> list[object]:
    """What must be alike in all models of a family: layers and vocabulary. A model with broken weights is one of its own."""
    known: list[str] = [tokenizer_of(model) for model in models.values()]
    layouts = [tuple(sorted(layout(model).items())) for model in models.values()]
    # a model without a tokenizer goes with those of its layers that have one, where these have one alone
    only = {
        own: next(iter(found)) if len(found) == 1 else ""
        for own in set(layouts)
        for found in [{k for k, one in zip(known, layouts, strict=True) if one == own and k}]
    }
    return [
        ("broken", name) if name in alike.pairs.broken else (own, token or only[own])
        for name, own, token in zip(models, layouts, known, strict=True)
    ]


def _linked(matrix: Any, members: Sequence[int], threshold: float) -> list[list[int]]:
    """Average linkage of some models, cut at the threshold."""
    if len(members) == 1:
        return [list(members)]
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    distance = np.maximum(1 - matrix[np.ix_(members, members)], 0.0)
    np.fill_diagonal(distance, 0.0)
    joined = linkage(squareform((distance + distance.T) / 2, checks=False), "average")
    labels = fcluster(joined, 1 - threshold + 1e-12, "distance")
    return [
        [m for m, own in zip(members, labels, strict=True) if own == label] for label in dict.fromkeys(labels)
    ]


def _why(
    alike: Similarity,
    models: dict[str, Checkpoint],
    first: tuple[str, ...],
    family: tuple[str, ...],
    threshold: float,
) -> Apart:
    """What keeps a family from the largest."""
    one, other = first[0], family[0]
    if other in alike.pairs.broken:
        return Apart(
            family, "broken", f"{other} holds NaN or infinite weights, which nothing can be made of", ""
        )
    if difference := _first_difference(models[one], models[other], one, other):
        return Apart(
            family, "shapes", difference, "mixture" if _takes_the_same(models[one], models[other]) else ""
        )
    tokens = [tokenizer_of(models[name]) for name in (one, other)]
    if all(tokens) and tokens[0] != tokens[1]:
        return Apart(
            family,
            "tokenizer",
            f"the vocabulary of {other} is {tokens[1]}, that of {one} is {tokens[0]}: ids mean other words",
            "tokenizer",
        )
    i, j = alike.names.index(one), alike.names.index(other)
    pairs = alike.pairs
    scale = np.sqrt(max(pairs.square[i, j] * pairs.square[j, i], 1e-300))
    cosine = float(pairs.dot[i, j] / scale)
    if cosine < STRANGERS:
        return Apart(
            family,
            "initialisation",
            f"the cosine of the weights of {other} and {one} is {cosine:.3f}: they were trained from other random weights, or their neurons stand in "
            "another order",
            "rebasin",
        )
    value = float(np.mean([alike.of(a, b) for a in first for b in family]))
    return Apart(
        family,
        "distance",
        f"its mean {alike.by} similarity to the largest family is {value:.3f}, below the threshold of {threshold:g}",
        "mixture",
    )


def _first_difference(one: Checkpoint, other: Checkpoint, a: str, b: str) -> str:
    """The first tensor of the layers that two models do not have alike, with both shapes; "" where there is none."""
    ours, theirs = layout(one), layout(other)
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in ours or name not in theirs:
            return f"tensor {name!r} is in {a if name in ours else b} and not in {b if name in ours else a}"
        if ours[name] != theirs[name]:
            return f"tensor {name!r} has shape {list(theirs[name])} in {b} and {list(ours[name])} in {a}"
    return ""


def _takes_the_same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two models of other shapes read the same tokens, so that a mixture of whole models can hold both."""
    tokens = [tokenizer_of(model) for model in (one, other)]
    return tokens[0] == tokens[1] != ""
