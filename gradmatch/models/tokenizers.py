"""Tokenizer files: token -> id, and the files of a tokenizer whose vocabulary has changed. Text and JSON only."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model


def vocabulary(folder: Path | None) -> tuple[bytes, Callable[[], dict[str, int] | None]]:
    """(bytes that identify the vocabulary's file, function that parses it) of a model folder.

    tokenizer.json, else vocab.txt (a token a line), else vocab.json with added_tokens.json; None where there is none.
    """
    for name, parse in (
        ("tokenizer.json", _from_tokenizer),
        ("vocab.txt", _from_lines),
        ("vocab.json", _from_table),
    ):
        if folder is not None and (folder / name).is_file():
            content = (folder / name).read_bytes()
            if name == "vocab.json" and (folder / "added_tokens.json").is_file():
                content += b"\0" + (folder / "added_tokens.json").read_bytes()
            return content, partial(_checked, parse, content, folder / name)
    return b"", lambda: None


def _checked(parse: Callable[[bytes], dict[str, int]], content: bytes, where: Path) -> dict[str, int]:
    """Parse, naming the file in errors.

    Raises:
        ValueError: the file is not what its name promises.
    """
    try:
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} cannot be read as a vocabulary ({error}); fetch the tokenizer again"
        ) from error


def _from_tokenizer(content: bytes) -> dict[str, int]:
    table = json.loads(content)
    return _model_vocabulary(table) | {
        token["content"]: token["id"] for token in table.get("added_tokens") or ()
    }


def _model_vocabulary(table: Mapping[str, Any]) -> dict[str, int]:
    """Of the tokenizer's model: a table (BPE, WordPiece, WordLevel) or a list of pieces (Unigram)."""
    vocab = table["model"]["vocab"]
    if isinstance(vocab, list):
        return {piece: number for number, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def _from_lines(content: bytes) -> dict[str, int]:
    lines = content.decode("utf-8").split("\n")
    return {line.rstrip("\r"): number for number, line in enumerate(lines) if line or number < len(lines) - 1}


def _from_table(content: bytes) -> dict[str, int]:
    base, _, added = content.partition(b"\0")
    return {**json.loads(base), **(json.loads(added) if added else {})}


def rewritten(folder: Path | None, donors: Sequence[Path], numbered: Mapping[str, int]) -> dict[str, bytes]:
    """The base's tokenizer files with another vocabulary.

    Args:
        folder: the base's.
        donors: folders of the models that new tokens come from (for their merges and flags).
        numbered: token -> id in the output.

    Returns:
        File name -> content.

    Raises:
        ValueError: the base has no tokenizer.json or vocab.txt to rewrite, or a token that it cannot do without is gone.
    """
    if folder is None:
        raise ValueError("the base has no tokenizer files, so its vocabulary cannot be changed")
    files: dict[str, bytes] = {}
    if (folder / "tokenizer.json").is_file():
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        others = [
            json.loads(p.read_text(encoding="utf-8")) for d in donors if (p := d / "tokenizer.json").is_file()
        ]
        files["tokenizer.json"] = _dump(_rewrite(content, others, numbered))
    if (folder / "vocab.txt").is_file():
        files["vocab.txt"] = ("\n".join(sorted(numbered, key=lambda token: numbered[token])) + "\n").encode()
    if not files:
        raise ValueError(
            f"{folder} has neither tokenizer.json nor vocab.txt; save it with a fast tokenizer to change its vocabulary"
        )
    old = vocabulary(folder)[1]() or {}
    by_id = {number: token for token, number in old.items()}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            decoder = settings.get("added_tokens_decoder")
            if decoder:
                kept = {entry["content"]: entry for entry in decoder.values() if entry["content"] in numbered}
                settings["added_tokens_decoder"] = {
                    str(numbered[token]): entry for token, entry in kept.items()
                }
            for key, value in settings.items():
                if key.endswith("_token_id") and isinstance(value, int) and value in by_id:
                    settings[key] = _renumber(by_id[value], numbered, key)
            files[name] = _dump(settings)
    return files


def _rewrite(
    content: dict[str, Any], others: Sequence[Mapping[str, Any]], numbered: Mapping[str, int]
) -> dict[str, Any]:
    """A tokenizer.json whose vocabulary is `numbered`."""
    result = copy.deepcopy(content)
    own_added = {token["content"]: token for token in content.get("added_tokens") or ()}
    flags = {
        token["content"]: token for other in others for token in other.get("added_tokens") or ()
    } | own_added
    donated = {piece for other in (content, *others) for piece in _model_vocabulary(other)}
    inner = {token: number for token, number in numbered.items() if token in donated or token not in flags}
    model = result["model"]
    if isinstance(model["vocab"], list):
        scores = {piece: score for other in (*others, content) for piece, score in _pieces(other)}
        ordered = sorted(numbered, key=lambda token: numbered[token])
        model["vocab"] = [[token, scores.get(token, 0.0)] for token in ordered]
    else:
        model["vocab"] = dict(sorted(inner.items(), key=lambda pair: pair[1]))
    if model.get("merges") is not None:
        merges = {
            _pair(merge): merge
            for other in (content, *others)
            for merge in other["model"].get("merges") or ()
        }
        model["merges"] = [
            merge
            for pair, merge in merges.items()
            if pair[0] in inner and pair[1] in inner and "".join(pair) in inner
        ]
    result["added_tokens"] = [
        {**flags[token], "id": number}
        for token, number in sorted(numbered.items(), key=lambda p: p[1])
        if token in flags
    ]
    _renumber_processor(result.get("post_processor"), numbered)
    return result


def _pieces(content: Mapping[str, Any]) -> list[tuple[str, float]]:
    vocab = content["model"]["vocab"]
    return [(piece, score) for piece, score in vocab] if isinstance(vocab, list) else []


def _pair(merge: Any) -> tuple[str, str]:
    """A BPE merge, in either spelling."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _renumber_processor(node: Any, numbered: Mapping[str, int]) -> None:
    """Ids inside a post-processor, in place."""
    if isinstance(node, list):
        for entry in node:
            _renumber_processor(entry, numbered)
    elif isinstance(node, dict):
        for key in ("sep", "cls"):
            if isinstance(node.get(key), list) and len(node[key]) == 2:
                node[key][1] = _renumber(node[key][0], numbered, "the post-processor")
        if isinstance(node.get("ids"), list) and isinstance(node.get("tokens"), list):
            node["ids"] = [_renumber(token, numbered, "the post-processor") for token in node["tokens"]]
        for value in node.values():
            _renumber_processor(value, numbered)


def _renumber(token: str, numbered: Mapping[str, int], where: str) -> int:
    """A token's new id.

    Raises:
        ValueError: it is not in the output's vocabulary.
    """
    if token not in numbered:
        raise ValueError(
            f"{where} needs token {token!r}, which not every model has; choose embeddings='union'"
        )
    return numbered[token]


def _dump(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def check_tokenizers(base: Model | Checkpoint, model: Model) -> None:
    """Compare the tokenizers of two folders; models without a tokenizer file beside them pass.

    Raises:
        ValueError: they differ: token ids mean other words, and a difference of weights means nothing.
    """
    vocabularies = [_digest_of(base), _digest_of(model)]
    if None in vocabularies or vocabularies[0] == vocabularies[1]:
        return
    (size, _), (other, _) = (found for found in vocabularies if found is not None)
    raise ValueError(
        f"the tokenizers of {base!s} ({size} tokens) and {model!s} ({other} tokens) differ, so the task was not fine-tuned "
        "from this base; fine-tune this base, with its own tokenizer"
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
