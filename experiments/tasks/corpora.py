"""Sentiment corpora in the forms they are given away in: folders of their own, one domain of VADER's, or tables.

What each becomes is what `experiments.tasks.sentiment` splits and tokenises; a data set with a test split of its own keeps it.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import assets
from experiments.files import write_json
from experiments.tasks.sentiment import (
    MIN_PER_SPLIT,
    SPLITS,
    VADER_FILES,
    Example,
    clean,
    in_splits,
    read_vader,
    without_duplicates,
)
from gradmatch.measure.tables import Table

TEST = "test/"  # how the documents of a given test split begin
RATING = re.compile(r"\[([+-]\d)\]")
STANDING_IN = '~data.corpora data.base=movies "data.tasks=[amazon, tweets, nyt]" encoder=encoder, and ~task_steps where the config has it'
ENDINGS = {".neg": 0, ".pos": 1, ".0": 0, ".1": 1}  # of files with a text a line


def read_corpus(
    domain: str,
    path: str,
    subset: str | None = None,
    train: str = "train",
    test: str | None = None,
    **columns: Any,
) -> list[Example]:
    """The examples of one domain from a folder, a table (a file, or a set of the hub: subset, train, test), or `vader`.

    Raises FileNotFoundError, ValueError.
    """
    local = Path(path)
    if path == "vader":
        if domain not in VADER_FILES:
            raise ValueError(f"vader has no domain {domain!r}; it has {', '.join(VADER_FILES)}")
        return read_vader(assets.folder("sentiment"), domain)
    if local.is_dir() and any(file.suffix in (".zip", *ENDINGS) for file in local.iterdir()):
        found = list(_of_folder(local))
    else:
        found = list(_of_table(domain, path, subset, train, test, columns))
    examples = [example for example in found if example.text]
    if not examples:
        raise ValueError(
            f"{path} holds no text that can be read: a folder has zip files with neg/ and pos/ or with rated sentences, pairs "
            f"of files with a text a line that end in {', '.join(ENDINGS)}, or a table with texts and labels"
        )
    return examples


def _of_folder(folder: Path) -> Iterator[Example]:
    for file in sorted(folder.iterdir()):
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".txt"):
                        yield from _of_member(name, archive.read(name).decode("utf-8", errors="replace"))
        elif file.suffix in ENDINGS:
            for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")):
                yield Example(clean(line), ENDINGS[file.suffix], f"{file.name}/{number}")


def _of_member(name: str, text: str) -> Iterator[Example]:
    """A review in the folder of its class (Pang & Lee), or a product's sentences with their ratings (Hu & Liu)."""
    folder = Path(name).parent.name
    if folder in ("neg", "pos"):
        yield Example(clean(text), int(folder == "pos"), name)
        return
    review = 0
    for line in text.splitlines():
        review += line.startswith("[t]")
        rated, mark, sentence = line.partition("##")
        rating = sum(map(int, RATING.findall(rated)))
        if mark and rating:  # sentences with no opinion, or with opinions that cancel, are left out
            yield Example(clean(sentence), int(rating > 0), f"{name}/{review}")


def _of_table(
    domain: str, path: str, subset: str | None, train: str, test: str | None, columns: Mapping[str, Any]
) -> Iterator[Example]:
    """The train split (of the hub's also a slice of it, as `train[:5%]`), after the test split, whose documents say so.

    Of a text that is in both, the first is kept: the test's. A file is one split, `train`.
    """
    one = Path(path).is_file()
    for split, mark in ((test, TEST), (train, "")):
        if split is not None:
            for number, row in enumerate(_table(path, subset, split)):
                document = str(number + 1) if one else f"{mark}{split}/{number}"
                yield _from_row(row, domain, f"{path}, row {number + 1}", document, **columns)


def _table(path: str, subset: str | None, split: str) -> Table:
    try:
        return Table(f"{path}:{subset}" if subset else path, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the texts of vaderSentiment, which need only PyPI, stand in for them: {STANDING_IN}"
        ) from error


def _from_row(
    row: Mapping[str, Any],
    domain: str,
    where: str,
    document: str,
    text: str = "text",
    label: str = "label",
    positive_from: float = 1,
) -> Example:
    missing = {key: column for key, column in (("text", text), ("label", label)) if column not in row}
    if missing:
        columns = " and no ".join(map(repr, missing.values()))
        keys = " and ".join(f"data.corpora.{domain}.{key}" for key in missing)
        raise ValueError(
            f"{where}: no column {columns}; it has {', '.join(map(str, row))}: name yours by {keys}"
        )
    try:
        value = float(row[label])
        if not math.isfinite(value):
            raise ValueError("no number")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: the label (column {label!r}) is {row[label]!r}, which is no number; labels from {positive_from:g} are positive"
        ) from error
    return Example(
        clean("" if row[text] is None else str(row[text])),
        int(value >= positive_from),
        str(row.get("document", document)),
    )


def split_corpus(domain: str, examples: Sequence[Example], seed: int) -> dict[str, list[Example]]:
    """As `in_splits`; where the corpus has a test split of its own, that is the test split and the rest is divided 9 : 1."""
    given = [example for example in examples if example.document.startswith(TEST)]
    if not given:
        return in_splits(domain, examples, seed)
    rest = in_splits(domain, [example for example in examples if not example.document.startswith(TEST)], seed)
    found = {"train": rest["train"] + rest["test"], "validation": rest["validation"], "test": given}
    if len(given) < MIN_PER_SPLIT:
        raise ValueError(
            f"domain {domain!r} has {len(given)} examples in its test split; {MIN_PER_SPLIT} are needed"
        )
    return found


def prepare(
    out: Path,
    *,
    corpora: Mapping[str, Mapping[str, Any]],
    encoder: str,
    max_length: int,
    limits: Mapping[str, int | None],
    split_seed: int,
) -> None:
    """Stage: read a corpus per domain (arguments of `read_corpus`), clean, split and tokenise.

    limits: split -> at most so many examples per domain, drawn by the seed. `out/<domain>/<split>` are `datasets` on disk,
    `out/counts.json` says how many.
    """
    from datasets import Dataset, disable_progress_bars

    from experiments.models import load_tokenizer, locate

    disable_progress_bars()
    tokenizer = load_tokenizer(locate(encoder))
    read = {domain: read_corpus(domain, **given) for domain, given in corpora.items()}
    counts: dict[str, Any] = {}
    for domain, examples in without_duplicates(read).items():
        try:
            splits = split_corpus(domain, examples, split_seed)
        except ValueError as error:
            raise ValueError(
                f"{corpora[domain]['path']}: {error}, of {len(examples)} that differ ({len(read[domain])} were read) in "
                f"{len({example.document for example in examples})} documents, each in one split; add texts or documents, or "
                "try another data.split_seed"
            ) from error
        for split in SPLITS:
            chosen = splits[split][: limits.get(split)]
            tokens = tokenizer([example.text for example in chosen], truncation=True, max_length=max_length)
            labels = [example.label for example in chosen]
            columns = {**tokens, "labels": labels, "document": [example.document for example in chosen]}
            Dataset.from_dict(columns).save_to_disk(out / domain / split)
            counts[f"{domain}/{split}"] = {"n": len(chosen), "labels": Counter(labels)}
    write_json(out / "counts.json", counts)
