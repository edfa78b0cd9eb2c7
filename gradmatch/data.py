"""Names of version 0.1, for scripts that import them from here; the one reader is `gradmatch.measure.data.read`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from gradmatch.measure import columns as measured
from gradmatch.measure.batches import Batches, longest_input
from gradmatch.measure.tables import Table

__all__ = ["TextBatches", "find_columns", "longest_input", "read_table", "rows_with_text"]


class Rows(list[dict[str, Any]]):
    """All rows of a table."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self[0])

    def select(self, numbers: Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows(self[number] for number in numbers)


def read_table(source: str | os.PathLike[str], *, split: str = "train") -> Rows:
    """The rows that `gradmatch.measure.tables.Table` reads."""
    return Rows(Table(source, split=split))


def find_columns(names: Sequence[str], text: str = "", pair: str = "", label: str | None = None) -> Any:
    """The columns of text, pair and label; see `gradmatch.measure.columns.find_columns`."""
    found = measured.find_columns(names, [name for name in (text, pair) if name], label)
    return SimpleNamespace(text=found.texts[0], pair=(*found.texts, None)[1], label=found.label)


def rows_with_text(table: Rows, column: str) -> list[int]:
    """Numbers of the rows whose text is not missing or blank."""
    return [number for number, row in enumerate(table) if (row[column] or "").strip()]


class TextBatches:
    """Batches of a table with labels, as `gradmatch.measure.data.Batches` makes them."""

    def __init__(
        self, table: Rows, tokenizer: Any, *, task: str, columns: Any, batch_size: int = 8,
        max_length: int | None = None, label_ids: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        labels = None
        if columns.label is not None and task == "classification":
            known = SimpleNamespace(label2id=dict(label_ids or {}), num_labels=len(label_ids or {}) or None)
            reader = measured.Labels(known, columns.label, "the data")
            labels = reader.numbers([(number, row[columns.label]) for number, row in enumerate(table)])
        names = [columns.text, *([columns.pair] if columns.pair else [])]
        self.batches = Batches(
            [tuple(row[name] for name in names) for row in table], labels, tokenizer,
            predicts_text=task == "causal_lm", batch_size=batch_size,
            max_length=longest_input(tokenizer, None, max_length),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)
