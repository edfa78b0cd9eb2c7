"""Tokenizer files of a model's folder: token -> id, whether two are the same, and which file could not be read. Text and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

# vocabularies in forms that are not read here
UNREAD = (".model", ".spm", ".tiktoken", ".codes", ".bpe", ".vocab")

VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "encoder.json",
    "dict.txt",
)
# input and output embeddings and their biases, as transformers calls them
EMBEDDINGS = re.compile(
    r"embed_tokens|word_embeddings|embed_in|embed_out|tok_embeddings|wte|shared|^output\.|predictions\.(bias|decoder)"
    r"|lm_head\.(weight|bias|decoder)",
    re.IGNORECASE,
)
SIZE = "vocab_size"


def rows_of(config: Mapping[str, Any] | None) -> int | None:
    """How many rows a config says that the embeddings have; None where it does not say."""
    return next((part[SIZE] for part in _parts(config) if type(part.get(SIZE)) is int), None)


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config with another number of rows, wherever it holds one."""
    changed = {
        key: {**value, SIZE: rows}
        for key, value in config.items()
        if isinstance(value, Mapping) and SIZE in value
    }
    return {**config, **changed, **({SIZE: rows} if SIZE in config or not changed else {})}


def _parts(config: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A config and the ones nested in it."""
    if config:
        yield config
        yield from (value for value in config.values() if isinstance(value, Mapping))


def vocabulary(folder: Path | None) -> tuple[bytes, Callable[[], dict[str, int] | None]]:
    """(bytes that identify the vocabulary's file, function that parses it) of a model folder.

    tokenizer.json, else vocab.txt (a token a line), else vocab.json with added_tokens.json; None where there is none of these,
    or a file in another form beside which they may be stale.
    """
    for name, parse in (
        ("tokenizer.json", _from_tokenizer),
        ("vocab.txt", _from_lines),
        ("vocab.json", _from_table),
    ):
        if folder is not None and (folder / name).is_file():
            content = (folder / name).read_bytes()
            if name != "tokenizer.json" and (folder / "added_tokens.json").is_file():
                content += b"\0" + (folder / "added_tokens.json").read_bytes()
            return content, partial(_checked, parse, content, folder / name)
    return b"", lambda: None


def vocabulary_files(folder: Path) -> list[str]:
    """Every file of a folder that holds a vocabulary, in whatever form."""
    return [
        path.name for path in sorted(folder.iterdir()) if path.name in VOCABULARIES or path.suffix in UNREAD
    ]


def unread(folder: Path | None) -> str:
    """The file of a vocabulary that cannot be read here, where a folder has no other; "" where there is none."""
    if folder is None or vocabulary(folder)[0]:
        return ""
    return next((path.name for path in sorted(folder.iterdir()) if path.suffix in UNREAD), "")


def _checked(parse: Callable[[bytes], dict[str, int]], content: bytes, where: Path) -> dict[str, int]:
    """Parse, naming the file in errors."""
    try:
        table = parse(content)
        if not all(type(number) is int and number >= 0 for number in table.values()):
            raise GradmatchError("an id is no whole number", "vocabulary")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GradmatchError(
            f"{where} cannot be read as a vocabulary ({error}); fetch the tokenizer again",
            "unreadable_file",
            where,
        ) from error
    twice = len(table) - len(set(table.values()))
    if twice:
        taken: dict[int, str] = {}
        for token, number in table.items():
            if number in taken:
                raise GradmatchError(
                    f"{where} gives {taken[number]!r} and {token!r} one id, {number}; fetch the tokenizer again",
                    "vocabulary",
                    where,
                )
            taken[number] = token
    return table


def _from_tokenizer(content: bytes) -> dict[str, int]:
    table = json.loads(content)
    return pieces_of(table) | {token["content"]: token["id"] for token in table.get("added_tokens") or ()}


def pieces_of(table: Mapping[str, Any]) -> dict[str, int]:
    """Of a tokenizer.json's model: a table (BPE, WordPiece, WordLevel) or a list of pieces (Unigram)."""
    vocab = table["model"]["vocab"]
    if isinstance(vocab, list):
        return {piece: number for number, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def _from_lines(content: bytes) -> dict[str, int]:
    held, _, added = content.partition(b"\0")
    lines = held.decode("utf-8").split("\n")
    table = {line.rstrip("\r"): n for n, line in enumerate(lines) if line or n < len(lines) - 1}
    return {**table, **(json.loads(added) if added else {})}


def _from_table(content: bytes) -> dict[str, int]:
    held, _, added = content.partition(b"\0")
    return {**json.loads(held), **(json.loads(added) if added else {})}


def check_tokenizers(base: Model | Checkpoint, model: Model) -> None:
    """Compare the tokenizers of two folders; models without a tokenizer file beside them pass.

    Raises:
        ValueError: they differ: token ids mean other words, and a difference of weights means nothing.
    """
    vocabularies = [_digest_of(base), _digest_of(model)]
    if None in vocabularies or vocabularies[0] == vocabularies[1]:
        return
    (size, _), (other, _) = (found for found in vocabularies if found is not None)
    raise GradmatchError(
        f"the tokenizers of {base!s} ({size} tokens) and {model!s} ({other} tokens) differ, so the task was not fine-tuned "
        "from this base; fine-tune this base, with its own tokenizer",
        "vocabulary",
        base,
    )


def _digest_of(model: Model | Checkpoint) -> tuple[int, str] | None:
    """(number of tokens, hash of the vocabulary) of a model folder with a tokenizer.json, else None."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    file = Path(model) / "tokenizer.json"
    if not file.is_file():
        return None
    vocabulary: Any = json.loads(file.read_text(encoding="utf-8")).get("model", {}).get("vocab", {})
    text = json.dumps(vocabulary, sort_keys=True)
    return len(vocabulary), hashlib.sha256(text.encode()).hexdigest()
