"""Names of version 0.1, for scripts that import them from here; the one reader is `gradmatch.measure.data.read`."""

from __future__ import annotations

import os
from typing import Any

from gradmatch.measure.columns import find_columns
from gradmatch.measure.data import Examples, read
from gradmatch.measure.tables import Table

Path = str | os.PathLike[str]


def read_batches(
    path: Path, tokenizer_folder: str, *, examples: int = 256, batch_size: int = 16, max_length: int = 256
) -> list[dict[str, Any]]:
    """`gradmatch.measure.data.read` of a model's folder, all batches at once; a classifier needs labels.

    Raises:
        GradmatchError: see there.
    """
    return list(
        read(
            path, tokenizer_folder, limit=examples, batch_size=batch_size, max_length=max_length, needs_labels=True
        )
    )  # fmt: skip


def read_texts(path: Path, examples: int, *, labelled: bool = True) -> tuple[list[str], list[Any] | None]:
    """Texts (the first of a pair) and labels as the file holds them; None where it holds none, or none are wanted.

    Raises:
        GradmatchError: no text; see `gradmatch.measure.tables.Table`.
    """
    table = Table(path)
    columns = find_columns(table.columns, labelled=labelled, source=table.name)
    drawn = Examples(table, columns).draw(None, 0)[:examples]
    return [texts[0] for _, texts, _ in drawn], [label for *_, label in drawn] if columns.label else None
