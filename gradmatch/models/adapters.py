"""LoRA adapters as models: what their files hold, checked against the base that they are expanded on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradmatch.common.settings import layer_of
from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError, within
from gradmatch.estimators.files import read_json
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.models.adapter_config import CONFIG, check_config, scale_of
from gradmatch.models.adapter_saved import PREFIX, of, other_base, plain, resized, saved_whole
from gradmatch.models.added import Added, LowRank
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.orientation import CONV1D, conv1d_weights
from gradmatch.models.reference import published
from gradmatch.models.stores import FileStore, Store, unpickled
from gradmatch.models.tokenizers import vocabulary_files, with_rows
from gradmatch.models.views import by_module

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
FACTOR = re.compile(r"\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?$")
OUTPUT = re.compile(r"(lm_head|embed_out|decoder)\.weight$")  # output embeddings
UNTIE = (
    "untie the base: load it, give its head a tensor of its own (model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())), "
    "set model.config.tie_word_embeddings = False, and save it"
)


def open_adapter(path: Path, base: Checkpoint, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a PEFT adapter folder on its base.

    Modules that were saved whole break ties: a trained head of a tied base is a tensor of its own, and the config says so.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors.
        base: the model it was trained on; of another adapter on its base, the base, unless this one names that adapter.
        allow_pickle: read adapter_model.bin too, with weights_only.

    Raises:
        ValueError: a config with a key that is not understood (peft's merge_and_unload may know it), tensors that are no
            LoRA's, or an adapter whose weights the base does not have in these shapes.
        FileNotFoundError: no adapter_model.safetensors.
    """
    with within(path, "bad_adapter"):
        return _opened(path, base, allow_pickle)


def _opened(path: Path, base: Checkpoint, allow_pickle: bool) -> Checkpoint:
    config = read_json(path / CONFIG)
    check_config(config)
    if base.under is not None and not _names(config, base.path):
        base = base.under  # two adapters of one base: this one was not trained on the other
    given, factors = base, _factors(path, allow_pickle)
    saved = config.get("modules_to_save") or ()
    # what lies outside the layers may be tied
    outside = any(FACTOR.search(key) and layer_of(key) is None for key in factors)
    if saved or outside or not _has_all(base, factors):
        base = by_module(given)  # every name of tied tensors too
        base.aliases |= {name: other for name, other in given.aliases.items() if {name, other} <= set(base)}
    keys = [key for key in factors if not FACTOR.search(key) and not _is_bias(key, config)]
    replaced = saved_whole(keys, base, factors, saved)
    rows = resized(replaced, base, factors, saved)
    held = Added(base.store, factors, {}, replaced, {}, {})
    low_rank: dict[str, LowRank] = {}
    added: dict[str, tuple[str, float]] = {}
    for key in factors:
        name = key.removeprefix(PREFIX)
        found = FACTOR.search(key)
        if found and found.group(2) == "A":
            target = _target(FACTOR.sub("", name), ".weight", base)
            if target in low_rank:
                raise GradmatchError(
                    f"both {low_rank[target].a!r} and {key!r} adapt {target!r}; save the adapter again, with one of them"
                )
            low_rank[target] = _low_rank(key, target, factors, config, held, base)
        elif not found and _is_bias(key, config):
            module = name.removesuffix(".lora_B.bias")
            first = key.replace(".lora_B.bias", ".lora_A.weight")
            scale = scale_of(config, module, first, factors.spec(first).shape[0])
            added[_target(module, ".bias", base)] = (key, scale)
    if not low_rank:
        raise GradmatchError(f"{WEIGHTS} holds no LoRA factors")
    trained = {name for name in replaced if of(name, saved)}
    trained |= {alias for alias, other in base.aliases.items() if alias in replaced and other in replaced}
    freed = {alias: other for alias, other in base.aliases.items() if trained & {alias, other}}
    store = Added(base.store, factors, low_rank, replaced, added, freed)
    changed = base.changed
    if base.config and freed:
        changed = {**base.config, "tie_word_embeddings": False}
    if base.config and rows:
        changed = with_rows(changed or base.config, rows)
    opened = Checkpoint(
        store,
        path=path,
        config=changed or base.config,
        aliases={alias: other for alias, other in base.aliases.items() if alias not in freed},
        changed=changed,
        folder=base.folder,
        names=(*base.names, published(path)),
    )
    opened.untied, opened.under, opened.tokenizer = frozenset(freed), given, base.tokenizer
    if rows:
        opened.tokenizer = path if vocabulary_files(path) else None
    tied = sorted(name for name in low_rank if name in opened.aliases.values())
    if tied:
        others = ", ".join(sorted(alias for alias, other in opened.aliases.items() if other == tied[0]))
        said = (
            f"adapts {tied[0]!r}, which the base ties to {others}: both change, as with peft's merge_and_unload, while in training "
            "that one alone did"
        )
        opened.notes = (f"{published(path)} {said}",)
        warn(f"{path} {said}; for the model that was trained, {UNTIE}")
    return opened


def _is_bias(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key is the bias on a factor (lora_bias)."""
    return key.endswith(".lora_B.bias") and bool(config.get("lora_bias"))


def _names(config: Mapping[str, Any], path: Path | None) -> bool:
    """Whether an adapter's config names this folder as its base."""
    named = config.get("base_model_name_or_path")
    return (
        path is not None and isinstance(named, str) and Path(named).expanduser().resolve() == path.resolve()
    )


def _has_all(base: Checkpoint, factors: Store) -> bool:
    """Whether the base has every adapted tensor under the adapter's own names, which are the module's."""
    return all(plain(FACTOR.sub(".weight", key)) in base.store for key in factors)


def _factors(path: Path, allow_pickle: bool) -> Store:
    """The adapter's tensors, as safetensors where it has them so."""
    if (path / WEIGHTS).is_file() or not (path / PICKLE).is_file():
        return FileStore([TensorFile(path / WEIGHTS)])
    return unpickled(path / PICKLE, allow_pickle)


def _low_rank(
    key: str, target: str, factors: Store, config: Mapping[str, Any], held: Store, base: Checkpoint
) -> LowRank:
    """The pair of factors of one weight, checked against its shape in `held`, the base with what is saved whole."""
    other = re.sub(r"lora_(embedding_)?A", lambda found: f"lora_{found.group(1) or ''}B", key)
    if other not in factors:
        raise GradmatchError(f"{key!r} has no counterpart {other!r}; the adapter is incomplete")
    a, b, whole = factors.spec(key).shape, factors.spec(other).shape, held.spec(target)
    if len(a) > 2 and len(b) == len(a) and b[1] and b[1] < a[0] and a[0] % b[1] == 0:
        raise GradmatchError(
            f"adapts {target!r}, a convolution of {a[0] // b[1]} groups, whose update is no product of its factors; merge the adapter with "
            "peft's merge_and_unload first"
        )
    if len(a) < 2 or len(b) != len(a) or b[1] != a[0]:
        raise GradmatchError(
            f"{key!r} {list(a)} and {other!r} {list(b)} are no pair of factors; save the adapter again",
            "shape_mismatch",
        )
    straight, turned = (b[0], *a[1:]) == whole.shape, len(a) == 2 and (a[1], b[0]) == whole.shape
    if "lora_embedding_A" in key:
        straight = False
    if not straight and not turned:
        raise GradmatchError(other_base(target, f"update {[b[0], *a[1:]]}", whole), "shape_mismatch")
    scale = scale_of(config, target.removesuffix(".weight"), key, a[0])
    if straight and turned:
        turned = _stored_in_out(target, config, base)
    return LowRank(key, other, scale, turned)


def _stored_in_out(target: str, config: Mapping[str, Any], base: Checkpoint) -> bool:
    """Whether a square weight is stored [in, out], as its own module tells; peft's flag is that of the last layer it made."""
    known = conv1d_weights(base)
    if target in known:
        return known[target]
    if config.get("fan_in_fan_out") or CONV1D.search(target):
        raise GradmatchError(
            f"adapts {target!r}, which is square: GPT-2's Conv1D stores it [in, out], nn.Linear [out, in], and {base.where} "
            "has no config that tells which; give the base as a folder with its config.json, or as a module"
        )
    return False


def _target(module: str, suffix: str, base: Checkpoint) -> str:
    """The base's tensor that an adapted module holds.

    An update of output embeddings that are tied would change the input embeddings, and is refused; one of the input embeddings
    changes both, as merging with peft does.
    """
    name = module + suffix
    if name in base.aliases and OUTPUT.search(name):
        raise GradmatchError(
            f"adapts {name!r}, which is tied to another tensor in {base.where}, so that its update would change both; {UNTIE}"
        )
    if f"{module}.in_proj_weight" in base:
        raise GradmatchError(
            f"adapts {module!r}, an nn.MultiheadAttention that keeps its projections in one tensor; merge the adapter with "
            "peft's merge_and_unload first"
        )
    if suffix == ".bias" and name not in base and f"{module}.weight" in base:
        raise GradmatchError(
            f"has lora_bias=True and adapts {module!r}, a layer without a bias in {base.where}: merged, the model would need "
            f"{name!r}, which its architecture lacks (peft cannot merge it either); train with lora_bias=False, or use the adapter unmerged"
        )
    if name not in base:
        raise GradmatchError(
            f"adapts {name!r}, which {base.where} does not have; it is an adapter for another base"
        )
    return name
