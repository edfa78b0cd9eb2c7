"""Text data for estimates and evaluations: local files and hub sets, as padded batches that a transformers model takes.

csv, tsv, json, jsonl, parquet and txt files are read by the `datasets` package, and so are sets of the hub ("imdb", or
"glue:sst2" for a configuration). Every row is one example; a text file has one example a line, empty lines left out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.common.names import nearest

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

READERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".txt": "text", ".text": "text",
}  # fmt: skip
TEXT_NAMES = ("text", "sentence", "review", "content", "prompt", "premise", "question", "sentence1")
LABEL_NAMES = ("label", "labels", "sentiment", "target", "class")
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # how the architectures that predict text end
LONGEST_BY_DEFAULT = 512  # tokens, where neither the tokenizer nor the model sets a limit
IGNORED = -100


def read_table(source: str | os.PathLike[str], *, split: str = "train") -> Any:
    """A `datasets.Dataset` of a local file or a hub set.

    Args:
        source: a file, or "name" or "name:configuration" of the hub.
        split: of a hub set; a file is one split.

    Raises:
        FileNotFoundError: a name that is a path, without a file there, or a hub set that cannot be had.
        ValueError: an unknown kind of file, or no rows.
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading data needs the datasets package: pip install 'gradmatch[experiments]'"
        ) from error
    path = Path(source)
    if path.is_file():
        if not path.stat().st_size:
            raise ValueError(f"{source} holds no rows: the file is empty")
        try:
            table = datasets.load_dataset(**_local(path), split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
        except ValueError as error:
            if "no data" not in str(error):
                raise
            table = []
    elif path.suffix.lower() in READERS or str(source).startswith((".", "/", "~")) or path.is_dir():
        raise FileNotFoundError(
            f"no data file at {path}; kinds that can be read: {', '.join(sorted(READERS))}"
        )
    else:
        name, _, configuration = str(source).partition(":")
        try:
            table = datasets.load_dataset(name, configuration or None, split=split)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no file {source} here, and the hub set {name!r} (split {split!r}) cannot be had: {error}"
            ) from error
    if len(table) == 0:
        raise ValueError(f"{source} holds no rows")
    return table


def _local(path: Path) -> dict[str, Any]:
    kind = READERS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(sorted(READERS))}")
    options: dict[str, Any] = {"path": kind, "data_files": str(path)}
    if path.suffix.lower() == ".tsv":
        options["sep"] = "\t"
    return options


@dataclass
class Columns:
    """Which columns of a table hold what; None where there is none."""

    text: str
    pair: str | None
    label: str | None


def find_columns(
    names: Sequence[str], text: str | None = None, pair: str | None = None, label: str | None = None
) -> Columns:
    """The columns as given, or the first that goes by a usual name.

    Raises:
        ValueError: a column that is not there (the nearest is offered), or no column that looks like text.
    """
    for given in (text, pair, label):
        if given is not None and given not in names:
            raise ValueError(
                f"the data has no column {given!r}{nearest(given, names)}; there are: {', '.join(names)}"
            )
    lower = {name.lower(): name for name in reversed(names)}
    if text is None:
        found = next((lower[name] for name in TEXT_NAMES if name in lower), None)
        if found is None:
            raise ValueError(
                f"which column is the text? Name it with --text-column; there are: {', '.join(names)}"
            )
        text = found
    if label is None:
        label = next((lower[name] for name in LABEL_NAMES if name in lower and lower[name] != text), None)
    return Columns(text, pair, label)


class TextBatches:
    """Batches of a table: dicts of padded tensors with labels; can be gone through any number of times.

    Args:
        table: a Dataset or any sequence of dicts.
        tokenizer: of the model.
        task: "classification" (labels from the label column, if there is one) or "causal_lm" (the tokens are the labels).
        columns: which columns to use.
        batch_size: rows a batch.
        max_length: longer texts are cut, and counted in `cut`.
        label_ids: name of a class -> its number, for labels that are words.
        numbers: of the rows in the table that these were taken from, for messages.

    Raises (while iterating):
        ValueError: a text that is missing or no string, or an unknown label; the row is named.
    """

    def __init__(
        self,
        table: Any,
        tokenizer: Any,
        *,
        task: str,
        columns: Columns,
        batch_size: int = 8,
        max_length: int = LONGEST_BY_DEFAULT,
        label_ids: Mapping[str, int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        self.table, self.tokenizer, self.task, self.columns = table, tokenizer, task, columns
        self.batch_size, self.max_length = batch_size, max_length
        self.label_ids = dict(label_ids or {})
        self.numbers = numbers if numbers is not None else range(len(table))
        self.dataset = table  # its length is what a progress bar counts to
        self.cut = 0
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.table) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.cut = 0
        for first in range(0, len(self.table), self.batch_size):
            last = min(first + self.batch_size, len(self.table))
            yield self._batch([self.table[row] for row in range(first, last)], first)

    def _batch(self, rows: Sequence[Mapping[str, Any]], first: int) -> dict[str, Tensor]:
        texts = [self._text(row, self.columns.text, self.numbers[first + n]) for n, row in enumerate(rows)]
        pairs = None
        if self.columns.pair is not None:
            pairs = [
                self._text(row, self.columns.pair, self.numbers[first + n]) for n, row in enumerate(rows)
            ]
        encoded = self.tokenizer(
            texts, pairs, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        batch: dict[str, Tensor] = dict(encoded)
        self.cut += int((batch["attention_mask"].sum(1) >= self.max_length).sum())
        if self.task == "causal_lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        elif self.columns.label is not None:
            batch["labels"] = self._labels([row[self.columns.label] for row in rows], first)
        return batch

    def _text(self, row: Mapping[str, Any], column: str, number: int) -> str:
        value = row[column]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"row {number}: column {column!r} holds no text but {value!r}")
        return value

    def _labels(self, values: Sequence[Any], first: int) -> Tensor:
        import torch

        found: list[float] = []
        for n, value in enumerate(values):
            if isinstance(value, str):
                if value not in self.label_ids:
                    hint = f"{nearest(value, self.label_ids)}; the model knows: {', '.join(self.label_ids) or 'none'}"
                    raise ValueError(f"row {self.numbers[first + n]}: unknown label {value!r}{hint}")
                value = self.label_ids[value]
            if value is None or isinstance(value, (list, dict)):
                raise ValueError(
                    f"row {self.numbers[first + n]}: column {self.columns.label!r} holds no label but {value!r}"
                )
            found.append(value)
        return torch.tensor(
            found, dtype=torch.float32 if any(isinstance(v, float) for v in found) else torch.long
        )


def longest_input(tokenizer: Any, config: Any, asked: int | None = None) -> int:
    """Tokens a row may have: what was asked for, within what tokenizer and model take.

    Raises:
        ValueError: more was asked for than the model takes.
    """
    known = token_limits(tokenizer, config)
    if asked is None:
        return min([*known, LONGEST_BY_DEFAULT])
    if known and asked > min(known):
        raise ValueError(f"--max-length {asked} is more than the model takes: {min(known)}")
    return asked


def token_limits(tokenizer: Any, config: Any) -> list[int]:
    """How many tokens the tokenizer and the model take, as far as they say."""
    limits = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") and limits[1]:
        limits[1] -= 2  # their positions start at 2
    return [int(limit) for limit in limits if limit is not None and 0 < limit < 10**6]


def rows_with_text(table: Any, column: str) -> list[int]:
    """Numbers of the rows whose text is not missing or blank.

    Raises:
        ValueError: there is none.
    """
    kept = [n for n, text in enumerate(table[column]) if isinstance(text, str) and text.strip()]
    if not kept:
        raise ValueError(f"column {column!r} holds no text at all")
    return kept
