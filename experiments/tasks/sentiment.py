"""Examples of texts with classes: cleaned, each once; and sentiment in four domains, human-rated texts from PyPI."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VADER_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
SEVERAL_PER_DOCUMENT = ("amazon", "nyt")  # ids there are document_sentence
NEUTRAL = 0.5  # mean ratings run from -4 to 4; nearer to 0 than this, raters disagree on the sign
NO_LETTERS = re.compile(r"[\W_]+")  # of all that str.isalnum says no to


@dataclass(frozen=True)
class Example:
    """A text (or two, a pair), the name of its class, the document (or group) that it is a part of, the split it was given in."""

    text: str
    label: str
    document: str
    pair: str | None = None
    split: str = "train"


def read_vader(folder: Path, domain: str) -> list[Example]:
    """One domain of Hutto & Gilbert 2014: lines of `id TAB mean rating TAB text`; near-neutral ones are left out.

    Classes: "0" negative, "1" positive.
    """
    if domain not in VADER_FILES:
        raise ValueError(f"no domain {domain!r} in this data; there are {', '.join(VADER_FILES)}")
    examples = []
    for line in (folder / VADER_FILES[domain]).read_text(encoding="utf-8").splitlines():
        identifier, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= NEUTRAL:
            document = identifier.split("_")[0] if domain in SEVERAL_PER_DOCUMENT else identifier
            examples.append(Example(clean(text), str(int(float(rating) > 0)), document))
    return examples


def clean(text: str) -> str:
    """Entities (&amp;) decoded, white space single."""
    return " ".join(html.unescape(text).split())


def fingerprint(text: str) -> str:
    """What two texts share that differ in case, punctuation or spacing only."""
    return NO_LETTERS.sub("", text.casefold()) or text  # a text of signs alone, as ":)", stands for itself


def _mark(example: Example) -> str:
    return fingerprint(example.text) + ("" if example.pair is None else f"\n{fingerprint(example.pair)}")


def without_duplicates(
    domains: Mapping[str, Sequence[Example]], notes: list[str] | None = None
) -> dict[str, list[Example]]:
    """Each text once over the union of all domains; texts with two labels are left out altogether.

    Of equal texts, one of a given test or validation split is kept. notes: what was left out is added here, a line a domain.
    """
    every = [(domain, own, _mark(own)) for domain, examples in domains.items() for own in examples]
    labels: dict[str, set[str]] = {}
    for _, example, mark in every:
        labels.setdefault(mark, set()).add(example.label)
    order = {"test": 0, "validation": 1}
    every.sort(key=lambda one: order.get(one[1].split, 2))  # a stable sort
    seen: set[str] = set()
    kept: dict[str, list[Example]] = {domain: [] for domain in domains}
    left: dict[str, Counter[str]] = {domain: Counter() for domain in domains}
    for domain, example, mark in every:
        if len(labels[mark]) > 1:
            left[domain]["with two labels"] += 1
        elif mark in seen:
            left[domain]["that stand elsewhere too"] += 1
        else:
            seen.add(mark)
            kept[domain].append(example)
    if notes is not None:
        for domain, counts in left.items():
            notes += [f"{domain}: {count} rows {why} are left out" for why, count in counts.items()]
    return kept
