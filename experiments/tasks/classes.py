"""Classes of texts: what a label is called, which are refused, and in which order they stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator

from experiments.tasks.sentiment import Example

# Of the rows: a label column with more different values than this share numbers rows, or measures.
MANY_CLASSES = 0.2


def class_name(value: Any) -> str:
    """How a label is called: numbers alike whether they are written 1, 1.0 or "1"; words as they are, without outer space.

    >>> class_name(1.0), class_name("01"), class_name(" good ")
    ('1', '1', 'good')
    """
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return f"{number:.15g}" if math.isfinite(number) else text


ClassName = Annotated[str, BeforeValidator(class_name)]


@dataclass
class Texts:
    """The examples of a domain, the order that the source gives its classes (or none), and what is to be told of the reading."""

    examples: list[Example]
    order: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)


def class_of(
    value: Any,
    stored: Sequence[str],
    labels: Mapping[str, str | None],
    positive_from: float | None,
    where: str,
    column: str,
) -> str | None:
    """The class of a label; "" where there is none, None where its row is left out.

    stored: names that the file gives its numbers. labels, positive_from: as a config calls them, see `Corpus`.
    """
    if value is None or value == "" or value != value:  # NaN
        return ""
    if isinstance(value, (list, tuple, dict)):
        raise ValueError(
            f"{where}: column {column!r} holds {value!r:.60}: a study here classifies whole texts; labels of tokens or several "
            "labels of a text are not supported"
        )
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(stored):
        value = stored[value]
    name = class_name(value)
    if positive_from is not None:
        try:
            return str(int(float(name) >= positive_from))
        except ValueError as error:
            raise ValueError(
                f"{where}: the label (column {column!r}) is {value!r}, which is no number: `positive_from` takes numbers"
            ) from error
    if labels:
        if name not in labels:
            raise ValueError(
                f"{where}: the label {value!r} (column {column!r}) is not among `labels` ({', '.join(labels)}): name it, "
                "null to leave its rows out"
            )
        return labels[name]
    return name


def check_classes(source: str, column: str, labels: Sequence[str], where: str) -> None:
    """Refuse a column of measured values, or one that numbers its rows."""
    names = set(labels)
    measured = [name for name in names if _number(name) is not None and not float(name).is_integer()]
    if measured or len(names) > max(20, MANY_CLASSES * len(labels)):
        raise ValueError(
            f"{source}: column {column!r} has {len(names)} different values in {len(labels)} rows, as {sorted(names)[0]!r}: measured "
            f"values (regression) are not supported; name another column by {where}.label, or make classes by {where}.labels "
            f"or {where}.positive_from"
        )


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def classes_of(read: Mapping[str, Texts], stated: Sequence[str] = ()) -> list[str]:
    """The classes of all domains in their order: as stated, as the source numbers them, numbers by size, words by the alphabet.

    Raises:
        ValueError: a domain of one class, labels that are not stated, or domains whose labels differ.
    """
    own = {domain: {example.label for example in texts.examples} for domain, texts in read.items()}
    for domain, names in own.items():
        if len(names) < 2:
            raise ValueError(
                f"{domain}: all its rows are of one class, {min(names)!r}: nothing can be learnt"
            )
    every = set().union(*own.values())
    if stated:
        unknown = sorted(every - set(stated))
        if unknown:
            domain = next(domain for domain, names in own.items() if unknown[0] in names)
            raise ValueError(
                f"{domain} has the label {unknown[0]!r}, but data.labels are {', '.join(stated)}: add it, or call it otherwise by "
                f"data.corpora.{domain}.labels, as {{{unknown[0]}: {stated[0]}}} (null leaves its rows out)"
            )
        return list(stated)
    first = next(iter(own))
    for domain, names in own.items():
        if names != own[first]:
            raise ValueError(
                f"{first} has the labels {', '.join(sorted(own[first]))}, and {domain} has {', '.join(sorted(names))}: one head serves "
                f"all domains; call them alike by data.corpora.{domain}.labels, or state all by data.labels"
            )
    orders = [list(texts.order) for texts in read.values() if set(texts.order) >= every]
    if orders:
        return orders[0]
    numbers = {name: _number(name) for name in every}
    if None not in numbers.values():
        return sorted(every, key=lambda name: float(name))
    return sorted(every)
