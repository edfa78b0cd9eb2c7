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


LAYER = "model.layers.0.self_attn.q_proj.weight"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
LORA |= {"base_model_name_or_path": "base", "task_type": "CAUSAL_LM", "fan_in_fan_out": False}
LORA |= {"rank_pattern": {}, "alpha_pattern": {"q_proj": 3}}
OURS = {"base": "base", "method": "ties", "options": {"density": 0.5}, "dtype": "float32", "seed": 1}
OURS |= {"transforms": [{"dare": {"density": 0.5}}]}
OURS |= {"tasks": [{"model": "one", "weight": 0.5, "name": "a", "curvature": "one.safetensors"}]}
WEIGHTS = [("base", 1), ("one", [0, 1])]
THEIRS = {"merge_method": "linear", "dtype": "float32"}
THEIRS |= {"models": [{"model": model, "parameters": {"weight": weight}} for model, weight in WEIGHTS]}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """base/ and one/ (two shards each), adapter/, curvature files, recipe.yaml and mergekit.yaml (JSON is YAML)."""
    folder = tmp_path_factory.mktemp("originals")
    for number, name in enumerate(("base", "one")):
        (folder / name).mkdir()
        tensors = {LAYER: torch.full((4, 4), float(number)), "model.norm.weight": torch.ones(4)}
        for shard, (key, value) in enumerate(tensors.items()):
            save_file({key: value}, folder / name / f"{shard}.safetensors", metadata={"format": "pt"})
        shards = {key: f"{n}.safetensors" for n, key in enumerate(tensors)}
        index = {"metadata": {"total_size": 80}, "weight_map": shards}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        mean = {key: torch.ones_like(value) for key, value in tensors.items()}
        Curvature.from_dict(mean, 7, {"estimator": "fisher"}).save(folder / f"{name}.safetensors")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(LORA))
    prefix = f"base_model.model.{LAYER.removesuffix('.weight')}"
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, 4), f"{prefix}.lora_B.weight": torch.ones(4, 2)}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "recipe.yaml").write_text(json.dumps(OURS))
    (folder / "mergekit.yaml").write_text(json.dumps(THEIRS))
    return folder


def paths(content, at=()):
    """Places of all values in a JSON table."""
    yield at
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from paths(value, (*at, key))


def changed(content, generator):
    """A copy with one place set to something odd, or taken out."""
    copy = json.loads(json.dumps(content, sort_keys=True))  # a header's order is not always the same
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
        cut, deep = text[: len(text) // 2], b"[" * 5000
        text = generator.choice([cut, text + b"}", deep, b"9" * 5000, b"\xff" + text, b"{}"])
    path.write_bytes((struct.pack("<Q", len(text)) + text + rest) if packed else text)


def plan_of(folder, file):
    if file.endswith(".yaml"):
        return prepare(**load_recipe(folder / file))
    if "adapter" in file:
        return prepare(folder / "base", [Task(folder / "adapter")], method="task_arithmetic")
    task = Task(folder / "one", folder / "one.safetensors")
    return prepare(folder / "base", [task], base_curvature=folder / "base.safetensors")


FILES = ["one/0.safetensors", "one.safetensors", "one/model.safetensors.index.json", "one/config.json", "adapter/adapter_config.json",
         "adapter/adapter_model.safetensors", "recipe.yaml", "mergekit.yaml"]  # fmt: skip

KEYS = ["the weight of", "transform", "dtype is", "option", "density", "method", "a model is"]
KEYS += ["no file or folder", "holds no model", "seed", "tasks"]


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_opens_or_is_refused_by_name(originals, tmp_path, file, recwarn):
    folder = tmp_path / "f"
    shutil.copytree(originals, folder)
    plan_of(folder, file)
    original, generator, wrong = (folder / file).read_bytes(), random.Random(0), []
    recipe = file.endswith(".yaml")
    of_a_kind = (ValueError, OSError, NotImplementedError, *((TypeError,) if recipe else ()))
    said = ["the curvature of one", file.rpartition("/")[2], str(folder / file.partition("/")[0])]
    said += KEYS if recipe else []
    for _ in range(100):
        (folder / file).write_bytes(original)
        mutate(folder / file, generator)
        try:
            plan_of(folder, file)
        except Exception as error:
            if not isinstance(error, of_a_kind) or not any(word in str(error) for word in said):
                changes = (folder / file).read_bytes()[:300]
                wrong.append(f"{type(error).__name__}: {error!s:.200} of {changes!r}")
    assert not wrong, f"{len(wrong)}: " + "\n".join(sorted(set(wrong))[:12])
