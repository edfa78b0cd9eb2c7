"""Examples of a file, folder or hub set: `read` makes padded batches of their texts and labels, the same for every command."""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import first_line
from gradmatch.measure.batches import Batches, longest_input
from gradmatch.measure.chats import TOLD, is_chat, written
from gradmatch.measure.columns import Columns, Labels, find_columns
from gradmatch.measure.tables import Table, check_source

if TYPE_CHECKING:
    from torch import Tensor

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # how the architectures that predict text end


def read(
    source: str | os.PathLike[str],
    model: Any,
    *,
    text: str | Sequence[str] = (),
    label: str | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
    task: str = "auto",
    tokenizer: Any = None,
    needs_labels: bool = False,
    by_length: bool = False,
) -> Any:
    """Batches of the examples in a file, a folder or a hub set, for one model.

    Rows without text are left out and counted; labels may be numbers or the names that the model has for its classes.
    For a model that predicts text the tokens are the labels.

    Args:
        source: see `gradmatch.measure.tables`; or a .safetensors file with the model's inputs and "labels".
        model: folder or hub id, or the transformers model itself; its tokenizer and config say how to read.
        text: name of the text column, or of the two of a pair; none: by usual names.
        label: name of the label column; None: by usual names.
        split: of a folder or hub set.
        limit: so many examples, drawn at random over all of the source; None: all of them.
        seed: of that draw.
        batch_size: examples a batch; a matter of memory and speed alone.
        max_length: tokens an example, at most what the model takes; None: at most 512.
        task: "classification", "causal_lm", or "auto": by the model's architecture.
        tokenizer: another one than the model's own.
        needs_labels: refuse a classifier's data without labels.
        by_length: texts of about one length together, where there are no labels: less padding, the same sums.

    Returns:
        A `Batches`; of a .safetensors file a list of batches.

    Raises:
        GradmatchError: no text, no label, or a label that the model does not know; the row is named.
        FileNotFoundError, ImportError: see `gradmatch.measure.tables.Table`.

    >>> from gradmatch import estimate                                       # doctest: +SKIP
    >>> model = AutoModelForCausalLM.from_pretrained("cook")                 # doctest: +SKIP
    >>> estimate(model, read("cook.txt", model, limit=200))                  # doctest: +SKIP
    """
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise GradmatchError(f"{name} must be at least 1, got {value}", "out_of_range", name)
    path = Path(source).expanduser()
    if path.suffix == ".safetensors":
        return _ready(path, limit, seed, batch_size)
    check_source(source)  # before tokenizer and config are loaded
    config, tokenizer = config_and_tokenizer(model, tokenizer)
    architecture = (getattr(config, "architectures", None) or [type(model).__name__])[0]
    predicts_text = task == "causal_lm" or (task == "auto" and architecture.endswith(LANGUAGE_MODELS))
    table = Table(source, split=split)
    wanted = [text] if isinstance(text, str) and text else list(text)
    columns = find_columns(table.columns, wanted, label, labelled=not predicts_text, source=table.name)
    if needs_labels and columns.label is None and not predicts_text:
        raise GradmatchError(
            f"{table.name} has no labels, which {architecture} needs; its columns are: {', '.join(table.columns)}",
            "no_labels",
            table.name,
            "name them: label='...'",
        )
    examples = Examples(table, columns, tokenizer)
    drawn = examples.draw(limit, seed)
    labels = None
    if columns.label is not None:
        known = Labels(config, columns.label, table.name, table.classes.get(columns.label, ()))
        labels = known.numbers([(row, value) for row, _, value in drawn])
    texts = [parts for _, parts, _ in drawn]
    if by_length and labels is None:
        texts.sort(key=lambda parts: sum(map(len, parts)))
    return Batches(
        texts,
        labels,
        tokenizer,
        predicts_text=predicts_text,
        batch_size=batch_size,
        max_length=longest_input(tokenizer, config, max_length),
        marked=examples.chats,
        padding_side="left" if getattr(config, "model_type", "") == "xlnet" else "right",  # reads the last
        rows=examples.rows,
        notes=examples.notes,
    )


def config_and_tokenizer(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Config (None where there is none) and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from gradmatch.models.named import config_folder

    config = getattr(model, "config", None)
    name = config_folder(str(model)) if config is None else config._name_or_path
    if config is None:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError):
            config = None  # a tokenizer is enough to read by
    if tokenizer is not None:
        return config, tokenizer
    try:
        return config, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise GradmatchError(
            f"{name} has no tokenizer to read data with: {first_line(error)}", "no_tokenizer", name
        ) from error


class Examples:
    """The rows of a table that hold an example: (number of the row, texts, label).

    Args:
        table: to go through, once.
        columns: what to read of it.
        tokenizer: whose chat template writes conversations.

    Attributes:
        rows: how many hold an example, once they were gone through.
        chats: whether these are conversations.
    """

    def __init__(self, table: Table, columns: Columns, tokenizer: Any = None) -> None:
        self.table, self.columns, self.tokenizer = table, columns, tokenizer
        self.rows = self.empty = 0
        self.chats = False

    def __iter__(self) -> Iterator[tuple[int, tuple[str, ...], Any]]:
        for number, row in enumerate(self.table):
            parts: list[str] = []
            for column in self.columns.texts:
                part = row.get(column)
                if is_chat(part):
                    where = f"{self.table.name}, row {number}: column {column!r}"
                    part, self.chats = written(part, self.tokenizer, where), True
                if part is not None and not isinstance(part, str):
                    raise GradmatchError(
                        f"{self.table.name}, row {number}: column {column!r} holds no text but {part!r:.80}",
                        "not_text",
                        f"row {number}",
                        "name another column: text='...'",
                    )
                parts += [part] if part and part.strip() else []
            if len(parts) < len(self.columns.texts):
                self.empty += 1
                continue
            self.rows += 1
            yield number, tuple(parts), row.get(self.columns.label) if self.columns.label else None

    def draw(self, limit: int | None, seed: int) -> list[tuple[int, tuple[str, ...], Any]]:
        """All examples, or `limit` of them drawn at random, in the order of the table; one pass, holding what is kept.

        Raises:
            GradmatchError: no text at all.
        """
        generator = random.Random(seed)
        drawn = (
            list(self)
            if limit is None
            else heapq.nsmallest(limit, self, key=lambda _: generator.random())  # a random number each
        )
        if not drawn:
            raise GradmatchError(
                f"{self.table.name} holds no text ({self.columns})", "no_text", self.table.name
            )
        return sorted(drawn, key=lambda example: example[0])

    @property
    def notes(self) -> list[str]:
        """Columns, and how many rows were left out; empty lines of plain text separate paragraphs and are not told."""
        notes = [f"{self.table.name}: {self.columns}{f' ({TOLD})' if self.chats else ''}"]
        if self.empty and self.table.columns != ["text"]:
            where = " or ".join(map(repr, self.columns.texts))
            total = self.rows + self.empty
            notes.append(f"{self.empty} of {total} rows have no text in column {where} and are left out")
        return notes


def _ready(path: Path, limit: int | None, seed: int, size: int) -> list[dict[str, Tensor]]:
    """Inputs that are tensors already, a row an example."""
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    from safetensors.torch import load_file

    tensors = load_file(path)
    if "labels" not in tensors:
        held = ", ".join(tensors) or "none"
        raise GradmatchError(f"{path} holds no tensor named labels (it has {held})", "no_labels", path)
    counts = {name: value.shape[0] if value.dim() else 0 for name, value in tensors.items()}
    count = counts["labels"]
    if set(counts.values()) != {count} or not count:
        raise GradmatchError(
            f"{path}: its tensors differ in their rows, or have none: {counts}", "rows_differ", path
        )
    drawn = range(count) if limit is None else random.Random(seed).sample(range(count), min(limit, count))
    rows = sorted(drawn)
    return [
        {name: value[rows[first : first + size]] for name, value in tensors.items()}
        for first in range(0, count if limit is None else min(limit, count), size)
    ]
