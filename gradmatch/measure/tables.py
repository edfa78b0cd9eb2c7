"""Rows of examples, wherever they are: files, folders and sets of the hub, all read by the `datasets` package.

csv, tsv, json (a list, or an object a line), jsonl, parquet and plain text (a text a line), each also packed as .gz; folders
that `datasets` saved or that hold such files; and sets of the hub, as "name", "name:configuration" or "name@revision".
Rows stream: a file is gone through once, and only what is kept of it is held.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import first_line, nearest

KINDS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".txt": "text", ".text": "text",
}  # fmt: skip
PACKED = (".gz", ".bz2", ".xz", ".zst")
HUB_SET = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<configuration>[^@]+))?(@(?P<revision>\S+))?")
AT_ONCE = 1000  # rows, of which the columns that are not wanted go again


def kind_of(source: str | os.PathLike[str]) -> str | None:
    """Of what kind a file is, by its ending: csv, json, parquet, text, or None where the ending is no known one."""
    endings = [ending.lower() for ending in Path(source).suffixes]
    while endings and endings[-1] in PACKED:
        endings.pop()
    return KINDS.get(endings[-1]) if endings else None


def check_source(source: str | os.PathLike[str]) -> None:
    """Refuse what is no file, folder or name of a hub set, before any work is done for it.

    Raises:
        FileNotFoundError: a path, and nothing lies there.
        GradmatchError: a file of an unknown kind, or an empty one.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return
    if path.is_file():
        if path.suffix == ".safetensors":  # tensors, not a table
            return
        if kind_of(path) is None:
            known = ", ".join([*KINDS, f"each also with {PACKED[0]}"])
            raise GradmatchError(
                f"{path}: unknown kind of file {path.suffix!r}; known: {known}",
                "unknown_format",
                path,
            )
        if not path.stat().st_size:
            raise GradmatchError(f"{path} holds no rows: the file is empty", "no_rows", path)
        return
    if kind_of(path) or not HUB_SET.fullmatch(str(source)):
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no data file {path}{nearest(path.name, beside)}; kinds that can be read: {', '.join(KINDS)}"
        )


class Table:
    """The rows of a source, to be gone through once.

    Args:
        source: a file, a folder, or the name of a hub set.
        split: of a folder or hub set; a file is one split, "train".

    Attributes:
        name: the source as it was given.
        columns: names of the columns of its first rows.
        classes: column -> names of its classes, where the source tells them.

    Raises:
        FileNotFoundError: a path where nothing lies, or a hub set that cannot be had.
        GradmatchError: no rows, an unknown kind of file, a split that is not there, values that cannot be read.
        ImportError: `datasets` is not installed.

    >>> table = Table("reviews.csv")                                          # doctest: +SKIP
    >>> table.columns, next(iter(table))                                      # doctest: +SKIP
    (['text', 'label'], {'text': 'a fine film', 'label': '1'})
    """

    def __init__(self, source: str | os.PathLike[str], *, split: str = "train") -> None:
        self.name = os.fspath(source)
        check_source(source)
        try:
            import datasets
        except ModuleNotFoundError as error:
            if error.name != "datasets":
                raise  # it is there, and something that it needs is not
            raise ImportError("reading data needs datasets: pip install 'gradmatch[data]'") from error
        with self._strict():
            table = _opened(self.name, Path(source).expanduser(), split)
            features = getattr(table, "features", None) or {}
            self._batches = table.iter(AT_ONCE)
        self.classes = {
            name: list(feature.names)
            for name, feature in features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        first = self._next()
        if first is None:
            raise GradmatchError(f"{self.name} holds no rows", "no_rows", self.name)
        self.columns, self._first = list(first), first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in chain([self._first], iter(self._next, None)):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(names, values, strict=True))

    def _next(self) -> Mapping[str, list[Any]] | None:
        """The next rows, as columns; None at the end."""
        with self._strict():
            found: Mapping[str, list[Any]] | None = next(self._batches, None)
            return found

    @contextlib.contextmanager
    def _strict(self) -> Iterator[None]:
        """Columns are not lost, texts may be long, torch is not loaded for it, and what is wrong is said once, by us."""
        import datasets

        torch = datasets.config.TORCH_AVAILABLE  # streams would load it, which takes longer than most files
        datasets.config.TORCH_AVAILABLE = torch and "torch" in sys.modules
        log, limit = logging.getLogger("datasets"), csv.field_size_limit(sys.maxsize)
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Length of header or names")
                yield
        except (GradmatchError, FileNotFoundError):
            raise
        except UnicodeDecodeError as error:
            text = f"{self.name} is no UTF-8 text ({error.reason} at byte {error.start})"
            raise GradmatchError(text, "not_utf8", self.name, "convert it, as by iconv") from error
        except Exception as error:  # of pandas, pyarrow, gzip and json, which share no base class
            text = f"{self.name} cannot be read: {first_line(error)}"
            raise GradmatchError(text, "unreadable_data", self.name) from error
        finally:
            datasets.config.TORCH_AVAILABLE = torch
            log.setLevel(level)
            csv.field_size_limit(limit)


def _opened(name: str, path: Path, split: str) -> Any:
    """What `datasets` makes of a source: a stream of files, or a memory map of what it keeps itself."""
    import datasets

    if path.is_file():
        if split != "train":
            text = f"{path} is one file, and one split: there is no {split!r} in it"
            raise GradmatchError(text, "unknown_split", path, "leave split out")
        return datasets.load_dataset(
            kind_of(path), data_files=str(path), split=split, streaming=True, **_layout(path)
        )
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise GradmatchError(
                f"{path} has no split {split!r}; it has {', '.join(splits)}", "unknown_split", path
            )
        return splits[split]
    if path.is_dir():
        return datasets.load_dataset(str(path), split=split, streaming=True)
    given = HUB_SET.fullmatch(name)
    assert given is not None  # check_source
    try:
        return datasets.load_dataset(
            given["name"], given["configuration"], split=split, revision=given["revision"]
        )
    except Exception as error:  # the library's errors share no base class
        raise FileNotFoundError(
            f"no file {name} here, and no hub set of that name (split {split!r}) can be had: {first_line(error)}"
        ) from error


def _layout(path: Path) -> dict[str, Any]:
    """How a file is written: values of csv stay the text that they are there, and lines end at line ends alone."""
    import datasets

    kind = kind_of(path)
    if kind != "csv":
        return {"encoding": "utf-8-sig"} if kind == "text" else {}
    tabs = ".tsv" in (ending.lower() for ending in path.suffixes)
    layout: dict[str, Any] = {
        "sep": "\t" if tabs else ",",
        "quoting": csv.QUOTE_NONE if tabs and _unquoted(path) else csv.QUOTE_MINIMAL,
        "engine": "python",  # the one that refuses stray quotation marks
        "encoding": "utf-8-sig",
        "keep_default_na": False,  # "NA" and "null" are words
        "index_col": False,
    }
    head = datasets.load_dataset(
        "csv", data_files=str(path), split="train", streaming=True, chunksize=1, **layout
    )
    text = {name: datasets.Value("string") for name in next(iter(head), {})}
    return {**layout, "features": datasets.Features(text)} if text else layout


def _unquoted(path: Path) -> bool:
    """Whether quotation marks of a .tsv stand for themselves, as in the files of GLUE.

    So it is where a field begins with one and does not end with one, and yet every line has as many tabs as the first: a
    reader that takes the mark for the start of a quotation glues lines together.
    """
    opening, tabs = False, None
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for line in file:
            fields = line.rstrip(b"\r\n").split(b"\t")
            tabs = len(fields) if tabs is None else tabs
            if len(fields) != tabs:
                return False
            opening = opening or any(
                field.startswith(b'"') and (len(field) < 2 or field.count(b'"') % 2) for field in fields
            )
    return opening
