"""Sentiment in several domains: human-rated texts from PyPI; cleaned, split without leakage.

A text's document decides its split, and a text that occurs twice (but for case and punctuation), within a domain or in
two, is kept once: so no document and no text is on two sides of a split.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "validation", "test")
SHARES = (0.7, 0.1, 0.2)
MIN_PER_SPLIT = 10
VADER_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
SEVERAL_PER_DOCUMENT = ("amazon", "nyt")  # ids there are document_sentence
NEUTRAL = 0.5  # mean ratings run from -4 to 4; nearer to 0 than this, raters disagree on the sign


@dataclass(frozen=True)
class Example:
    """A text, its class (0 negative, 1 positive), and the document that it is a part of."""

    text: str
    label: int
    document: str


def read_vader(folder: Path, domain: str) -> list[Example]:
    """One domain of Hutto & Gilbert 2014: lines of `id TAB mean rating TAB text`; near-neutral ones are left out."""
    if domain not in VADER_FILES:
        raise ValueError(f"no domain {domain!r} in this data; there are {', '.join(VADER_FILES)}")
    examples = []
    for line in (folder / VADER_FILES[domain]).read_text(encoding="utf-8").splitlines():
        identifier, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= NEUTRAL:
            document = identifier.split("_")[0] if domain in SEVERAL_PER_DOCUMENT else identifier
            examples.append(Example(clean(text), int(float(rating) > 0), document))
    return examples


def clean(text: str) -> str:
    """Entities (&amp;) decoded, white space single."""
    return " ".join(html.unescape(text).split())


def fingerprint(text: str) -> str:
    """What two texts share that differ in case, punctuation or spacing only."""
    bare = "".join(character for character in text.casefold() if character.isalnum())
    return bare or text  # a text of signs alone, as ":)", stands for itself


def without_duplicates(domains: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """Each text once over the union of all domains; texts with both labels are left out altogether."""
    labels: dict[str, set[int]] = {}
    for example in (example for examples in domains.values() for example in examples):
        labels.setdefault(fingerprint(example.text), set()).add(example.label)
    seen: set[str] = set()
    kept: dict[str, list[Example]] = {}
    for domain, examples in domains.items():
        kept[domain] = []
        for example in examples:
            mark = fingerprint(example.text)
            if mark not in seen and len(labels[mark]) == 1:
                seen.add(mark)
                kept[domain].append(example)
    return kept


def split_of(domain: str, document: str, seed: int) -> str:
    """The split of a document: a hash of its name, so that it does not depend on order or on other documents."""
    digest = hashlib.sha256(f"{seed}/{domain}/{document}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return SPLITS[0] if position < SHARES[0] else SPLITS[1] if position < SHARES[0] + SHARES[1] else SPLITS[2]


def in_splits(domain: str, examples: Iterable[Example], seed: int) -> dict[str, list[Example]]:
    """The examples of a domain by split, in an order that the seed shuffles."""
    found: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        found[split_of(domain, example.document, seed)].append(example)
    for split, members in found.items():
        if len(members) < MIN_PER_SPLIT:
            raise ValueError(
                f"domain {domain!r} leaves {len(members)} examples for {split}; {MIN_PER_SPLIT} are needed"
            )
        members.sort(key=lambda example: hashlib.sha256(f"{seed}/{example.text}".encode()).digest())
    return found
