"""The vocabularies of several models, side by side: which tokens have a row, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.tokenizers import rows_of, unread, vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of one model.

    Attributes:
        name: how the model is called.
        model: whose it is.
        table: token -> id, as its tokenizer has them.
        known: whether it has a tokenizer that can be read; else the table is another model's.
    """

    name: str
    model: Checkpoint
    table: Mapping[str, int]
    known: bool

    @cached_property
    def rows(self) -> int:
        """The number of its embeddings, by its config (also of a tower's), else as many as it has tokens."""
        return rows_of(self.model.config) or max(self.table.values()) + 1

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id, of those that have a row."""
        return {token: number for token, number in self.table.items() if number < self.rows}

    @property
    def beyond(self) -> Iterator[str]:
        """What to say of tokens that can be written but not read by the model."""
        beyond = sorted((number, token) for token, number in self.table.items() if number >= self.rows)
        if beyond:
            number, token = beyond[0]
            yield (
                f"the tokenizer of {self.name} has {len(beyond)} tokens beyond the {self.rows} rows of its embeddings, first {token!r} "
                f"({number}): they have no weights and take no part"
            )


def vocabularies(names: Sequence[str], models: Sequence[Checkpoint]) -> list[Vocabulary]:
    """That of every model, equal files parsed once; of one that is not known, the base's or the first other; none if none is."""
    parsed: dict[bytes, dict[str, int] | None] = {}
    tables = []
    for model in models:
        key, parse = vocabulary(model.tokenizer)
        if key not in parsed:
            parsed[key] = parse()
        tables.append(parsed[key])
    reference = next((table for table in tables if table is not None), None)
    return [
        Vocabulary(name, model, reference if table is None else table, table is not None)
        for name, model, table in zip(names, models, tables, strict=True)
        if reference is not None
    ]


def difference(ours: Vocabulary, other: Vocabulary) -> str:
    """What to say of two vocabularies that differ."""
    base, table = ours.ids, other.ids
    rows = f"the embeddings of {other.name} have {other.rows} rows and the base's {ours.rows}"
    if not (ours.known and other.known):
        whose, file = ("the base", "") if other.known else (other.name, unread(other.model.tokenizer))
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
        f"the vocabulary of {other.name} ({len(table)} tokens) differs from the base's ({len(base)}): {'; '.join(parts)}; "
        "choose embeddings='union' or 'intersect' to align the rows by token"
    )
