"""Vocabularies that differ: embeddings aligned row by row by token, and a tokenizer and config that follow.

`intersect` keeps the tokens that every model has, in the base's order; `union` keeps the base's and adds the others' at the
end. A model that lacks a token takes no part in its row: its task vector and curvature are zero there. A token that the base
lacks starts from the mean of the models that have it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.common.settings import layer_of
from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.estimators.names import choose
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.gathered import ABSENT, AlignedStore, Rows
from gradmatch.models.rewriting import IDS, check_loaded, dump, renumbered, rewritten, tokenizer_files
from gradmatch.models.templates import FILE as TEMPLATE
from gradmatch.models.templates import chosen_template
from gradmatch.models.tokenizers import EMBEDDINGS, unread, with_rows
from gradmatch.models.vocabularies import Vocabulary, difference, vocabularies

if TYPE_CHECKING:
    from gradmatch.plan.inputs import Inputs
    from gradmatch.plan.request import Request

GENERATION = "generation_config.json"
OTHER = ", though it is another file than the base's; save both tokenizers as tokenizer.json to have them compared"
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
        + _other_file(models[0], model, file)
        for name, model in zip(names, models, strict=True)
        if (file := unread(model.tokenizer))
    ]
    for note in notes:
        if OTHER in note:
            warn(note)
    held = vocabularies(names, models)
    if not held:
        return _taken(models, owner, notes), notes
    notes += [note for one in held for note in one.beyond]
    base = held[0]
    differs = [one for one in held if (one.ids, one.rows) != (base.ids, base.rows)]
    if not differs:
        return _taken(models, owner, notes), notes
    if request.embeddings == "error" and owner is None:
        raise GradmatchError(difference(base, differs[0]), "vocabulary")
    for one in (base, *differs):
        file = unread(one.model.tokenizer)
        if not one.known and (one is base or one.rows != base.rows or file):
            raise GradmatchError(
                f"the vocabulary of {one.name} is not known ({file or 'it has no tokenizer'}), so that its rows cannot be aligned; save "
                "its tokenizer beside it, as tokenizer.json",
                "vocabulary",
            )
    ids, rows, keeps = _numbered(held, request.embeddings, owner)
    tensors = _vocabulary_tensors(held)
    index = [[ABSENT] * rows for _ in held]
    for one, places in zip(held, index, strict=True):
        for token, number in ids.items():
            places[number] = one.ids.get(token, ABSENT)
    for row in set(range(min(rows, held[keeps].rows))) - set(ids.values()):
        index[keeps][row] = row  # rows of no token stay the rows of the model whose numbers are kept
    _gather(inputs, index, tensors)
    if ids == base.table and owner is None:
        return {}, notes
    if owner is not None and owner > 0:
        return _taken([inputs.base, *models[1:]], owner, notes), notes
    aligned = inputs.base
    donors = [model.tokenizer for model in models[1:] if model.tokenizer is not None]
    files = rewritten(aligned.tokenizer, donors, ids)
    assert aligned.folder is not None
    assert aligned.tokenizer is not None
    if any(ids.get(token) != number for token, number in base.ids.items()):
        old = {number: token for token, number in base.ids.items()}
        if aligned.changed:
            aligned.config = aligned.changed = renumbered(aligned.changed, old, ids)
        if (aligned.folder / GENERATION).is_file():
            files[GENERATION] = dump(renumbered(read_json(aligned.folder / GENERATION), old, ids))
    said = check_loaded(aligned.tokenizer, files, aligned.changed or {}, ids)
    return files, [*notes, said] if said else notes


def _other_file(base: Checkpoint, model: Checkpoint, file: str) -> str:
    """What to say where a vocabulary that cannot be read is another file than the base's, byte by byte."""
    ours, theirs = ((one.tokenizer or Path()) / file for one in (base, model))
    return OTHER if ours.is_file() and ours.read_bytes() != theirs.read_bytes() else ""


def _owner(tokenizer: str, names: Sequence[str]) -> int | None:
    """The position of the model whose tokenizer was asked for; None where none was."""
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


def _numbered(held: Sequence[Vocabulary], policy: str, owner: int | None) -> tuple[dict[str, int], int, int]:
    """Token -> id of the output, its number of rows, and the model whose rows of no token stay (padding).

    A union's new tokens take the ids after the base's last one, whose rows may be padding there; so does `add_tokens`.
    """
    if owner is not None:
        return dict(held[owner].ids), held[owner].rows, owner
    ids, rows = dict(held[0].ids), held[0].rows
    if policy == "union":
        following = max(ids.values()) + 1
        for other in held[1:]:
            for token in sorted(other.ids.keys() - ids.keys(), key=other.ids.__getitem__):
                ids[token] = following
                following += 1
        return ids, max(rows, following), 0
    kept = [token for token in sorted(ids, key=ids.__getitem__) if all(token in one.ids for one in held)]
    if not kept:
        raise GradmatchError("the vocabularies have no token in common", "vocabulary")
    if len(kept) == len(ids):
        return ids, rows, 0
    return {token: number for number, token in enumerate(kept)}, len(kept), 0


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


def _vocabulary_tensors(held: Sequence[Vocabulary]) -> list[str]:
    """Tensors with one row a token in every model: input and output embeddings and output biases."""
    base, rows = held[0].model, held[0].rows
    found = [
        name
        for name in base.store
        if layer_of(name) is None
        and not POSITIONS.search(name)
        and all(one.model.spec(name).shape[:1] == (one.rows,) for one in held if name in one.model.store)
    ]
    if not found:
        raise GradmatchError(
            f"no tensor has a row for each token of every model ({', '.join(str(one.rows) for one in held)} rows by their configs and tokenizers); "
            "give all models the base's vocabulary first",
            "vocabulary",
        )
    if all(base.spec(name).shape[1:] != (rows,) for name in found):
        return found
    named = [name for name in found if EMBEDDINGS.search(name)]
    if not named:
        raise GradmatchError(
            f"the models are {rows} wide and have {rows} tokens, and none of the names {', '.join(found)} is one of "
            "embeddings that are known; give all models the base's vocabulary first",
            "vocabulary",
        )
    return named


def _replaced(checkpoint: Checkpoint, store: AlignedStore, rows: int) -> Checkpoint:
    """The checkpoint with aligned tensors and a config of the new size."""
    config = None if checkpoint.config is None else with_rows(checkpoint.config, rows)
    return checkpoint.seen(store, config=config, changed=copy.deepcopy(config), original=checkpoint)
