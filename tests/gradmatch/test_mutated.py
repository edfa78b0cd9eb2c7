"""Files whose JSON or YAML was changed at random: each opens, or is refused by an error that names the file, never by a TypeError."""

import json
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from gradmatch import Task
from gradmatch.estimators import Curvature
from gradmatch.merging import prepare
from gradmatch.recipes.recipe import load_recipe

ODD = [None, True, -1, 1.5, 10**30, "", "x", "..", [], [1], ["x"], {}, {"a": 1}, [[]], [{}], {"x": {"y": []}}]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """base/ (two shards), one/, adapter/, curvature files, recipe.yaml (JSON is YAML)."""
    folder = tmp_path_factory.mktemp("originals")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    layer = "model.layers.0.self_attn.q_proj.weight"
    for number, name in enumerate(("base", "one")):
        (folder / name).mkdir()
        tensors = {layer: torch.full((4, 4), float(number)), "model.norm.weight": torch.ones(4)}
        for shard, key in enumerate(tensors):
            save_file({key: tensors[key]}, folder / name / f"{shard}.safetensors", metadata={"format": "pt"})
        index = {
            "metadata": {"total_size": 80},
            "weight_map": {key: f"{n}.safetensors" for n, key in enumerate(tensors)},
        }
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / name / "config.json").write_text(json.dumps(config))
        known = Curvature.from_dict(
            {key: torch.ones_like(value) for key, value in tensors.items()}, 7, {"estimator": "fisher"}
        )
        known.save(folder / f"{name}.safetensors")
    (folder / "adapter").mkdir()
    lora = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
    }
    lora |= {
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": False,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {"q_proj": 3},
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
    prefix = f"base_model.model.{layer.removesuffix('.weight')}"
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(2, 4), f"{prefix}.lora_B.weight": torch.ones(4, 2)},
        folder / "adapter" / "adapter_model.safetensors",
    )
    recipe = {
        "base": "base",
        "method": "ties",
        "options": {"density": 0.5},
        "transforms": [{"dare": {"density": 0.5}}],
        "dtype": "float32",
    }
    recipe |= {
        "seed": 1,
        "tasks": [{"model": "one", "weight": 0.5, "name": "a", "curvature": "one.safetensors"}],
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    theirs = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [
            {"model": "base", "parameters": {"weight": 1}},
            {"model": "one", "parameters": {"weight": [0, 1]}},
        ],
    }
    (folder / "mergekit.yaml").write_text(json.dumps(theirs))
    return folder  # fmt: skip


def paths(content, at=()):
    """Places of all values in a JSON table."""
    yield at
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in inner:
        yield from paths(value, (*at, key))


def changed(content, generator):
    """A copy with one place set to something odd, or taken out."""
    copy = json.loads(
        json.dumps(content, sort_keys=True)
    )  # a header's order is not the same in every process
    *way, last = generator.choice([path for path in paths(copy) if path])
    here = copy
    for key in way:
        here = here[key]
    if generator.random() < 0.15:
        del here[last]
    else:
        here[last] = generator.choice(ODD)
    return copy


def header_of(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def mutate(path, generator):
    raw = path.read_bytes()
    packed = path.suffix == ".safetensors"
    content, rest = header_of(raw) if packed else (json.loads(raw), b"")
    text = json.dumps(changed(content, generator)).encode()
    if generator.random() < 0.1:
        text = generator.choice(
            [text[: len(text) // 2], text + b"}", b"[" * 100_000, b"9" * 5000, b"\xff" + text, b"{}"]
        )
    path.write_bytes((struct.pack("<Q", len(text)) + text + rest) if packed else text)


def plan_of(folder, file):
    if file.endswith(".yaml"):
        return prepare(**load_recipe(folder / file))
    model = folder / ("adapter" if "adapter" in file else "one")
    task = Task(model, None if "adapter" in file else folder / "one.safetensors")
    method = "task_arithmetic" if "adapter" in file else "gradient_matching"
    return prepare(
        folder / "base",
        [task],
        method=method,
        base_curvature=folder / "base.safetensors" if method != "task_arithmetic" else None,
    )


FILES = ["one/0.safetensors", "one.safetensors", "one/model.safetensors.index.json", "one/config.json", "adapter/adapter_config.json",
         "adapter/adapter_model.safetensors", "recipe.yaml", "mergekit.yaml"]  # fmt: skip

KEYS = (
    "the weight of",
    "transform",
    "dtype is",
    "option",
    "density",
    "method",
    "a model is",
    "no file or folder",
    "holds no model",
    "seed",
    "tasks",
)


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_opens_or_is_refused_by_name(originals, tmp_path, file, recwarn):
    folder = tmp_path / "f"
    shutil.copytree(originals, folder)
    plan_of(folder, file)
    original = (folder / file).read_bytes()
    generator = random.Random(0)
    wrong = []
    said = [
        "the curvature of one",
        file.rpartition("/")[2],
        str(folder / file.partition("/")[0]),
        *(KEYS if file.endswith(".yaml") else ()),
    ]
    for _ in range(100):
        (folder / file).write_bytes(original)
        mutate(folder / file, generator)
        try:
            plan_of(folder, file)
        except Exception as error:
            of_a_kind = (
                ValueError,
                OSError,
                NotImplementedError,
                *((TypeError,) if file.endswith(".yaml") else ()),
            )
            if not isinstance(error, of_a_kind) or not any(word in str(error) for word in said):
                changes = (folder / file).read_bytes()[:300]
                wrong.append(f"{type(error).__name__}: {error!s:.200} of {changes!r}")
    assert not wrong, f"{len(wrong)}: " + "\n".join(sorted(set(wrong))[:12])
