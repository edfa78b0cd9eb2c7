"""Tensors that an adapter holds whole: saved modules, biases, and embeddings with rows for tokens that were added."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gradmatch.common.settings import layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.stores import Store, equal
from gradmatch.models.tokenizers import EMBEDDINGS, rows_of

PREFIX = "base_model.model."
ORIGINAL = ".original_module."  # the copy that peft keeps of what a saved module replaces
SAVED = re.compile(r"\.modules_to_save\.(default\.)?")


def plain(key: str) -> str:
    """A key of an adapter's file under the model's own name.

    Example:
        >>> plain("base_model.model.lm_head.modules_to_save.default.weight")
        'lm_head.weight'
    """
    return SAVED.sub(".", key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(ORIGINAL, "."))


def of(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of these modules, as peft finds them: by the end of the module's name."""
    return any(f".{module}." in f".{name}" for module in modules)


def saved_whole(
    keys: Iterable[str], base: Checkpoint, factors: Store, saved: Sequence[str]
) -> dict[str, str]:
    """Name in the model -> key in the file, of the keys that are no factors.

    peft writes a saved embedding up to three times: under its plain name, as modules_to_save, and as it was before. What was
    trained counts. A second name of a tied tensor with the same values is left out, so that the two stay tied.

    Args:
        keys: of the file.
        base: under the module's names.
        factors: the file.
        saved: modules_to_save of the config.

    Raises:
        ValueError: a tensor that neither the base nor modules_to_save has.
    """
    found: dict[str, str] = {}
    for key in keys:
        name = plain(key)
        if ORIGINAL in key or (name in found and found[name] == PREFIX + name):
            continue
        if name not in base and not of(name, saved):
            raise GradmatchError(
                f"{key!r} is no factor (lora_A, lora_B), no tensor of {base.where} and of none of modules_to_save "
                f"{list(saved)}; this is no plain LoRA, or an adapter for another base: merge it with peft's merge_and_unload first"
            )
        found[name] = key
    for alias, held in base.aliases.items():
        if alias in found and held in found and equal(factors, found[alias], factors, found[held]):
            del found[alias]
    return found


def resized(
    replaced: Mapping[str, str], base: Checkpoint, factors: Store, saved: Sequence[str]
) -> int | None:
    """The number of rows of embeddings that were resized for tokens of the adapter's own; None where none were.

    Raises:
        ValueError: a tensor of another shape that has no row for each token, or embeddings of which some were resized only.
    """
    rows = rows_of(base.config)
    sizes: dict[str, int] = {}
    for name, key in replaced.items():
        if name not in base or base.spec(name).shape == factors.spec(key).shape:
            continue
        old, new = base.spec(name).shape, factors.spec(key).shape
        if old[:1] == (rows,) and new[1:] == old[1:] and len(new) == len(old) and EMBEDDINGS.search(name):
            sizes[name] = new[0]
        elif not of(name, saved):
            raise GradmatchError(other_base(name, factors.spec(key), base.spec(name)), "shape_mismatch")
    if not sizes:
        return None
    by_token = [
        name for name in base.store if base.spec(name).shape[:1] == (rows,) and name not in base.aliases
    ]
    by_token = [name for name in by_token if layer_of(name) is None and EMBEDDINGS.search(name)]
    first, count = next(iter(sizes.items()))
    for name in dict.fromkeys((*by_token, *sizes)):
        if sizes.get(name) != count:
            raise GradmatchError(
                f"holds {first!r} with {count} rows and {name!r} with {sizes.get(name, rows)}; the model that was trained had "
                "one row a token in both: save the adapter with save_embedding_layers=True",
                "shape_mismatch",
            )
    return count


def other_base(name: str, found: object, expected: object) -> str:
    """What to say of a tensor that does not fit."""
    return f"{name!r} is {found}, the base's is {expected}; it is an adapter for another base"
