"""One card a model: what it is, what it descends from and how far it went; and the zoo of all of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmatch.models.opening import open_checkpoint
from gradmatch.models.tokenizers import rows_of, vocabulary
from gradmatch.plan.printed import readable
from gradmatch.zoo.alike import Similarity, similarity_of
from gradmatch.zoo.finding import Models, find, strays
from gradmatch.zoo.pairs import Pairs, floating

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

KIN = 0.9  # cosine of the weights of two models of which one may descend from the other
AMID = 0.75  # squared distance of fine-tunes to their base by that among them: 1/2 where updates are orthogonal, 1 of any sibling


@dataclass(frozen=True)
class Card:
    """What is known of one model from its files.

    Attributes:
        name: in the zoo.
        architecture: the class that its config names, or how many tensors it has where there is no config.
        parameters: number of its weights.
        bytes: of its weights on disk.
        dtype: of most of its weights, as safetensors spells it.
        tokenizer: a short hash of its vocabulary; "" where it has no tokenizer.
        vocabulary: rows of its embeddings, as the config says.
        head: the classes that it tells apart, by name; none of a model without such a head.
        adapter: whether it is an adapter on a base.
        base: the model that it descends from, by its name in the zoo; "base" for the one that was given; "" where none is near.
        distance: ||theta - theta_0|| / ||theta_0|| to that base, over what both share; None without one.
        cosine: of its weights with that base's.
        update: ||theta - theta_0||.
        notes: what else is to be known: equal models, files that are not read, broken weights.
    """

    name: str
    architecture: str
    parameters: int
    bytes: int
    dtype: str
    tokenizer: str
    vocabulary: int | None
    head: tuple[str, ...]
    adapter: bool
    base: str
    distance: float | None
    cosine: float | None
    update: float | None
    notes: tuple[str, ...]


class Zoo(Mapping[str, Card]):
    """The cards of all models by name, with the matrix of their similarities.

    Attributes:
        similarity: by weights, or as it was asked for.
        skipped: place -> why no model was read there.
    """

    def __init__(self, cards: Sequence[Card], similarity: Similarity) -> None:
        self._cards = {card.name: card for card in cards}
        self.similarity, self.skipped = similarity, similarity.found.skipped

    def __getitem__(self, name: str) -> Card:
        return self._cards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cards)

    def __len__(self) -> int:
        return len(self._cards)

    def __repr__(self) -> str:
        return f"Zoo({len(self)} models: {', '.join(self)})"

    def to_dict(self) -> dict[str, Any]:
        """What `gradmatch zoo inspect --json` prints."""
        cards = [asdict(card) for card in self.values()]
        return {"models": cards, "similarity": self.similarity.to_dict(), "skipped": dict(self.skipped)}

    def summary(self) -> str:
        """The cards and the matrix as text."""
        width = max(len(name) for name in self)
        lines = [f"{len(self)} models"]
        for card in self.values():
            way = ""
            if card.base:
                way = f"  from {card.base}: distance {card.distance:.4g}, cosine {card.cosine:.4f}"
            what = f"{card.architecture}, {card.parameters:,} weights, {readable(card.bytes)} {card.dtype}"
            if card.head:
                listed = ", ".join(card.head[:4]) + (", ..." if len(card.head) > 4 else "")
                what += f", {len(card.head)} classes ({listed})"
            if card.tokenizer:
                what += f", tokenizer {card.tokenizer}"
            lines.append(f"  {card.name:<{width}}  {what}{', adapter' if card.adapter else ''}{way}")
            lines += [f"  {'':<{width}}  note: {note}" for note in card.notes]
        lines += [f"skipped {place}: {why}" for place, why in self.skipped.items()]
        return "\n".join([*lines, *self.similarity.table()])


def inspect(
    models: Models,
    base: Model | None = None,
    *,
    by: str = "weights",
    allow_pickle: bool = False,
    progress: bool = False,
) -> Zoo:
    """Look at every model of a zoo in one pass over the files, a range of values at a time.

    Args:
        models: name -> model, or a list of models, tasks and folders of models, or one such folder.
        base: the model that they were fine-tuned from; None: where one of the models lies amid the others, it is taken as their base.
        by: the measure of the matrix, see `similarity`.
        allow_pickle: read .bin and .pt files too.
        progress: show a progress bar.

    Returns:
        A mapping of names to cards, with `.similarity`, `.skipped`, `.summary()` and `.to_dict()`.

    Raises:
        GradmatchError: no model, two of one name, or a named model that cannot be read.
        FileNotFoundError: a named model is not there.

    >>> import torch
    >>> zoo = inspect({"a": {"w": torch.ones(4)}, "b": {"w": torch.full((4,), 1.5)}}, base={"w": torch.ones(4)})
    >>> zoo["b"].distance, zoo["a"].notes
    (0.5, ('equals the base in every weight',))
    """
    opened = None if base is None else open_checkpoint(base, allow_pickle=allow_pickle)
    found = find(models, opened, allow_pickle=allow_pickle)
    alike = similarity_of(found, opened, by, progress)
    pairs = alike.pairs
    near = _given_base(pairs) if opened is not None else _amid(pairs)
    cards = []
    for place, (name, model) in enumerate(found.opened.items()):
        whence, distance, cosine, update = near.get(name, ("", None, None, None))
        shapes = floating(model)
        kinds = Counter(model.spec(one).dtype for one in shapes for _ in range(1))
        weights = {
            kind: sum(model.spec(o).numel for o in shapes if model.spec(o).dtype == kind) for kind in kinds
        }
        config = model.config or {}
        classes = (
            config.get("id2label")
            if any("Classification" in a for a in config.get("architectures") or ())
            else None
        )
        cards.append(
            Card(
                name=name,
                architecture=_architecture(model),
                parameters=sum(weights.values()),
                bytes=sum(model.spec(one).nbytes for one in model.store),
                dtype=max(weights, key=lambda kind: weights[kind], default="none"),
                tokenizer=tokenizer_of(model),
                vocabulary=rows_of(config),
                head=tuple(str(label) for label in classes.values()) if isinstance(classes, Mapping) else (),
                adapter=model.under is not None,
                base=whence,
                distance=distance,
                cosine=cosine,
                update=update,
                notes=_notes(place, model, pairs, whence),
            )
        )
    return Zoo(cards, alike)


def _architecture(model: Checkpoint) -> str:
    config = model.config or {}
    named = (config.get("architectures") or [None])[0] or config.get("model_type")
    return str(named) if named else f"{sum(1 for _ in model.store)} tensors without a config"


def tokenizer_of(model: Checkpoint) -> str:
    """A short hash of a model's vocabulary, "" where it has none that is read here."""
    try:
        table = vocabulary(model.tokenizer)[1]()
    except ValueError:
        return "unreadable"
    return hashlib.sha256(repr(sorted(table.items())).encode()).hexdigest()[:8] if table else ""


def _given_base(pairs: Pairs) -> dict[str, tuple[str, float, float, float]]:
    """Name -> ("base", relative distance, cosine, ||tau||)."""
    assert pairs.tau_square is not None
    assert pairs.base_square is not None
    assert pairs.base_dot is not None
    found = {}
    for i, name in enumerate(pairs.names):
        if pairs.base_square[i] > 0:
            own = pairs.square[i, i] if pairs.square[i, i] > 0 else 1.0
            tau = float(np.sqrt(max(pairs.tau_square[i, i], 0.0)))
            shared = own  # over all weights of the model; heads of its own make the cosine smaller
            cosine = float(np.clip(pairs.base_dot[i] / np.sqrt(pairs.base_square[i] * shared), -1, 1))
            found[name] = ("base", tau / float(np.sqrt(pairs.base_square[i])), cosine, tau)
    return found


def _amid(pairs: Pairs) -> dict[str, tuple[str, float, float, float]]:
    """The same with one of the models as base, where all others of its kin are much nearer to it than to one another.

    Fine-tunes of one base leave it in about orthogonal directions, so that it lies amid them.
    """
    kin = np.array(pairs.dot) > KIN * np.sqrt(np.maximum(pairs.square * pairs.square.T, 1e-300))
    found: dict[str, tuple[str, float, float, float]] = {}
    for i, name in enumerate(pairs.names):
        others = [j for j in range(len(pairs.names)) if j != i and kin[i, j] and pairs.apart[i, j] > 0]
        if len(others) < 2:
            continue
        among = [pairs.apart[j, k] for j in others for k in others if j != k and pairs.apart[j, k] > 0]
        if not among or max(pairs.apart[i, j] for j in others) > AMID * min(among):
            continue
        for j in others:
            norm = float(np.sqrt(pairs.square[i, j]))
            cosine = float(pairs.dot[i, j] / np.sqrt(pairs.square[i, j] * pairs.square[j, i]))
            tau = float(np.sqrt(pairs.apart[i, j]))
            found[pairs.names[j]] = (name, tau / norm, min(cosine, 1.0), tau)
    return found


def _notes(place: int, model: Checkpoint, pairs: Pairs, whence: str) -> tuple[str, ...]:
    notes = list(model.notes)
    name = pairs.names[place]
    if name in pairs.broken:
        notes.append("holds NaN or infinite weights")
    if whence == "base" and pairs.tau_square is not None and pairs.tau_square[place, place] == 0:
        notes.append("equals the base in every weight")
    same = [
        other
        for j, other in enumerate(pairs.names[:place])
        if pairs.apart[place, j] == 0
        and pairs.numel[place, j] == pairs.numel[j, j] == pairs.numel[place, place]
    ]
    if same:
        notes.append(f"equals {same[0]} in every weight")
    notes += [f"{file} lies beside the index and is not read" for file in strays(model)]
    return tuple(notes)
