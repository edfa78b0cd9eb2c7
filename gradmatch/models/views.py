"""One model in the names and the layout of another: a task as the base has it, a checkpoint as its module has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.gathered import Gathered, Part
from gradmatch.models.stores import Renamed, Spec, Store, renamed
from gradmatch.models.structure import Names, Structure, structure


@dataclass(frozen=True)
class Arrangement:
    """How the tensors of one store are had under the names, and in the layout, of another.

    Attributes:
        plain: new name -> name in the store, of tensors that are as they are.
        names: of the store in the module.
        viewed: new name -> name in the module, of tensors that the module has converted.
        back: new name -> pieces of the module's tensors.
    """

    plain: Mapping[str, str]
    names: Names
    viewed: Mapping[str, str]
    back: Mapping[str, Part]

    def of(self, store: Store, converted: bool = True) -> Store:
        """The tensors of a store that has (some of) these names; without those that are converted where that makes no sense."""
        plain = {new: old for new, old in self.plain.items() if old in store}
        if not converted or not (self.viewed or self.back):
            return renamed(store, plain)
        view = self.names.view(store)
        where = {new: (store, old) for new, old in plain.items()}
        where |= {new: (view, name) for new, name in self.viewed.items()}
        gathered = Gathered(view, self.back)
        return Renamed(where | {new: (gathered, new) for new in self.back})


def arrange(model: Checkpoint, base: Checkpoint, beside: Sequence[Checkpoint] = ()) -> Arrangement | None:
    """How a model's tensors are had under the base's names, in the base's layout; None where they are so already.

    A tensor that the model ties to another is that other. Tensors that the base does not have (heads) keep their names.

    Args:
        model: the tensors to be arranged.
        base: whose names and layout they are to have.
        beside: others whose config may tell the architecture where neither of the two has one.

    Raises:
        ValueError: see `Structure.names`.
    """
    known = [found for one in (base, model, *beside) if (found := structure(one)) is not None]
    frame = known[0] if known else Structure(None)
    ours, theirs = frame.names(base), frame.names(model)
    ties: dict[str, list[str]] = {}
    for found in known:
        for name, names in found.ties.items():
            ties.setdefault(name, []).extend(names)
    plain: dict[str, str] = {}
    viewed: dict[str, str] = {}
    back: dict[str, Part] = {}
    stacked = {name: group for group in theirs.groups for name in group.targets}
    for name, new in ours.plain.items():
        found_as = next((theirs.plain[n] for n in (name, *ties.get(name, ())) if n in theirs.plain), None)
        if found_as is not None:
            plain[new] = found_as
        elif name in stacked:
            viewed[new] = name
    for group in ours.groups:
        twin = next((one for one in theirs.groups if set(one.targets) == set(group.targets)), None)
        if twin and [s.shape for s in twin.sources.values()] == [s.shape for s in group.sources.values()]:
            plain |= dict(zip(group.sources, twin.sources, strict=True))
        elif twin or all(name in theirs.plain for name in group.targets):
            given = twin.targets if twin else {n: model.spec(theirs.plain[n]) for n in group.targets}
            if {n: s.shape for n, s in given.items()} == {n: s.shape for n, s in group.targets.items()}:
                dtype = next(iter(given.values())).dtype
                back |= {
                    new: Part(part.names, Spec(dtype, part.spec.shape), part.pieces)
                    for new, part in group.parts(back=True).items()
                }
    kept = {*ours.plain, *(name for group in ours.groups for name in group.targets)}
    own = [(name, old) for name, old in theirs.plain.items() if name not in kept]
    for group in theirs.groups:
        if not kept & set(group.targets):
            own += [(old, old) for old in group.sources]
    plain |= {name if old in base else old: old for name, old in own}
    same = all(new == old and old in model.store for new, old in plain.items())
    if same and not viewed and not back and len(plain) == len(model):
        return None
    return Arrangement({new: model.aliases.get(old, old) for new, old in plain.items()}, theirs, viewed, back)


def like(model: Checkpoint, base: Checkpoint) -> Checkpoint:
    """A model under the base's names and in its layout, read lazily; itself where it is so already.

    >>> import torch
    >>> base, task = ({name: torch.ones(2)} for name in ("up.weight", "_orig_mod.up.weight"))
    >>> from gradmatch import open_checkpoint
    >>> list(like(open_checkpoint(task), open_checkpoint(base)))
    ['up.weight']

    Raises:
        ValueError: see `Structure.names`.
    """
    if set(model) == set(base) and all(name in model.store for name in base.store):
        return model
    arranged = arrange(model, base)
    if arranged is None:
        return model
    plain: dict[str, str] = {}
    aliases: dict[str, str] = {}
    held: dict[str, str] = {}
    for new, old in arranged.plain.items():
        if new not in base.store and old in held:
            aliases[new] = held[old]  # a second name of one tensor
        else:
            plain[new] = old
            held.setdefault(old, new)
    store = Arrangement(plain, arranged.names, arranged.viewed, arranged.back).of(model.store)
    return model.seen(store, aliases=aliases)


def by_module(checkpoint: Checkpoint, known: Structure | None = None) -> Checkpoint:
    """A checkpoint under the names of its module, every name of a tied parameter included.

    Args:
        checkpoint: opened.
        known: of a module that is there already; None: of the one that the config names. Without any, names stay as they are.

    Raises:
        ValueError: see `Structure.names`.
    """
    frame = known or structure(checkpoint)
    if frame is None:
        return checkpoint
    names = frame.names(checkpoint)
    held = {new: checkpoint.aliases.get(old, old) for new, old in names.plain.items()}
    store = Names(held, names.groups).view(checkpoint.store)
    own = structure(checkpoint) if known else None
    ties = {**(own.ties if own else {}), **frame.ties}
    tied = {name: next((other for other in ties[name] if other in store), "") for name in ties}
    aliases = {name: other for name, other in tied.items() if other and name not in store}
    return checkpoint.seen(store, aliases=aliases)


def as_module(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint under the names of its module where these are others than it has; with one name for tied tensors.

    Raises:
        ValueError: see `Structure.names`.
    """
    view = by_module(checkpoint)
    if set(view.store) == set(checkpoint.store):
        return checkpoint
    view.aliases = {}
    return view


def buffers_of(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the tensors that the module keeps as buffers; none where no module is known."""
    known = structure(checkpoint)
    if known is None:
        return frozenset()
    names = known.names(checkpoint).plain
    return frozenset(names[name] for name in known.buffers if name in names)


def unsaved_of(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the tensors of a module that its class leaves out of files, as it computes them; none where no module is known."""
    known = structure(checkpoint)
    patterns = getattr(known.module, "_keys_to_ignore_on_save", None) or () if known else ()
    return frozenset(name for name in checkpoint if any(re.search(pattern, name) for pattern in patterns))
