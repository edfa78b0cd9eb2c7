"""A module with a checkpoint's weights: every parameter comes from its files, and none stays as it was drawn at random."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.structure import Structure, architecture, build
from gradmatch.models.views import by_module

if TYPE_CHECKING:
    from torch import nn


def load(checkpoint: Checkpoint, kind: Any = None) -> nn.Module:
    """The module that a checkpoint's config describes, in float32, with the checkpoint's weights.

    Args:
        checkpoint: opened; a folder, an adapter on its base, a view of one.
        kind: the class of transformers to build; None: the one that the config names.

    Raises:
        ValueError: no config that names an architecture of transformers, a parameter that the files do not give, or one of
            another shape.
    """
    kind = kind or architecture(checkpoint.config)
    if kind is None or checkpoint.config is None:
        named = (checkpoint.config or {}).get("architectures") or []
        raise GradmatchError(
            f"{checkpoint.where} wants the architecture {named[0]!r}, which transformers lacks; pass module="
            if named
            else f"data needs a module to run through, and {checkpoint.where} has no config.json that names one; pass module=, or a base that "
            "is a module or a folder with a config.json",
            "bad_model",
            checkpoint.where,
        )
    module = build(kind, checkpoint.config).float()
    fill(module, checkpoint, _drawn(module, kind, checkpoint.config))
    return module


def _drawn(module: nn.Module, kind: Any, config: Mapping[str, Any]) -> Any:
    """Which of some parameters that a class does without in files (sinusoids and the like) differ from draw to draw."""

    def drawn(names: Iterable[str]) -> list[str]:
        import torch

        patterns = [str(p) for p in getattr(module, "_keys_to_ignore_on_load_missing", None) or ()]
        computed = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
        again = build(kind, config, seed=1).state_dict() if computed else {}
        first = module.state_dict()
        same = {name for name in computed if torch.equal(first[name], again[name])}
        return [name for name in names if name not in same]

    return drawn


def fill(module: nn.Module, checkpoint: Checkpoint, drawn: Any = list) -> None:
    """Put a checkpoint's weights into a module, by the names under which transformers would load them.

    Two names that the module ties and the checkpoint does not are untied.

    Args:
        module: of the architecture that the weights belong to.
        checkpoint: opened.
        drawn: of the names that the checkpoint lacks, those that it must not lack.

    Raises:
        ValueError: a parameter or persistent buffer that the checkpoint does not give, or of another shape.
    """
    import torch

    known = Structure(module)
    view = by_module(checkpoint, known)
    check_complete(known, view, drawn)
    with torch.no_grad():
        for name, tensor in known.tensors.items():
            if name not in view:
                continue
            value = view[name]
            if (
                name in known.ties
                and name != known.ties[name][0]
                and not torch.equal(value.to(tensor), tensor)
            ):
                parent, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(value.to(tensor)))
            else:
                tensor.copy_(value)


def check_complete(known: Structure, view: Checkpoint, drawn: Any = list) -> None:
    """Refuse weights that lack a parameter or a persistent buffer of a module, or have it in another shape.

    Raises:
        ValueError: such a tensor, named.
    """
    kind = type(known.module).__name__
    lacking = drawn([name for name in known.tensors if name not in view])
    if lacking:
        held = next(iter(view), "nothing")
        more = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise GradmatchError(
            f"{view.where} does not give {lacking[0]!r}{more} of {kind} (it holds {held!r}, ...): data would pass through values that "
            "no file gave; load the model as the class that it was saved as, or give one that was trained with this head",
            "bad_model",
            view.where,
        )
    for name, tensor in known.tensors.items():
        if name in view and view.spec(name).shape != tuple(tensor.shape):
            raise GradmatchError(
                f"{view.where}: {name!r} has shape {list(view.spec(name).shape)}, in {kind} it is {list(tensor.shape)}; the weights "
                "are of another size than the config or the module",
                "shape_mismatch",
                view.where,
            )
