"""What goes along from the base's folder into an output: configs, tokenizers, templates and code that they name; the rest is told."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json

if TYPE_CHECKING:
    from gradmatch.plan.step import Plan

CARRIED = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken", ".codes", ".bpe", ".vocab", ".merges")
NOT_CARRIED = ("README.md", "gradmatch.json", "trainer_state.json", "adapter_config.json", "optimizer.pt")
TEMPLATES = "additional_chat_templates"
SILENT = re.compile(  # weights in any format and what a training leaves: nobody looks for these in a merge
    r"\.|README\.md$|LICENSE|(curvature|posterior)\.safetensors$|diagnosis\.html$|gradmatch\.json$|(model|pytorch_model|tf_model|flax_model|adapter_model|adapter_config|optimizer|scheduler|scaler"
    r"|rng_state|trainer_state|training_args|checkpoint-\d+|global_step|runs$|__pycache__$|events\.out)"
)
MADE_FROM = re.compile(r"(_|^)(name_or_path|file|dir)$")  # keys of a config that hold what it was loaded from
# paths of a machine, and no names of the hub or of a file beside it
LOCAL = re.compile(r"[/~.]|[A-Za-z]:|.*\\")
SHOWN = 12  # files left behind that are named one by one


def carried(base: Path) -> list[str]:
    """Files of a model's folder that go into the output as they are, relative to it: configs, tokenizers, and modules beside it.

    Text and vocabularies (CARRIED) from the folder itself and its chat templates; Python files where a config names code
    (`auto_map`). Where sentence-transformers' modules.json names subfolders (1_Pooling, 2_Dense), theirs too, and their weights as
    safetensors. No pickles, and nothing that a link brings in from elsewhere.

    Raises:
        ValueError: modules.json names a folder outside.
    """
    suffixes = (*CARRIED, ".py") if has_code(base) else CARRIED
    found = [
        source
        for source in (*sorted(base.iterdir()), *sorted((base / TEMPLATES).glob("*.jinja")))
        if source.suffix in suffixes
        and not source.name.endswith(".index.json")
        and source.name not in NOT_CARRIED
    ]
    for module in modules(base):
        found += [
            source
            for source in sorted((base / module).rglob("*"))
            if source.suffix in (*CARRIED, ".safetensors")
        ]
    return [
        source.relative_to(base).as_posix() for source in found if source.is_file() and inside(source, base)
    ]


def has_code(base: Path) -> bool:
    """Whether a config of the folder names Python files of its own."""
    return any("auto_map" in read_json(path) for path in sorted(base.glob("*config.json")))


def modules(base: Path) -> list[str]:
    """Subfolders that sentence-transformers' modules.json names; none where there is no such file.

    Raises:
        ValueError: one of them lies outside.
    """
    if not (base / "modules.json").is_file():
        return []
    try:
        listed = json.loads((base / "modules.json").read_text(encoding="utf-8"))
        found = [str(entry["path"]) for entry in listed if entry["path"] not in ("", ".")]
    except (ValueError, TypeError, KeyError) as error:
        raise GradmatchError(
            f"{base / 'modules.json'} is no list of modules with a path each ({error}); fetch it again, or remove it",
            "bad_output",
            base / "modules.json",
        ) from error
    for name in found:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not inside(base / name, base):
            raise GradmatchError(
                f"{base / 'modules.json'} points outside its folder: {name!r}; do not trust this checkpoint",
                "unsafe_path",
                base / "modules.json",
            )
    return found


def inside(path: Path, base: Path) -> bool:
    """Whether a path, links followed, stays in the model's folder (or in the blobs that a snapshot of the hub links to)."""
    roots = [
        base.resolve(),
        *([base.resolve().parents[1] / "blobs"] if base.resolve().parent.name == "snapshots" else []),
    ]
    return any(path.resolve().is_relative_to(root) for root in roots)


def carried_notes(base: Path) -> Iterator[str]:
    """What a plan says of the files beside the weights: which are the base's unmerged, which are code, and which stay behind."""
    known = set(carried(base))
    for name in sorted(known):
        if name.endswith(".safetensors"):
            yield f"{name}: the base's, not merged; modules beside the model are carried along"
        if name.endswith(".py"):
            yield f"{name}: code of the base, carried along; transformers runs it with trust_remote_code=True alone"
    listed = modules(base)
    left = [
        source
        for folder in (base, *(base / module for module in listed))
        for source in sorted(folder.iterdir() if folder == base else folder.rglob("*"))
        if source.relative_to(base).as_posix() not in {*known, *listed, TEMPLATES}
        and (folder != base or not SILENT.match(source.name))
        and not (folder != base and source.is_dir())
    ]
    for source in left[:SHOWN]:
        name = source.relative_to(base).as_posix() + ("/" if source.is_dir() else "")
        link = "a link out of the folder" if not inside(source, base) else "only what a model loads by is"
        yield f"{name}: not carried along ({link})"
    if len(left) > SHOWN:
        yield f"{len(left) - SHOWN} more files of the base's folder are not carried along"


def carry_along(plan: Plan, folder: Path) -> list[str]:
    """Copy config and tokenizer files of the base into the folder, and write those that changed; returns their names."""
    base = plan.inputs.base
    names = []
    if base.folder:
        for name in carried(base.folder):
            if name not in plan.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base.folder / name, folder / name)
                names.append(name)
    elif hasattr(getattr(base.module, "config", None), "save_pretrained"):
        before = set(os.listdir(folder))
        base.module.config.save_pretrained(folder)
        names += sorted(set(os.listdir(folder)) - before)
    for name, content in plan.files.items():
        if content is not None:
            (folder / name).write_bytes(content)
            names += [name] if name not in names else []
    for name in names:
        if name.endswith("config.json"):
            _write_config(plan, folder / name, whole=name == "config.json")
    return names


def _write_config(plan: Plan, file: Path, whole: bool) -> None:
    """A config as it is to be published: the model's (`whole`) with what the merge changed, all without paths of the maker's machine."""
    read = read_json(file)
    config = dict(plan.inputs.base.changed or read) if whole else read
    if whole and plan.request.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = plan.request.dtype
    config = without_paths(config)
    if config != read:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def without_paths(config: Any) -> Any:
    """A config without what it was loaded from, where that is a path of some machine; nested ones too.

    `_name_or_path` is left out whatever it says, as transformers does: the merge is another model than that.

    >>> without_paths({"_name_or_path": "/home/me/base", "tokenizer_file": "/home/me/t.json", "vocab_size": 7})
    {'vocab_size': 7}
    """
    if not isinstance(config, dict):
        return config
    return {
        key: without_paths(value)
        for key, value in config.items()
        if not (key == "_name_or_path" or (MADE_FROM.search(key) and LOCAL.match(str(value))))
    }
