"""What is opened, and what is refused: which files, quantised weights, stored copies of tied tensors, stacks of layers."""

import copy
import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from gradmatch import Task, merge, open_checkpoint
from gradmatch.models.slices import Slice, stack
from gradmatch.models.views import by_module
from tests.gradmatch.test_views import MODELS, TEXT, state
from tests.gradmatch.tiny import tuned


def floats(rows=4, seed=0):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def packed(dtype, seed=0):
    return (100 * floats(seed=seed)).to(dtype)


FP8 = packed(torch.float8_e4m3fn)
SCALE = torch.tensor(0.1)
QUANTISED = {
    "fp8 *.scale_weight": {"l.weight": FP8, "l.scale_weight": SCALE},
    "fp8 *.weight_scale": {"l.weight": FP8, "l.weight_scale": SCALE},
    "fp8 *.weight_scale_inv": {"a.l.weight": FP8, "a.l.weight_scale_inv": SCALE, "a.m.weight": floats()},
    "fp8 at the root": {"weight": FP8, "weight_scale": SCALE},
    "int8 with SCB": {"l.weight": packed(torch.int8), "l.SCB": torch.ones(4)},
    "four bits, absmax": {"l.weight": torch.ones(8, 1).to(torch.uint8), "l.weight.absmax": torch.ones(2)},
    "GPTQ": {"l.qweight": packed(torch.int32), "l.qzeros": packed(torch.int32), "l.scales": torch.ones(4)},
    "mxfp4": {
        "experts.up_blocks": torch.ones(2, 4).to(torch.uint8),
        "experts.up_scales": torch.ones(2).to(torch.uint8),
    },
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("form", ["mapping", "file", "folder", "pickle"])
def test_quantised_weights_are_known_by_their_contents(kind, form, tmp_path):
    tensors = {**QUANTISED[kind], "norm.weight": torch.ones(4)}
    model = tensors
    if form == "file":
        save_file(tensors, model := tmp_path / "a.safetensors")
    elif form == "folder":
        save_file(tensors, tmp_path / "model.safetensors")
        (model := tmp_path).joinpath("config.json").write_text("{}")
    elif form == "pickle":
        torch.save(tensors, model := tmp_path / "a.bin")
    first = next(iter(QUANTISED[kind]))
    with pytest.raises(ValueError, match=rf"is quantised \('{first}' is .* beside it\)"):
        open_checkpoint(model, allow_pickle=True)


MERGED = {
    "plain fp8": {"l.weight": FP8, "m.weight": floats()},
    "a table of positions beside a scale": {
        "a.index": torch.arange(4).view(2, 2),
        "a.logit_scale": torch.ones(2),
    },
    "a mask of bytes": {"a.bias": torch.ones(1, 1, 2, 2).to(torch.uint8), "a.weight": floats()},
}


@pytest.mark.parametrize("kind", MERGED)
def test_what_is_not_quantised_is_merged(kind):
    merged = merge(MERGED[kind], [Task(MERGED[kind])], method="averaging")
    assert all(torch.equal(merged[name].float(), value.float()) for name, value in MERGED[kind].items())


def test_integer_matrices_that_differ():
    base = {"l.weight": packed(torch.int8), "norm": torch.ones(4)}
    task = {"l.weight": packed(torch.int8), "norm": torch.zeros(4)}
    assert merge(base, [Task(task)], method="task_arithmetic")["norm"].tolist() == [0] * 4
    task["l.weight"][3, 3] += 1
    said = r"'l.weight' holds integers, I8 \[4, 4\] .* and they differ; quantised"
    with pytest.raises(ValueError, match=said):
        merge(base, [Task(task)], method="task_arithmetic")
    merged = merge(base, [Task(task)], method="task_arithmetic", heads="base", head_names=["l.*"])
    assert torch.equal(merged["l.weight"], base["l.weight"])


@pytest.mark.parametrize("at", [(), ("text_config",), ("a", "b")])
@pytest.mark.parametrize("told", ["quantization_config", "compression_config"])
def test_quantised_by_config_at_any_depth(told, at, tmp_path):
    config = {told: {"bits": 4}}
    for key in reversed(at):
        config = {key: config}
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"quantised \({'.'.join((*at, told))} in its config.json"):
        open_checkpoint(tmp_path)


@pytest.fixture
def two(tmp_path):
    """A folder with shards of one model and a whole file of another."""
    torch.manual_seed(0)
    shards, whole = MODELS["llama"](), MODELS["llama"]()
    shards.save_pretrained(tmp_path / "two", max_shard_size="4KB")
    save_file(state(whole), tmp_path / "two" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "two", state(whole)


@pytest.mark.parametrize("shards", ["there", "gone", "some gone"])
def test_a_whole_file_comes_before_an_index_as_in_transformers(two, shards):
    folder, whole = two
    listed = sorted(folder.glob("model-*"))
    for shard in {"there": [], "gone": listed, "some gone": listed[1:]}[shards]:
        shard.unlink()
    said = r"holds two models: .* \(first 'lm_head.weight': -?\d.* and -?\d" if shards == "there" else "stale"
    with pytest.warns(UserWarning, match=said):
        opened = open_checkpoint(folder)
    for name, value in state(tf.AutoModelForCausalLM.from_pretrained(folder)).items():
        assert torch.equal(opened[name], value)
        assert torch.equal(whole[name], value)


def test_an_index_beside_the_same_weights_says_nothing(two, recwarn):
    folder, _ = two
    shards = {
        name: tensor for file in sorted(folder.glob("model-*")) for name, tensor in load_file(file).items()
    }
    save_file(shards, folder / "model.safetensors", metadata={"format": "pt"})
    assert set(open_checkpoint(folder)) == set(shards)
    assert not [one for one in recwarn if "model.safetensors" in str(one.message)]
    one = next(iter(shards))
    save_file(
        {n: t for n, t in shards.items() if n != one}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.warns(UserWarning, match=f"'{one}' is in the shards alone"):
        open_checkpoint(folder)


def test_an_index_alone_whose_shards_are_gone(two):
    folder, _ = two
    (folder / "model.safetensors").unlink()
    next(folder.glob("model-*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-0"):
        open_checkpoint(folder)


def test_a_head_that_differs_in_one_value_is_no_copy(tmp_path):
    tied = tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "vocab_size": 300}, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    for last, aliases in ((0.0, {"lm_head.weight": "model.embed_tokens.weight"}), (0.5, {})):
        head[120, 3] += last
        save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
        assert open_checkpoint(tmp_path).aliases == aliases
    merged = merge(tmp_path, [Task(tmp_path)], method="averaging")
    assert torch.equal(merged["lm_head.weight"], head)
    view = by_module(open_checkpoint(tmp_path))
    for name, value in state(tf.AutoModelForCausalLM.from_pretrained(tmp_path)).items():
        assert torch.equal(view[name], value)


def test_a_head_of_its_own_over_a_tied_base_is_not_advised_to_be_dropped_alone(tmp_path):
    tied = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "base")
    (tmp_path / "task").mkdir()
    save_file(
        {**state(tied), "lm_head.weight": floats(60).repeat(1, 4)}, tmp_path / "task" / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"the base ties it to 'model.embed_tokens.weight': untie the base: load it"
    ):
        merge(tmp_path / "base", [Task(tmp_path / "task")], method="averaging")


def test_heads_of_two_classes_whose_names_transformers_knows_are_no_tensors_of_another_name(tmp_path):
    config = tf.RobertaConfig(**{**TEXT, "num_key_value_heads": None}, num_labels=2)
    tf.RobertaForMaskedLM(config).save_pretrained(tmp_path / "base")
    tf.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "task")
    with pytest.raises(
        ValueError, match=r"first 'classifier.dense.bias' .*; pass missing='base' to drop them, or heads="
    ):
        merge(tmp_path / "base", [Task(tmp_path / "task")], method="averaging")


def test_batchnorm_statistics_that_differ_in_one_channel():
    base = nn.Sequential(nn.Linear(2, 400), nn.BatchNorm1d(400))
    task = copy.deepcopy(base)
    task[1].running_mean[150] += 1
    with pytest.raises(ValueError, match=r"'1.running_mean' differs"):
        merge(base, [Task(task)], method="averaging")


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_layers_of_a_model_of_several_towers(kind, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "base")
    stacked = stack([Slice(tmp_path / "base", 0, 2), Slice(tmp_path / "base", 1, 2)])
    merge(stacked, [Task(stacked)], method="passthrough", out=tmp_path / "out")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.text_config.num_hidden_layers == 3
    assert loaded.config.vision_config.num_hidden_layers == 2
    own, names = state(model), state(loaded)
    assert all(torch.equal(names[name], value) for name, value in own.items())
    above = [name for name in names if name not in own]
    assert above
    assert all(torch.equal(names[name], own[name.replace("layers.2.", "layers.1.")]) for name in above)


def test_layers_of_encoder_and_decoder_are_refused(tmp_path):
    MODELS["t5"]().save_pretrained(tmp_path)
    said = r"2 stacks of layers \(decoder.block.0 to 1, encoder.block.0 to 1\)"
    with pytest.raises(ValueError, match=said):
        stack([Slice(tmp_path, 0, 1)])


def network(classes, wrapped):
    """Wrapped: as a Lightning module holds it."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"features": nn.Linear(8, 16), "classifier": nn.Sequential(nn.Linear(16, classes))})
    return nn.ModuleDict({"net": net}) if wrapped else net


@pytest.mark.parametrize("heads", ["base", "keep-per-task"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_head_never_takes_the_network(heads, wrapped):
    base = network(2, wrapped)
    tasks = [Task(tuned(network(classes, wrapped), classes)) for classes in (3, 4)]
    merged = merge(base, tasks, method="averaging", heads=heads)
    name = f"{'net.' if wrapped else ''}features.weight"
    mean = sum(task.model.state_dict()[name] for task in tasks) / 2
    torch.testing.assert_close(merged[name], mean)
    head = name.replace("features", "classifier.0")
    assert torch.equal(merged[head], base.state_dict()[head])


NOTHING = {
    "no name in common": (
        lambda names: {f"other.{name}": value for name, value in names.items()},
        "no tensor would be merged",
    ),
    "one name in common": (
        lambda names: {name if "0" in name else f"x.{name}": value for name, value in names.items()},
        "1 of the base's tensors would be merged",
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_merge_of_nothing_or_little_is_refused(kind):
    change, words = NOTHING[kind]
    base = {f"{number}.weight": torch.ones(2) for number in range(6)}
    with pytest.raises(ValueError, match=words):
        merge(base, [Task(change(base))], method="averaging", missing="base")


def test_a_tensor_that_a_task_only_calls_otherwise():
    base = {"norm.weight": torch.ones(3), "up.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"first 'norm.gamma' .* has 'norm.weight' of that shape instead"):
        merge(base, [Task({"norm.gamma": torch.ones(3), "up.weight": torch.ones(2)})], method="averaging")
