"""Vocabularies that differ: embeddings aligned row by row by token, and a tokenizer and config that follow.

`intersect` keeps the tokens that every model has, in the base's order; `union` keeps the base's and adds the others' at the
end. A model that lacks a token takes no part in its row: its task vector and curvature are zero there. A token that the base
lacks starts from the mean of the models that have it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gradmatch.common.settings import layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.estimators.names import choose
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.gathered import ABSENT, AlignedStore, Rows
from gradmatch.models.rewriting import IDS, check_loaded, dump, renumbered, rewritten, tokenizer_files
from gradmatch.models.templates import FILE as TEMPLATE
from gradmatch.models.templates import chosen_template
from gradmatch.models.tokenizers import EMBEDDINGS, rows_of, unread, vocabulary, with_rows

if TYPE_CHECKING:
    from gradmatch.plan.inputs import Inputs
    from gradmatch.plan.request import Request

GENERATION = "generation_config.json"
POSITIONS = re.compile(r"wpe|position|token_type", re.IGNORECASE)  # embeddings of something else


def tokenizer_of(inputs: Inputs, request: Request) -> tuple[dict[str, bytes | None], list[str]]:
    """The tokenizer's files that replace the base's, after every model is aligned on their vocabulary (see `align`), and notes."""
    folders = [inputs.base.folder, *(task.checkpoint.folder for task in inputs.tasks)]
    files, notes = align(inputs, request)
    base = inputs.base
    if base.folder and base.tokenizer and base.tokenizer != base.folder and not request.tokenizer:
        own = {name: (base.tokenizer / name).read_bytes() for name in tokenizer_files(base.tokenizer)}
        files = {**dict.fromkeys(tokenizer_files(base.folder)), **own, **files}
    if request.chat_template:
        text = chosen_template(request.chat_template, folders)
        if text:
            files[TEMPLATE] = text.encode()
            notes.append(
                f"chat template: {request.chat_template if len(request.chat_template) < 20 else 'as given'}"
            )
    return files, notes


def align(inputs: Inputs, request: Request) -> tuple[dict[str, bytes | None], list[str]]:
    """Compare the vocabularies; where a policy or a tokenizer is chosen, align every model and curvature on a common one.

    Args:
        inputs: changed in place.
        request: its `embeddings` ("error", "intersect" or "union") and `tokenizer` (whose the output has).

    Returns:
        Tokenizer files that replace the base's in the output (None: left out), and notes.

    Raises:
        ValueError: vocabularies differ and no policy was chosen, one cannot be read, or a tokenizer that cannot be rewritten.
    """
    models = [inputs.base, *(task.checkpoint for task in inputs.tasks)]
    names = ["the base", *(task.name for task in inputs.tasks)]
    owner = _owner(request.tokenizer, names)
    notes = [
        f"the vocabulary of {name} could not be read ({file} alone): its rows are taken to be those of the same tokens"
        for name, model in zip(names, models, strict=True)
        if (file := unread(model.tokenizer))
    ]
    tables = _tables(models)
    known = next((table for table in tables if table is not None), None)
    if known is None:
        return _taken(models, owner, notes), notes
    reference = tables[0] if tables[0] is not None else known
    given = [reference if table is None else table for table in tables]
    sizes = [_rows(model, table) for model, table in zip(models, given, strict=True)]
    held = [_with_rows(*one, notes) for one in zip(names, given, sizes, strict=True)]
    differs = [i for i, table in enumerate(held) if table != held[0] or sizes[i] != sizes[0]]
    if not differs:
        return _taken(models, owner, notes), notes
    if request.embeddings == "error" and owner is None:
        raise GradmatchError(
            _difference(names[differs[0]], models[differs[0]], held, sizes, differs[0], tables), "vocabulary"
        )
    for i in (0, *differs):
        if tables[i] is None and (sizes[i] != sizes[0] or unread(models[i].tokenizer) or i == 0):
            raise GradmatchError(
                f"the vocabulary of {names[i]} is not known ({unread(models[i].tokenizer) or 'it has no tokenizer'}), so that its rows cannot "
                "be aligned; save its tokenizer beside it, as tokenizer.json",
                "vocabulary",
            )
    ids, rows, keeps = _numbered(held, sizes, request.embeddings, owner)
    tensors = _vocabulary_tensors(models, sizes)
    padding = set(range(rows)) - set(ids.values())
    index = [_index(ids, table, rows) for table in held]
    for row in padding:  # rows of no token stay the rows of the model whose numbers are kept
        if row < sizes[keeps]:
            index[keeps][row] = row
    _gather(inputs, index, tensors)
    if ids == given[0] and owner is None:
        return {}, notes
    if owner is not None and owner > 0:
        return _taken([inputs.base, *models[1:]], owner, notes), notes
    base = inputs.base
    donors = [model.tokenizer for model in models[1:] if model.tokenizer is not None]
    files = rewritten(base.tokenizer, donors, ids)
    assert base.folder is not None
    assert base.tokenizer is not None
    moved = ids if any(ids.get(token) != number for token, number in held[0].items()) else None
    if moved:
        old = {number: token for token, number in held[0].items()}
        if base.changed:
            base.config = base.changed = renumbered(base.changed, old, moved)
        if (base.folder / GENERATION).is_file():
            files[GENERATION] = dump(renumbered(read_json(base.folder / GENERATION), old, moved))
    said = check_loaded(base.tokenizer, files, base.changed or {}, ids)
    return files, [*notes, said] if said else notes


def _owner(tokenizer: str, names: Sequence[str]) -> int | None:
    """The position of the model whose tokenizer was asked for; None where none was.

    Raises:
        ValueError: no model is called so.
    """
    if not tokenizer:
        return None
    if tokenizer == "base":
        return 0
    choose("tokenizer", tokenizer, ("base", *names[1:]))
    return names.index(tokenizer, 1)


def _taken(models: Sequence[Checkpoint], owner: int | None, notes: list[str]) -> dict[str, bytes | None]:
    """The tokenizer's files and special ids of the model that was asked for, in place of the base's."""
    if not owner:
        return {}
    base, model = models[0], models[owner]
    if model.tokenizer is None or not (own := tokenizer_files(model.tokenizer)):
        raise GradmatchError(
            f"{model.where} has no tokenizer, which the output was to have; choose another tokenizer",
            "vocabulary",
            model.where,
        )
    files: dict[str, bytes | None] = dict.fromkeys(tokenizer_files(base.folder) if base.folder else ())
    files |= {name: (model.tokenizer / name).read_bytes() for name in own}
    theirs = {key: value for key, value in (model.config or {}).items() if IDS.search(key)}
    if base.config is not None:
        base.config = base.changed = {**(base.changed or base.config), **theirs}
    if model.folder is not None and (model.folder / GENERATION).is_file():
        files[GENERATION] = (model.folder / GENERATION).read_bytes()
    notes.append(f"tokenizer and ids of special tokens: those of {model.where}")
    return files


def _numbered(
    tables: Sequence[Mapping[str, int]], sizes: Sequence[int], policy: str, owner: int | None
) -> tuple[dict[str, int], int, int]:
    """Token -> id of the output, its number of rows, and the model whose rows of no token stay (padding).

    A union's new tokens take the ids after the base's last one, whose rows may be padding there; so does `add_tokens`.

    Raises:
        ValueError: no token in common.
    """
    if owner is not None:
        return dict(tables[owner]), sizes[owner], owner
    base = dict(tables[0])
    ordered = sorted(base, key=lambda token: base[token])
    if policy == "union":
        following = max(base.values()) + 1
        for table in tables[1:]:
            for token in sorted(table, key=lambda token: table[token]):
                if token not in base:
                    base[token] = following
                    following += 1
        return base, max(sizes[0], following), 0
    kept = [token for token in ordered if all(token in table for table in tables)]
    if not kept:
        raise GradmatchError("the vocabularies have no token in common", "vocabulary")
    if len(kept) == len(base):
        return base, sizes[0], 0
    return {token: number for number, token in enumerate(kept)}, len(kept), 0


def _index(ids: Mapping[str, int], table: Mapping[str, int], rows: int) -> list[int]:
    """Source row of every output row."""
    index = [ABSENT] * rows
    for token, number in ids.items():
        index[number] = table.get(token, ABSENT)
    return index


def _gather(inputs: Inputs, index: Sequence[list[int]], tensors: Sequence[str]) -> None:
    """Put every model and curvature on the common rows."""
    aligned = [
        AlignedStore(task.checkpoint.store, Rows(rows), tensors)
        for task, rows in zip(inputs.tasks, index[1:], strict=True)
    ]
    rows0 = Rows(index[0])
    store0 = AlignedStore(inputs.base.store, rows0, tensors, donors=aligned)
    for task, store in zip(inputs.tasks, aligned, strict=True):
        store.base = store0
        task.checkpoint = _replaced(task.checkpoint, store, len(store.rows.index))
        task.store = store
        for curvature in (task.mean, task.gradient):
            if curvature is not None:
                curvature.align(tensors, store.rows)
    inputs.base = _replaced(inputs.base, store0, len(rows0.index))
    inputs.store = store0
    if inputs.base_curvature is not None and not isinstance(inputs.base_curvature, float):
        inputs.base_curvature.align(tensors, rows0)


def _with_rows(name: str, table: Mapping[str, int], rows: int, notes: list[str]) -> dict[str, int]:
    """The tokens that have a row; others can be written but not read by their model, and are told."""
    beyond = sorted((number, token) for token, number in table.items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        notes.append(
            f"the tokenizer of {name} has {len(beyond)} tokens beyond the {rows} rows of its embeddings, first {token!r} ({number}): they "
            "have no weights and take no part"
        )
    return {token: number for token, number in table.items() if number < rows}


def _vocabulary_tensors(models: Sequence[Checkpoint], sizes: Sequence[int]) -> list[str]:
    """Tensors with one row a token in every model: input and output embeddings and output biases.

    Raises:
        ValueError: there is none, or the model is as wide as its vocabulary is long, and no name tells the embeddings.
    """
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
    if not found:
        raise GradmatchError(
            f"no tensor has a row for each token of every model ({', '.join(map(str, sizes))} rows by their configs and tokenizers); "
            "give all models the base's vocabulary first",
            "vocabulary",
        )
    if all(models[0].spec(name).shape[1:] != (sizes[0],) for name in found):
        return found
    named = [name for name in found if EMBEDDINGS.search(name)]
    if not named:
        raise GradmatchError(
            f"the models are {sizes[0]} wide and have {sizes[0]} tokens, and none of the names {', '.join(found)} is one of "
            "embeddings that are known; give all models the base's vocabulary first",
            "vocabulary",
        )
    return named


def _rows(model: Checkpoint, table: Mapping[str, int]) -> int:
    """A model's number of embedding rows, by its config (also of a tower's), else as many as it has tokens."""
    return rows_of(model.config) or max(table.values()) + 1


def _tables(models: Sequence[Checkpoint]) -> list[dict[str, int] | None]:
    """Token -> id of every model that comes with a tokenizer; equal files are parsed once."""
    tables: list[dict[str, int] | None] = []
    parsed: dict[bytes, dict[str, int] | None] = {}
    for model in models:
        key, parse = vocabulary(model.tokenizer)
        if key not in parsed:
            parsed[key] = parse()
        tables.append(parsed[key])
    return tables


def _difference(
    name: str,
    model: Checkpoint,
    tables: Sequence[Mapping[str, int]],
    sizes: Sequence[int],
    position: int,
    read: Sequence[Mapping[str, int] | None],
) -> str:
    """What to say of two vocabularies that differ."""
    base, table = tables[0], tables[position]
    rows = f"the embeddings of {name} have {sizes[position]} rows and the base's {sizes[0]}"
    if read[position] is None or read[0] is None:
        whose, file = (name, unread(model.tokenizer)) if read[position] is None else ("the base", "")
        why = f"could not be read ({file} alone)" if file else "is not known, it has no tokenizer"
        return f"{rows}, and the vocabulary of {whose} {why}; save its tokenizer beside it, as tokenizer.json"
    if table == base:
        return f"{rows}, for the same tokens; choose embeddings='union' or 'intersect' to merge the rows of tokens and keep the base's padding"
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
    config = None if checkpoint.config is None else with_rows(checkpoint.config, rows)
    return checkpoint.seen(store, config=config, changed=copy.deepcopy(config), original=checkpoint)
