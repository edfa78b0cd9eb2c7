"""Vocabularies that differ: embeddings aligned row by row by token, and a tokenizer and config that follow.

`intersect` keeps the tokens that every model has, in the base's order; `union` keeps the base's and adds the others' at the
end. A model that lacks a token takes no part in its row: its task vector and curvature are zero there. A token that the base
lacks starts from the mean of the models that have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.common.settings import layer_of
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.gathered import ABSENT, AlignedStore, Rows
from gradmatch.models.tokenizers import rewritten, vocabulary

if TYPE_CHECKING:
    from gradmatch.plan.opened import Inputs

EMBEDDINGS = re.compile(
    r"embed_tokens|word_embeddings|embed_in|embed_out|tok_embeddings|wte|shared|^output\.|predictions\.(bias|decoder)"
    r"|lm_head\.(weight|bias|decoder)",
    re.IGNORECASE,
)  # input and output embeddings and their biases, as transformers calls them
POSITIONS = re.compile(r"wpe|position|token_type", re.IGNORECASE)  # embeddings of something else


def align(inputs: Inputs, policy: str) -> dict[str, bytes]:
    """Compare the vocabularies; with a policy, align every model and curvature on a common one.

    Args:
        inputs: changed in place.
        policy: "error", "intersect" or "union".

    Returns:
        Tokenizer files that replace the base's in the output.

    Raises:
        ValueError: vocabularies differ and no policy was chosen, or a tokenizer that cannot be rewritten.
    """
    models = [inputs.base, *(task.checkpoint for task in inputs.tasks)]
    tables = _tables(models)
    base = tables[0]
    if base is None:
        return {}
    known = [
        base if table is None else table for table in tables
    ]  # a model without a tokenizer uses the base's
    sizes = _rows(models, known)
    differs = [i for i, table in enumerate(known) if table != base or sizes[i] != sizes[0]]
    if not differs:
        return {}
    if policy == "error":
        position = differs[0]
        name = inputs.tasks[position - 1].name
        raise ValueError(
            _difference(name, base, known[position])
            if known[position] != base
            else f"the embeddings of {name} have {sizes[position]} rows and the base's {sizes[0]}, for the same tokens; "
            "choose embeddings='union' or 'intersect' to merge the rows of tokens and keep the base's padding"
        )
    tokens = common_tokens(known, policy)
    padding = _padding(models[0], base) if policy == "union" or len(tokens) == len(base) else 0
    tensors = _vocabulary_tensors(models, known)
    end = max(base.values()) + 1
    aligned = [
        AlignedStore(model.store, Rows(_index(tokens, table, [ABSENT] * padding, end)), tensors)
        for model, table in zip(models[1:], known[1:], strict=True)
    ]
    rows0 = Rows(_index(tokens, base, list(range(end, end + padding)), end))
    store0 = AlignedStore(models[0].store, rows0, tensors, donors=aligned)
    for task, store in zip(inputs.tasks, aligned, strict=True):
        store.base = store0
        task.checkpoint = _replaced(task.checkpoint, store, len(store.rows.index))
        task.store = store
        for curvature in (task.mean, task.gradient):
            if curvature is not None:
                curvature.rows = dict.fromkeys(tensors, store.rows)
    inputs.base = _replaced(inputs.base, store0, len(rows0.index))
    inputs.store = store0
    if inputs.base_curvature is not None and not isinstance(inputs.base_curvature, float):
        inputs.base_curvature.rows = dict.fromkeys(tensors, rows0)
    if tokens == sorted(base, key=lambda token: base[token]):
        return {}
    numbered = (
        {token: number for number, token in enumerate(tokens)}
        if policy == "intersect"
        else _numbered(tokens, base)
    )
    donors = [model.path for model in models[1:] if model.path is not None]
    return rewritten(models[0].path, donors, numbered)


def common_tokens(tables: Sequence[Mapping[str, int]], policy: str) -> list[str]:
    """The output's tokens: the base's order, then (union) what the others add, in their order.

    Raises:
        ValueError: no token in common.
    """
    base = sorted(tables[0], key=lambda token: tables[0][token])
    if policy == "intersect":
        tokens = [token for token in base if all(token in table for table in tables)]
        if not tokens:
            raise ValueError("the vocabularies have no token in common")
        return tokens
    added = dict.fromkeys(
        token
        for table in tables[1:]
        for token in sorted(table, key=lambda token: table[token])
        if token not in tables[0]
    )
    return [*base, *added]


def _index(
    tokens: Sequence[str], table: Mapping[str, int], padding: Sequence[int], base_end: int
) -> list[int]:
    """Source row of every output row. Padding rows (of the base, after its last token) keep their place before new tokens."""
    rows = [table.get(token, ABSENT) for token in tokens]
    rows[base_end:base_end] = padding
    return rows


def _numbered(tokens: Sequence[str], base: Mapping[str, int]) -> dict[str, int]:
    """Ids of a union: the base's own, then the next ones."""
    following = max(base.values()) + 1
    numbered = dict(base)
    for token in tokens:
        if token not in numbered:
            numbered[token] = following
            following += 1
    return numbered


def _padding(model: Checkpoint, table: Mapping[str, int]) -> int:
    """Rows of the embeddings beyond the last token."""
    rows = int((model.config or {}).get("vocab_size", 0))
    return max(0, rows - (max(table.values()) + 1))


def _vocabulary_tensors(models: Sequence[Checkpoint], tables: Sequence[Mapping[str, int]]) -> list[str]:
    """Tensors with one row a token in every model: input and output embeddings and output biases.

    Raises:
        ValueError: the model is as wide as its vocabulary is long, and no name tells the embeddings.
    """
    sizes = _rows(models, tables)
    found = [
        name
        for name in models[0].store
        if layer_of(name) is None
        and not POSITIONS.search(name)
        and all(
            model.spec(name).shape[:1] == (size,)
            for model, size in zip(models, sizes, strict=True)
            if name in model.store
        )
    ]
    if all(models[0].spec(name).shape[1:] != (sizes[0],) for name in found):
        return found
    named = [name for name in found if EMBEDDINGS.search(name)]
    if not named:
        raise ValueError(
            f"the models are {sizes[0]} wide and have {sizes[0]} tokens, and none of the names {', '.join(found)} is one of "
            "embeddings that are known; give all models the base's vocabulary first"
        )
    return named


def _rows(models: Sequence[Checkpoint], tables: Sequence[Mapping[str, int]]) -> list[int]:
    """Each model's number of embedding rows."""
    return [
        (model.config or {}).get("vocab_size") or max(table.values()) + 1
        for model, table in zip(models, tables, strict=True)
    ]


def _tables(models: Sequence[Checkpoint]) -> list[dict[str, int] | None]:
    """Token -> id of every model that comes with a tokenizer; equal files are parsed once."""
    tables: list[dict[str, int] | None] = []
    parsed: dict[bytes, dict[str, int] | None] = {}
    for model in models:
        folder = model.path if model.path is not None and Path(model.path).is_dir() else None
        key, parse = vocabulary(folder)
        if key not in parsed:
            parsed[key] = parse()
        tables.append(parsed[key])
    return tables


def _difference(name: str, base: Mapping[str, int], table: Mapping[str, int]) -> str:
    """What to say of two vocabularies that differ."""
    missing = [token for token in base if token not in table]
    added = [token for token in table if token not in base]
    moved = [token for token in base if token in table and table[token] != base[token]]
    parts = []
    if moved:
        token = moved[0]
        parts.append(
            f"{len(moved)} tokens have another id, first {token!r}: {base[token]} in the base, {table[token]} in it"
        )
    if missing:
        parts.append(f"{len(missing)} are missing, first {missing[0]!r}")
    if added:
        parts.append(f"{len(added)} are added, first {added[0]!r}")
    return (
        f"the vocabulary of {name} ({len(table)} tokens) differs from the base's ({len(base)}): {'; '.join(parts)}; "
        "choose embeddings='union' or 'intersect' to align the rows by token"
    )


def _replaced(checkpoint: Checkpoint, store: AlignedStore, rows: int) -> Checkpoint:
    """The checkpoint with aligned tensors and a config of the new size."""
    config = None if checkpoint.config is None else {**checkpoint.config, "vocab_size": rows}
    changed = None if config is None else json.loads(json.dumps(config))
    result = Checkpoint(
        store,
        path=checkpoint.path,
        config=config,
        aliases=checkpoint.aliases,
        module=checkpoint.module,
        changed=changed,
        folder=checkpoint.folder,
        names=checkpoint.names,
    )
    result.original = checkpoint
    return result
