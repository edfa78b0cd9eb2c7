"""A model under the names of the module that loads it: what transformers renames, stacks, splits and ties when it loads files.

Names in files, names of a module's parameters and names that a curvature carries are three things. Here they meet: any store
of tensors is placed under a module's names by transformers' own conversion (`gradmatch.models.conversions`). transformers is
imported only where names differ.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError, within
from gradmatch.estimators.wrapped import bare_names
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.conversions import Conversions, Group, conversions_of
from gradmatch.models.gathered import Gathered
from gradmatch.models.stores import SAFETENSORS_NAME, Renamed, Spec, Store, renamed, torch_dtype

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Names:
    """Where a module's tensors are found in a store: name in the module -> name in the store, and groups that are converted."""

    plain: Mapping[str, str]
    groups: Sequence[Group] = ()

    def view(self, store: Store) -> Store:
        """The store under the module's names."""
        plain = {new: old for new, old in self.plain.items() if old in store}
        where: dict[str, tuple[Store, str]] = {new: (store, old) for new, old in plain.items()}
        for group in self.groups:
            gathered = Gathered(store, group.parts())
            where |= {name: (gathered, name) for name in group.targets}
        return Renamed(where) if self.groups else renamed(store, plain)


class Structure:
    """The names, shapes and ties of a module, and how transformers puts tensors of files under these names.

    Args:
        module: real, on the meta device, or None where nothing is known but names.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        tensors = module.state_dict() if module else {}
        bare = bare_names(tensors)
        self.tensors = {bare[name]: tensor for name, tensor in tensors.items()}
        same: dict[int, list[str]] = {}
        named = dict(module.named_parameters(remove_duplicate=False)) if module else {}
        for name, parameter in named.items():
            same.setdefault(id(parameter), []).append(bare.get(name, name))
        self.buffers = {bare_names([name])[name] for name, _ in module.named_buffers()} if module else set()
        self.ties = {name: names for names in same.values() if len(names) > 1 for name in names}

    def names(self, tensors: Checkpoint) -> Names:
        """How transformers would load these tensors into the module; what it would not load keeps its name.

        Args:
            tensors: under the names of a file, of a module, or of another class with the same trunk.

        Raises:
            ValueError: two tensors for one parameter, or tensors that do not go together.
        """
        held = {short: name for name, short in bare_names(tensors).items()}
        conversions = conversions_of(self.module)
        if conversions is None:
            return Names(held)
        with within(tensors.where, "bad_model"):
            return self._names(conversions, tensors, held)

    def _names(self, conversions: Conversions, tensors: Checkpoint, held: Mapping[str, str]) -> Names:
        plain: dict[str, str] = {}
        collected: dict[str, list[tuple[str, str]]] = {}
        for short in conversions.ordered(held):
            name, pattern = conversions.renamed(short, self.tensors)
            if pattern is not None and name in self.tensors:
                collected.setdefault(name, []).append((pattern, held[short]))
                continue
            name = name if pattern is None else short
            if name in plain:
                raise GradmatchError(
                    f"{plain[name]!r} and {held[short]!r} are both {name!r} of {type(self.module).__name__}; remove one of the two"
                )
            plain[name] = held[short]
        groups = [self._group(conversions, name, found, tensors) for name, found in collected.items()]
        return Names(plain, groups)

    def _group(
        self, conversions: Conversions, name: str, found: list[tuple[str, str]], tensors: Checkpoint
    ) -> Group:
        """The stored tensors that make one parameter (and those beside it), checked to make it in its shape."""
        import torch

        convert = functools.partial(conversions.convert, name, [pattern for pattern, _ in found])
        sources = {key: tensors.spec(key) for _, key in found}
        empty = [
            torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta") for spec in sources.values()
        ]
        try:
            made = convert(empty)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise GradmatchError(
                f"transformers makes {name!r} of {', '.join(sources)}, and these do not go together ({error}); fetch the model again"
            ) from error
        targets = {
            key: Spec(SAFETENSORS_NAME[str(value.dtype).removeprefix("torch.")], tuple(value.shape))
            for key, value in made.items()
        }
        for key, spec in targets.items():
            if key in self.tensors and spec.shape != tuple(self.tensors[key].shape):
                raise GradmatchError(
                    f"{', '.join(sources)} make {key!r} of shape {list(spec.shape)}, in {type(self.module).__name__} it is "
                    f"{list(self.tensors[key].shape)}; tensors are missing, or the config is another model's"
                )
        return Group(sources, targets, convert, tensors.where)


def architecture(config: Mapping[str, Any] | None) -> Any:
    """The class of transformers that a config.json names, or None: it names none, one that is not there, or one that is no model."""
    names = (config or {}).get("architectures") or []
    if not names:
        return None
    import transformers

    kind = getattr(transformers, str(names[0]), None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def build(kind: Any, config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A new module of a class of transformers, with the values that it starts from.

    Raises:
        ValueError: a config that the class refuses.
    """
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module: nn.Module = kind(kind.config_class.from_dict(copy.deepcopy(dict(config))))
    except Exception as error:  # another's code may refuse a config in any way
        raise GradmatchError(
            f"config.json does not make a {kind.__name__} ({type(error).__name__}: {error}); fetch it again",
            "bad_model",
        ) from error
    return module


def structure(checkpoint: Checkpoint) -> Structure | None:
    """That of a checkpoint's module, or of the one that its config names; None where neither is known.

    Raises:
        ValueError: a config that its architecture refuses.
    """
    if checkpoint.module is not None:
        return Structure(checkpoint.module)
    kind = architecture(checkpoint.config)
    if kind is None and not _is_known(checkpoint.config):
        return None
    told = {
        key: value
        for key, value in (checkpoint.config or {}).items()
        if not key.startswith("_") and key != "transformers_version"
    }
    with within(checkpoint.where, "bad_model"):
        return _on_meta(kind, json.dumps(told, default=str, sort_keys=True))


def _is_known(config: Mapping[str, Any] | None) -> bool:
    """Whether a config that names no architecture is of a kind of model that transformers has."""
    if not config or config.get("architectures") or not config.get("model_type"):
        return False
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    kind = config["model_type"]
    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_MAPPING


@functools.lru_cache(maxsize=4)
def _on_meta(kind: Any, config: str) -> Structure:
    """A module of shapes alone; without a class, the bare model of the config's kind."""
    import torch

    content = json.loads(config)
    if kind is None:
        from transformers import CONFIG_MAPPING, MODEL_MAPPING

        found = MODEL_MAPPING[CONFIG_MAPPING[content["model_type"]]]
        kind = found[0] if isinstance(found, tuple) else found
    with torch.device("meta"):
        return Structure(build(kind, content))
