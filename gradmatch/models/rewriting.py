"""The files of a tokenizer whose vocabulary has changed, and a check of them by the library that will load them."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.models.tokenizers import pieces_of, vocabulary, vocabulary_files

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
IDS = re.compile(
    r"(_token_ids?|_token_index|^suppress_tokens|^begin_suppress_tokens|^bad_words_ids|^force_words_ids)$"
)
FIXED = ("forced_decoder_ids", "sequence_bias")  # tables with ids in forms of their own


def tokenizer_files(folder: Path) -> list[str]:
    """Every file of a folder that its tokenizer loads: vocabularies, settings, templates; none where there is no vocabulary."""
    held = vocabulary_files(folder)
    templates = [path.name for path in sorted(folder.iterdir()) if path.suffix == ".jinja"]
    return [*held, *(name for name in SETTINGS if (folder / name).is_file()), *templates] if held else []


def rewritten(
    folder: Path | None, donors: Sequence[Path], numbered: Mapping[str, int]
) -> dict[str, bytes | None]:
    """The base's tokenizer files with another vocabulary.

    Args:
        folder: the base's.
        donors: folders of the models that new tokens come from (for their merges and flags).
        numbered: token -> id in the output.

    Returns:
        File name -> content; None for a file of the old vocabulary that is not to be carried along.

    Raises:
        ValueError: the base has no tokenizer.json or vocab.txt to rewrite, or a token that it cannot do without is gone.
    """
    if folder is None:
        raise GradmatchError(
            "the base has no tokenizer files, so its vocabulary cannot be changed", "vocabulary"
        )
    files: dict[str, bytes | None] = dict.fromkeys(vocabulary_files(folder))
    added: dict[str, Mapping[str, Any]] = {}
    if "tokenizer.json" in files:
        content = read_json(folder / "tokenizer.json")
        others = [read_json(path) for donor in donors if (path := donor / "tokenizer.json").is_file()]
        files["tokenizer.json"] = dump(_rewrite(content, others, numbered))
        added = {token["content"]: token for other in others for token in other.get("added_tokens") or ()}
    in_order = sorted(numbered, key=lambda token: numbered[token])
    if "vocab.txt" in files and (gapless(numbered) or "tokenizer.json" not in files):
        _check_gapless(numbered, "vocab.txt")
        files["vocab.txt"] = ("\n".join(in_order) + "\n").encode()
    if all(content is None for content in files.values()):
        raise GradmatchError(
            f"{folder} has neither tokenizer.json nor vocab.txt; save it with a fast tokenizer to change its vocabulary",
            "vocabulary",
            folder,
        )
    for name in SETTINGS:
        if (folder / name).is_file():
            files[name] = dump(_settings(read_json(folder / name), numbered, added, name))
    return files


def renumbered(
    config: Mapping[str, Any], old: Mapping[int, str], numbered: Mapping[str, int]
) -> dict[str, Any]:
    """A model's or a generation's config with the new ids of its tokens, in lists and nested configs too.

    A token that is gone is left out of lists.

    Raises:
        ValueError: a single id, or a whole list, of a token that is gone or unknown; ids in a form that is not understood.
    """
    result = dict(config)
    for key, value in config.items():
        if isinstance(value, Mapping):
            result[key] = renumbered(value, old, numbered)
        elif key in FIXED and value:
            raise GradmatchError(
                f"{key} holds ids of tokens ({value!r}), which would change; remove it, or choose embeddings='union'",
                "vocabulary",
                key,
            )
        elif IDS.search(key):
            result[key] = _ids(value, old, numbered, key)
    return result


def _ids(value: Any, old: Mapping[int, str], numbered: Mapping[str, int], key: str) -> Any:
    if isinstance(value, list):
        lists = [one for one in value if isinstance(one, list)]
        kept = (
            [_ids(one, old, numbered, key) for one in lists]
            if lists
            else [numbered[old[one]] for one in value if old.get(one) in numbered]
        )
        if value and not kept:
            raise GradmatchError(
                f"{key} needs one of {value}, none of which every model has; choose embeddings='union'",
                "vocabulary",
                key,
            )
        return kept
    if type(value) is not int or value < 0:
        return value
    if value not in old:
        raise GradmatchError(
            f"{key} is {value}, which is no token of the base's vocabulary; choose embeddings='union', or mend it",
            "vocabulary",
            key,
        )
    return _new_id(old[value], numbered, key)


def _settings(
    settings: dict[str, Any], numbered: Mapping[str, int], added: Mapping[str, Mapping[str, Any]], name: str
) -> dict[str, Any]:
    """tokenizer_config.json or special_tokens_map.json: no token that is gone may come back when it is loaded."""
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        own = {entry["content"]: entry for entry in decoder.values()}
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        new = {
            token: {flag: entry[flag] for flag in flags if flag in entry} for token, entry in added.items()
        }
        settings["added_tokens_decoder"] = {
            str(numbered[token]): entry for token, entry in {**new, **own}.items() if token in numbered
        }
    for key, value in list(settings.items()):
        if key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            settings[key] = [one for one in value if _content(one) in numbered]
        elif key == "extra_special_tokens" and isinstance(value, dict):
            settings[key] = {role: one for role, one in value.items() if _content(one) in numbered}
        elif key.endswith("_token") and _content(value):
            _new_id(_content(value), numbered, f"{key} of {name}")
    return settings


def _content(token: Any) -> str:
    """A token that is written as text or as a table of its flags; "" for anything else."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _rewrite(
    content: dict[str, Any], others: Sequence[Mapping[str, Any]], numbered: Mapping[str, int]
) -> dict[str, Any]:
    """A tokenizer.json whose vocabulary is `numbered`.

    Added tokens stand in the model's vocabulary too: one that does not is numbered anew when the file is loaded.
    """
    result = copy.deepcopy(content)
    flags = {
        token["content"]: token for other in (*others, content) for token in other.get("added_tokens") or ()
    }
    ordered = sorted(numbered, key=lambda token: numbered[token])
    model = result["model"]
    if isinstance(model["vocab"], list):
        _check_gapless(numbered, "the list of pieces in tokenizer.json")
        scores = {piece: score for other in (*others, content) for piece, score in _pieces(other)}
        model["vocab"] = [[token, scores.get(token, 0.0)] for token in ordered]
        if model.get("unk_id") is not None:
            model["unk_id"] = _new_id(
                _pieces(content)[model["unk_id"]][0], numbered, "unk_id of tokenizer.json"
            )
    else:
        model["vocab"] = {token: numbered[token] for token in ordered}
    if model.get("merges") is not None:
        pieces = {piece for other in (content, *others) for piece in pieces_of(other) if piece in numbered}
        merges = {_pair(m): m for other in (content, *others) for m in other["model"].get("merges") or ()}
        model["merges"] = [
            merge for pair, merge in merges.items() if pieces.issuperset({*pair, "".join(pair)})
        ]
    result["added_tokens"] = [{**flags[token], "id": numbered[token]} for token in ordered if token in flags]
    _renumber_processor(result.get("post_processor"), numbered)
    return result


def gapless(numbered: Mapping[str, int]) -> bool:
    """Whether the ids are 0, 1, 2, ... without a gap."""
    return sorted(numbered.values()) == list(range(len(numbered)))


def _check_gapless(numbered: Mapping[str, int], where: str) -> None:
    """Refuse ids with gaps where a token's place is its id."""
    if not gapless(numbered):
        raise GradmatchError(
            f"{where} numbers tokens by their place, and the ids of the output have gaps; choose embeddings='intersect'",
            "vocabulary",
            where,
        )


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
                node[key][1] = _new_id(node[key][0], numbered, "the post-processor")
        if isinstance(node.get("ids"), list) and isinstance(node.get("tokens"), list):
            node["ids"] = [_new_id(token, numbered, "the post-processor") for token in node["tokens"]]
        for value in node.values():
            _renumber_processor(value, numbered)


def _new_id(token: str, numbered: Mapping[str, int], where: str) -> int:
    """A token's new id."""
    if token not in numbered:
        raise GradmatchError(
            f"{where} needs token {token!r}, which not every model has; choose embeddings='union' (or, where it has no row in its own model "
            "either, resize the embeddings there first)",
            "vocabulary",
            where,
        )
    return numbered[token]


def check_loaded(
    folder: Path, files: Mapping[str, bytes | None], config: Mapping[str, Any], numbered: Mapping[str, int]
) -> str:
    """Load the tokenizer as it will be written, and compare every token's id with what is planned.

    Returns:
        A note where transformers does not read the base's own vocabulary from its files either, else "".

    Raises:
        ValueError: it gives a token another id, has another one, lacks one, or cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as made:
        for source in folder.iterdir():
            if source.suffix in (".json", ".txt", ".jinja") and source.is_file() and source.name not in files:
                shutil.copyfile(source, Path(made) / source.name)
        for name, content in files.items():
            if content is not None:
                (Path(made) / name).write_bytes(content)
        (Path(made) / "config.json").write_bytes(dump(config))
        found, failure = _loaded(made)
    wrong = sorted(token for token in {*found, *numbered} if found.get(token) != numbered.get(token))
    if not wrong:
        return ""
    if _loaded(folder)[0] != vocabulary(folder)[1]():
        return "the output's tokenizer is not checked: transformers does not read the base's vocabulary from its files"
    first = wrong[0]
    said = failure or f"first {first!r}: {found.get(first)}, its row is {numbered.get(first)}"
    raise GradmatchError(
        f"the tokenizer with the new vocabulary gives {len(wrong)} tokens another id than their row ({said}); give all models one vocabulary",
        "vocabulary",
    )


def _loaded(folder: str | Path) -> tuple[dict[str, int], str]:
    """Token -> id as transformers loads a folder, and why it does not."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise anything
        return {}, f"{type(error).__name__}: {error}"
    return loaded.get_vocab(), ""


def dump(content: Any) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
