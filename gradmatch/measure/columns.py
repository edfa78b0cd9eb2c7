"""What the columns of a table are: which hold the texts (pairs too), which the label, and what number a label is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = (  # usual names of two columns that belong together, first and second text
    "premise hypothesis", "sentence1 sentence2", "sentence_1 sentence_2", "question1 question2", "text1 text2",
    "text_a text_b", "question context", "question passage", "question sentence",
    "question answer", "query passage", "query document", "query response", "prompt completion",
    "prompt response", "instruction output", "instruction response", "input output", "article summary",
    "document summary",
)  # fmt: skip
TEXT_NAMES = ("sentence", "review", "content", "input", "prompt", "question", "premise", "sentence1")
CHATS = (
    "messages",
    "conversations",
    "conversation",
)  # turns of a conversation, see `gradmatch.measure.chats`
LABEL_NAMES = ("label", "labels", "sentiment", "target", "class")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read: one text or two, and the label where there is one; the others are not."""

    texts: tuple[str, ...]
    label: str | None
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = " and ".join(map(repr, self.texts))
        said = [f"the pair of columns {names}" if len(self.texts) > 1 else f"text column {names}"]
        said += [f"label column {self.label!r}"] if self.label else []
        return ", ".join(said) + (f"; not used: {', '.join(map(repr, self.others))}" if self.others else "")


def find_columns(
    names: Sequence[str],
    texts: Sequence[str] = (),
    label: str | None = None,
    *,
    labelled: bool = True,
    source: str = "the data",
) -> Columns:
    """The columns as given, or those that go by usual names: a known pair before a single text.

    Args:
        names: of all columns.
        texts: the text column, or the two of a pair; none, or "" for the first of two: looked for.
        label: the label column; None: looked for.
        labelled: whether labels are read at all.
        source: how to call the data in an error.

    Raises:
        GradmatchError: a column that is not there, more than two texts, or nothing that looks like text.

    >>> find_columns(["id", "premise", "hypothesis", "label"])
    Columns(texts=('premise', 'hypothesis'), label='label', others=('id',))
    """
    there = f"there are: {', '.join(names)}"
    for given in (*texts, label):
        if given and given not in names:
            raise GradmatchError(
                f"{source} has no column {given!r}{nearest(given, names)}; {there}", "unknown_column", given
            )
    lower = {name.lower(): name for name in reversed(names)}
    usual = ("text text_pair", "text", *PAIRS, *TEXT_NAMES, *CHATS) if not texts else ("text", *TEXT_NAMES)
    if not texts or not texts[0]:
        known = (group.split() for group in usual)
        found = next(([lower[name] for name in group] for group in known if lower.keys() >= set(group)), [])
        texts = [*found, *texts[1:]] if found else []
    if not texts:
        raise GradmatchError(
            f"{source}: which column is the text? {there}", "no_text_column", source, "name it: text='...'"
        )
    if len(texts) > 2 or len(set(texts)) < len(texts):
        raise GradmatchError(
            f"{source}: {', '.join(texts)} are given; the text is one column, or two different ones of a pair",
            "text_columns",
            source,
        )
    if label is None:
        label = next((lower[name] for name in LABEL_NAMES if lower.get(name, texts[0]) not in texts), None)
    label = label if labelled else None
    others = tuple(name for name in names if name not in texts and name != label)
    return Columns(tuple(texts), label, others)


class Labels:
    """From labels as data hold them to the numbers that a model is trained on.

    A label that is the name of one of the model's classes is that class; other labels are class numbers, or the values
    of a regression.

    Args:
        config: of the model, or None.
        column: of the labels.
        source: of the data, for errors.
        stored: names of the classes that the data number; the model may number them otherwise.
    """

    def __init__(self, config: Any, column: str, source: str, stored: Sequence[str] = ()) -> None:
        self.column, self.source = column, source
        self.names: dict[str, int] = dict(getattr(config, "label2id", None) or {})
        self.by_lower = {name.lower(): number for name, number in self.names.items()}
        self.stored = stored if all(name.lower() in self.by_lower for name in stored) else ()
        self.classes: int | None = getattr(config, "num_labels", None)
        kind = getattr(config, "problem_type", None)
        self.values = kind == "regression" or (kind is None and self.classes == 1)

    def numbers(self, labels: Sequence[tuple[int, Any]]) -> Tensor:
        """Labels of rows (number of the row, label) as a tensor (rows,): class numbers, or values of a regression.

        Raises:
            GradmatchError: a missing label, one that is no number and no class's name, or one beyond the model's classes.
        """
        import torch

        lacking = [number for number, value in labels if value is None or value == ""]
        if lacking:
            count = f"holds no label, and so it is in {len(lacking)} of {len(labels)} rows"
            raise self._refused(lacking[0], count, "label these rows, or remove them")
        found = [self._number(number, value) for number, value in labels]
        return torch.tensor(found, dtype=torch.float32 if self.values else torch.long)

    def _number(self, row: int, label: Any) -> float:
        if isinstance(label, (list, dict, tuple)):
            raise self._refused(row, f"holds no label but {label!r:.80}")
        if isinstance(label, int) and 0 <= label < len(self.stored):
            label = self.stored[label]
        named = self.names.get(str(label), self.by_lower.get(str(label).strip().lower()))
        if named is not None and not self.values:
            return named
        try:
            number = float(label)
        except (TypeError, ValueError) as error:
            known = ", ".join(map(str, self.names)) or "none by name"
            hint = f"{nearest(label, self.names)}; the model knows: {known}"
            raise self._refused(row, f"holds the unknown label {label!r}{hint}") from error
        if self.values and math.isfinite(number):
            return number
        if not number.is_integer():
            remedy = "" if self.values else "a model of values has num_labels=1"
            raise self._refused(row, f"holds the label {label!r}, which is no class's number", remedy)
        if self.classes is not None and not 0 <= number < self.classes:
            known = f"the model has the classes 0 to {self.classes - 1}"
            raise self._refused(row, f"holds the label {label!r}; {known}")
        return int(number)

    def _refused(self, row: int, what: str, remedy: str = "") -> GradmatchError:
        text = f"{self.source}, row {row}: column {self.column!r} {what}"
        return GradmatchError(text, "bad_label", f"row {row}", remedy)
