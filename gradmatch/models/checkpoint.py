"""Checkpoint: one lazy mapping over every form in which a model's weights come; `gradmatch.models.opening` opens them."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import Sample, sample_blocks, sample_file
from gradmatch.models.reference import published
from gradmatch.models.stores import FileStore, Spec, Store, read, take

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.moved import Movement


@dataclass(eq=False, repr=False)
class Checkpoint(Mapping[str, "Tensor"]):
    """Weights by name, read when asked for.

    Attributes:
        store: where the values are.
        path: folder or file, or None for one in memory.
        folder: where its config and tokenizer lie: its own folder, or an adapter's base's; None where it has none.
        tokenizer: where its tokenizer lies: `folder`, but of an adapter with tokens of its own, the adapter's; None where it has none.
        config: the model's config.json, or None.
        aliases: tied names -> the name that holds the values.
        module: the module it was opened from, or None.
        names: what to call it where others read it (see `published`): its own, an adapter's base first, those of all models that
            were stacked.
        untied: names that its base ties to other tensors and it does not, since an adapter trained one of them by itself.
        under: of an adapter: its base before the update; None otherwise.
        changed: a config that replaces the one in `path` (other layers, another vocabulary), or None.
        original: the checkpoint before its vocabulary was aligned; itself otherwise.
        movement: how its units were moved (`gradmatch.rebasin.align`), or None; its curvature moves along.
        notes: what was remarked when it was opened.
        report: what the merge that made it has to say, or None.
        plan: what that merge planned for every tensor, or None.
        posterior: the sum of the precisions of that merge, where it was asked for, or None.
    """

    store: Store
    _: KW_ONLY
    path: Path | None = None
    config: Mapping[str, Any] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    module: Any = None
    changed: Mapping[str, Any] | None = None
    folder: Path | None = None
    tokenizer: Path | None = None
    names: Sequence[str] = ()
    under: Checkpoint | None = None
    untied: frozenset[str] = frozenset()
    movement: Movement | None = None
    notes: tuple[str, ...] = ()
    report: Any = None
    plan: Any = None
    posterior: Any = None
    original: Checkpoint = field(init=False)

    def __post_init__(self) -> None:
        """What follows from the path, where nothing else is said."""
        self.folder = self.folder or (self.path if self.path is not None and self.path.is_dir() else None)
        self.tokenizer = self.tokenizer or self.folder
        self.names = tuple(self.names) or (published(self.path) if self.path else self.where,)
        self.original = self

    def seen(self, store: Store, **changed: Any) -> Checkpoint:
        """The same checkpoint through another store, with some attributes changed."""
        result = copy.copy(self)
        vars(result).update(changed, store=store)
        return result

    def __getitem__(self, name: str) -> Tensor:
        return read(self.store, self.aliases.get(name, name))

    def __iter__(self) -> Iterator[str]:
        yield from self.store
        yield from (name for name in self.aliases if name not in self.store)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.store or name in self.aliases

    def __repr__(self) -> str:
        return f"Checkpoint({self.where}, {len(self)} tensors)"

    def save(self, out: str | os.PathLike[str]) -> None:
        """Write a copy of its folder, whole or not at all.

        Raises:
            ValueError: it is no folder: nothing on disk to copy.
            FileExistsError: `out` exists.

        Example:
            >>> merge("base", [Task("a"), Task("b")], out="merged").save("copy")        # doctest: +SKIP
        """
        if self.path is None or not self.path.is_dir():
            raise GradmatchError(
                f"{self.where} is no folder, so there is nothing to copy; merge(..., out=folder) writes one",
                "bad_arguments",
            )
        target = Path(out).expanduser().resolve()
        if target.exists():
            raise FileExistsError(f"{out} exists; choose another folder for the copy")
        aside = target.with_name(f".gradmatch-{uuid.uuid4().hex[:12]}")
        try:
            shutil.copytree(self.path, aside)
            os.replace(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    @property
    def where(self) -> str:
        """How to call it in messages."""
        return (
            str(self.path) if self.path else type(self.module).__name__ if self.module else "the state dict"
        )

    def spec(self, name: str) -> Spec:
        """Shape and dtype, without reading the values."""
        return self.store.spec(self.aliases.get(name, name))

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements first to last of a tensor, flat, in the stored dtype (see `take`)."""
        return take(self.store, self.aliases.get(name, name), first, last)

    def sample(self, name: str) -> Sample:
        """Shape and a few values of a tensor, as a fingerprint takes them (see `gradmatch.estimators.curvature`)."""
        name = self.aliases.get(name, name)
        if isinstance(self.store, FileStore):
            return sample_file(*self.store.source(name))
        return sample_blocks(self.spec(name).shape, functools.partial(self.store.block, name))
