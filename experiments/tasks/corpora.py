"""Texts with classes in the forms that people have: tables and hub sets by the one reader, folders of text files, VADER's domains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from experiments import assets
from experiments.config import Strict
from experiments.files import CARD, write_json
from experiments.tasks.classes import ClassName, Texts, check_classes, class_name, class_of, classes_of
from experiments.tasks.sentiment import VADER_FILES, Example, clean, read_vader, without_duplicates
from experiments.tasks.textfiles import ENDINGS, of_folder
from gradmatch.measure.columns import find_columns
from gradmatch.measure.tables import Table, kind_of

SLICE = re.compile(r"(?P<split>[\w.-]+)\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\]")
STANDING_IN = '~data.corpora data.base=movies "data.tasks=[amazon, tweets, nyt]" encoder=encoder, and ~task_steps where the config has it'


class Corpus(Strict):
    """Where the texts of one domain come from.

    path: a table (csv, tsv, json, jsonl, parquet, also .gz), a folder that `datasets` saved or that holds tables, a hub name,
    a folder of zip files or of .neg and .pos files, or `vader`. subset: the configuration of a hub set. train, validation, test:
    splits of a folder or hub set, or slices of them (train[:50%]); validation and test may be files. Without them, rows are
    split by `data.validation` and `data.test`.

    text: the text column, or the two of a pair; empty: by usual names. label: the label column. labels: what to call labels
    (1: bad), null to leave their rows out. positive_from: labels are numbers, and two classes: from this one on "1", else "0".
    group_column: rows with the same value there are in one split; empty: `document`, where there is such a column.
    """

    path: str
    subset: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    text: str | tuple[str, ...] = ""
    label: str | None = None
    labels: dict[ClassName, ClassName | None] = Field(default_factory=dict)
    positive_from: float | None = None
    group_column: str = ""

    @model_validator(mode="after")
    def _one_way(self) -> Corpus:
        if self.labels and self.positive_from is not None:
            raise ValueError("give either `labels` or `positive_from`: both say what a label is called")
        return self

    @property
    def packaged(self) -> bool:
        """Whether it is split by its documents, as it always was: VADER's texts, and folders of text files."""
        local = Path(self.path)
        return self.path == "vader" or (
            local.is_dir() and any(file.suffix in (".zip", *ENDINGS) for file in local.iterdir())
        )

    @property
    def files(self) -> list[str]:
        """What is read of the disk: the table or folder, and split files of its own."""
        own = [name for name in (self.validation, self.test) if name and kind_of(name)]
        return ([] if self.path == "vader" else [self.path]) + own


def read_corpus(domain: str, corpus: Corpus) -> Texts:
    """The examples of one domain. Raises FileNotFoundError, ValueError."""
    if corpus.path == "vader":
        if domain not in VADER_FILES:
            raise ValueError(f"vader has no domain {domain!r}; it has {', '.join(VADER_FILES)}")
        return Texts(read_vader(assets.folder("sentiment"), domain))
    if corpus.packaged:
        _check_unused(domain, corpus)
        found = Texts([example for example in of_folder(Path(corpus.path)) if example.text])
        if found.examples:
            return found
        raise ValueError(
            f"{corpus.path} holds no text that can be read: a folder has zip files with neg/ and pos/ or with rated sentences, "
            f"pairs of files with a text a line that end in {', '.join(ENDINGS)}, or a table with texts and labels"
        )
    return _of_tables(domain, corpus)


def _check_unused(domain: str, corpus: Corpus) -> None:
    for name in corpus.model_dump(exclude_defaults=True, exclude={"path"}):
        raise ValueError(
            f"data.corpora.{domain}.{name}: {corpus.path} is a folder of text files, which has none"
        )


def _of_tables(domain: str, corpus: Corpus) -> Texts:
    """The train split, and the others where they are given apart."""
    found = Texts([])
    for split in ("train", "validation", "test"):
        name = getattr(corpus, split)
        if name is not None:
            _read_split(domain, corpus, split, name, found)
    return found


def _read_split(domain: str, corpus: Corpus, split: str, name: str, found: Texts) -> None:
    table, rows = _rows(corpus, name)
    where = f"data.corpora.{domain}"
    wanted = [corpus.text] if isinstance(corpus.text, str) and corpus.text else list(corpus.text)
    try:
        columns = find_columns(table.columns, wanted, corpus.label, source=table.name)
    except ValueError as error:
        raise ValueError(f"{error} (by {where}.text and {where}.label)") from error
    if columns.label is None:
        raise ValueError(
            f"{table.name}: which column is the label? there are: {', '.join(table.columns)}: name it by {where}.label"
        )
    group = corpus.group_column or ("document" if "document" in table.columns else "")
    if group and group not in table.columns:
        raise ValueError(
            f"{table.name} has no column {group!r}; it has {', '.join(table.columns)} ({where}.group_column)"
        )
    found.notes.append(f"{table.name}: {columns}" + (f"; kept together by {group!r}" if group else ""))
    stored = table.classes.get(columns.label, [])
    if not corpus.labels and corpus.positive_from is None:
        found.order = [class_name(name) for name in stored]
    left, empty, bad = 0, 0, []
    for number, row in rows:
        parts = [row.get(column) for column in columns.texts]
        strange = next((part for part in parts if part is not None and not isinstance(part, str)), None)
        if strange is not None:
            raise ValueError(
                f"{table.name}, row {number + 1}: holds no text but {strange!r:.60} ({where}.text)"
            )
        texts = [clean(part) for part in parts if part and part.strip()]
        if len(texts) < len(columns.texts):
            empty += 1
            continue
        label = class_of(
            row[columns.label],
            stored,
            corpus.labels,
            corpus.positive_from,
            f"{table.name}, row {number + 1}",
            columns.label,
        )
        if label == "":
            bad.append(number + 1)
        elif label is None:
            left += 1
        else:
            document = f"{split}/{number}" if not group else str(row[group])
            found.examples.append(Example(texts[0], label, document, (*texts, None)[1], split))
    if bad:
        raise ValueError(
            f"{table.name}, row {bad[0]}: column {columns.label!r} holds no label, and so it is in {len(bad)} rows: "
            "label these rows, or remove them"
        )
    if not any(example.split == split for example in found.examples):
        raise ValueError(f"{table.name} holds no text with a label ({columns})")
    if left:
        found.notes.append(f"{table.name}: {left} rows are left out by {where}.labels")
    if empty:
        found.notes.append(f"{table.name}: {empty} rows without text are left out")
    check_classes(table.name, columns.label, [e.label for e in found.examples if e.split == split], where)


def _rows(corpus: Corpus, name: str) -> tuple[Table, list[tuple[int, Mapping[str, Any]]]]:
    """A table and its numbered rows: a file of its own, or a split of the source, of which a slice may be taken."""
    own = kind_of(name) is not None
    path = name if own else f"{corpus.path}:{corpus.subset}" if corpus.subset else corpus.path
    local = own or Path(corpus.path).exists()
    sliced = None if own else SLICE.fullmatch(name)
    split = "train" if own else sliced["split"] if sliced and local else name
    try:
        table = Table(path, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the texts of vaderSentiment, which need only PyPI, stand in for them: {STANDING_IN}"
        ) from error
    rows = list(enumerate(table))
    if sliced and local:
        rows = rows[slice(*(_end(sliced[end], len(rows)) for end in ("start", "stop")))]
        if not rows:
            raise ValueError(f"{path}: the slice {name!r} holds no rows")
    return table, rows


def _end(text: str | None, count: int) -> int | None:
    if text is None:
        return None
    return round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def read_all(
    corpora: Mapping[str, Corpus], stated: Sequence[str]
) -> tuple[dict[str, list[Example]], list[str], list[str]]:
    """Examples by domain, each text once; the classes in order; notes."""
    read = {domain: read_corpus(domain, corpus) for domain, corpus in corpora.items()}
    notes = [note for texts in read.values() for note in texts.notes]
    classes = classes_of(read, stated)
    return (
        without_duplicates({domain: texts.examples for domain, texts in read.items()}, notes),
        classes,
        notes,
    )


def prepare(
    out: Path,
    *,
    corpora: Mapping[str, Mapping[str, Any]],
    labels: Sequence[str],
    tokenizer: str,
    max_length: int,
    split_seed: int,
) -> None:
    """Stage: read a corpus per domain (see `Corpus`), clean and tokenise; `views.view` splits what this writes.

    `out/<domain>` are `datasets` on disk (tokens, labels, document, split: the one given, or of packaged texts the document's);
    `out/data.json` says the classes and what was noticed.
    """
    from datasets import Dataset, disable_progress_bars

    from experiments.models import load_tokenizer, locate
    from experiments.tasks.views import rows_of

    disable_progress_bars()
    loaded = load_tokenizer(locate(tokenizer))
    asked = {domain: Corpus.model_validate(own) for domain, own in corpora.items()}
    examples, classes, notes = read_all(asked, labels)
    number = {name: index for index, name in enumerate(classes)}
    domains: dict[str, Any] = {}
    for domain, own in examples.items():
        pairs = [example.pair for example in own] if own and own[0].pair is not None else None
        texts = [example.text for example in own]
        tokens = loaded(texts, pairs, truncation=True, max_length=max_length)
        packaged = asked[domain].packaged
        rows = rows_of(domain, own, packaged=packaged, seed=split_seed)
        columns = {
            **tokens,
            "labels": [number[label] for label in rows["labels"]],
            "text": rows["text"],
            "document": rows["groups"],
            "split": rows["split"],
        }
        Dataset.from_dict(columns).save_to_disk(out / domain)
        domains[domain] = {"first": 0, "classes": classes, "packaged": packaged}
        cut = sum(len(ids) >= max_length for ids in tokens["input_ids"])
        if cut:
            notes.append(f"{domain}: {cut} of {len(own)} texts have {max_length} tokens or more, and are cut")
    write_json(out / CARD, {"domains": domains, "pad": loaded.pad_token_id or 0, "notes": notes})
