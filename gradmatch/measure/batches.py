"""Data files of the command line, as batches: JSON lines, CSV or TSV with texts and labels, or ready tensors."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.common.warning import warn
from gradmatch.measure.tables import LANGUAGE_MODELS, token_limits

if TYPE_CHECKING:
    from torch import Tensor

TEXT_KEYS = ("text", "sentence", "review", "content", "input")
LABEL_KEYS = ("label", "labels", "class", "target", "sentiment")
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".safetensors")


def parse_data(arguments: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    """TASK=FILE arguments as a table.

    Raises:
        ValueError: not TASK=FILE, or an unknown task.
        FileNotFoundError: no such file.
    """
    files = {}
    for argument in arguments:
        task, equals, name = argument.partition("=")
        if not equals or not name:
            raise ValueError(f"--data {argument!r} is not TASK=FILE; the tasks are {', '.join(tasks)}")
        if task not in tasks:
            raise ValueError(f"--data names a task {task!r}; the tasks are {', '.join(tasks)}")
        if not Path(name).is_file():
            raise FileNotFoundError(f"no data file {name} (of task {task!r})")
        files[task] = Path(name)
    return files


def read_batches(
    path: Path,
    tokenizer_folder: str,
    *,
    examples: int = 256,
    batch_size: int = 16,
    max_length: int = 256,
    by_length: bool = False,
) -> list[dict[str, Tensor]]:
    """The first `examples` rows of a file as tokenised, padded batches.

    Args:
        path: .jsonl, .csv or .tsv with a text and a label each (which a language model does not need); .txt with a text a line (for language models); or
            .safetensors with the model's inputs and "labels".
        tokenizer_folder: where the tokenizer is.
        examples: how many rows.
        batch_size: rows a batch.
        max_length: tokens a text; longer ones are cut, and to what the model takes.
        by_length: texts of about one length in a batch, which spares padding and changes no sum over all of them.

    Raises:
        ValueError: another format, no text column, rows without labels, an empty file, or one that is not UTF-8.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _split({name: value[:examples] for name, value in load_file(path).items()}, batch_size, path)
    config = _config(tokenizer_folder)
    predicts_text = (getattr(config, "architectures", None) or [""])[0].endswith(LANGUAGE_MODELS)
    texts, labels = read_texts(path, examples, labelled=not predicts_text)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    max_length = min([max_length, *token_limits(tokenizer, config)])
    if by_length and labels is None:
        texts = sorted(texts, key=len)
    batches, cut = [], 0
    for first in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[first : first + batch_size],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        batch = dict(encoded)
        cut += int((batch["attention_mask"].sum(-1) >= max_length).sum())
        batch["labels"] = (
            batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            if labels is None
            else torch.tensor(labels[first : first + batch_size])
        )
        batches.append(batch)
    if cut:
        warn(f"{path}: {cut} of {len(texts)} texts were as long as {max_length} tokens or longer, and cut")
    return batches


def _config(folder: str) -> Any:
    """The model's configuration, or None where only a tokenizer is there."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return None


def read_texts(path: Path, examples: int, *, labelled: bool = True) -> tuple[list[str], list[Any] | None]:
    """Texts and labels of a file; labels are None for plain text, and unless they are wanted.

    Raises:
        ValueError: see `read_batches`.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(FORMATS)}")
    if path.suffix == ".txt":
        texts = [line for line in _content(path).splitlines() if line.strip()][:examples]
        if not texts:
            raise ValueError(f"{path} holds no text")
        return texts, None
    rows = _rows(path)[:examples]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    text = next((key for key in TEXT_KEYS if key in rows[0]), None)
    label = next((key for key in LABEL_KEYS if key in rows[0]), None)
    if text is None:
        raise ValueError(
            f"{path}: no text column among {', '.join(rows[0])}; name it {' or '.join(map(repr, TEXT_KEYS))}"
        )
    if label is None or not labelled:
        return [str(row[text]) for row in rows], None
    return [str(row[text]) for row in rows], [
        _label(path, number, row.get(label)) for number, row in enumerate(rows, 1)
    ]


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): convert it, as by iconv") from error


def _rows(path: Path) -> list[Mapping[str, Any]]:
    content = _content(path)
    if path.suffix in (".csv", ".tsv"):
        return list(csv.DictReader(content.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
    try:
        if path.suffix == ".json":
            return list(json.loads(content))
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _label(path: Path, number: int, value: Any) -> int | float:
    try:
        return int(value) if float(value) == int(float(value)) and "." not in str(value) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: row {number} has the label {value!r}; labels are class numbers or values"
        ) from error


def _split(tensors: Mapping[str, Tensor], size: int, path: Path) -> list[dict[str, Tensor]]:
    if "labels" not in tensors:
        raise ValueError(f"{path} holds no tensor named labels (it has {', '.join(tensors) or 'none'})")
    count = len(tensors["labels"])
    return [
        {name: value[first : first + size] for name, value in tensors.items()}
        for first in range(0, count, size)
    ]
