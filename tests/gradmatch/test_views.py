"""One view of a model: whatever files call their tensors, however they lay them out, is what transformers loads."""

import copy
import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from gradmatch import Task, merge, open_checkpoint
from gradmatch.estimators import estimate
from gradmatch.estimators.wrapped import bare_names
from gradmatch.measure.objective import Objective
from gradmatch.models.gathered import ABSENT, Gathered, Part, Rows
from gradmatch.models.loading import load
from gradmatch.models.stores import MemoryStore, Spec, equal
from gradmatch.models.views import by_module, like
from tests.gradmatch.tiny import tuned

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SMALL, "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 32, "pad_token_id": 0}
IMAGE = {**SMALL, "image_size": 8, "patch_size": 4}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=16)),
    "bert": lambda: tf.BertForPreTraining(tf.BertConfig(**SMALL, vocab_size=60)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, vocab_size=60)
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE, num_labels=3)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=12
        )
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=4)
    ),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **{**TEXT, "num_key_value_heads": 4}, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=4,
        )
    ),
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**IMAGE), text_config=tf.LlamaConfig(**TEXT), image_token_index=59
        )
    ),
    "gemma3": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config={**TEXT, "head_dim": 4}, vision_config=IMAGE, mm_tokens_per_image=4, image_token_index=59
        )
    ),
}  # fmt: skip


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rewritten(source, target, change):
    """A folder with the tensors of another one changed, as a file of other names."""
    shutil.copytree(source, target)
    held = load_file(source / "model.safetensors")
    save_file(change(held), target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """Base and task of one architecture, as modules and as folders."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    base = MODELS[request.param]()
    models = {"base": base, "task": tuned(base, 1)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder, models


def test_a_folder_by_module_is_what_transformers_loads(saved):
    folder, models = saved
    loaded = state(type(models["task"]).from_pretrained(folder / "task"))
    view, module = by_module(open_checkpoint(folder / "task")), load(open_checkpoint(folder / "task"))
    assert set(view) >= set(loaded)
    for name, value in loaded.items():
        assert torch.equal(view[name], value), name
        assert torch.equal(module.state_dict()[name], value), name


def test_folders_and_modules_of_one_model_merge_alike(saved):
    folder, models = saved
    base, task = folder / "base", folder / "task"
    of_modules = merge(models["base"], [Task(models["task"])], method="task_arithmetic")
    for given in (task, models["task"]):
        merged = merge(base, [Task(given)], method="task_arithmetic")
        assert set(merged) == set(open_checkpoint(base)), "the base's names, in its layout"
        view = by_module(like(open_checkpoint(merged), open_checkpoint(models["base"])))
        for name, value in of_modules.items():
            torch.testing.assert_close(view[name], value, msg=name)
    mixed = merge(models["base"], [Task(task)], method="task_arithmetic")
    assert all(torch.equal(mixed[name], value) for name, value in of_modules.items())


CURVED = ("vit", "mixtral", "deepseek_v3", "qwen2_moe")


@pytest.mark.parametrize("kind", CURVED)
def test_curvature_of_a_module_fits_its_files(kind, tmp_path):
    torch.manual_seed(0)
    base = MODELS[kind]()
    task = tuned(base, 1)
    inputs = (
        {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4) % 3}
        if kind == "vit"
        else {"input_ids": torch.randint(3, 60, (3, 6)), "labels": torch.randint(3, 60, (3, 6))}
    )
    known = {}
    for name, model in (("base", base), ("task", task)):
        model.save_pretrained(tmp_path / name)
        known[name] = tmp_path / f"{name}.safetensors"
        estimate(model, [inputs], method="empirical_fisher", progress=False).save(known[name])
    of_modules = merge(base, [Task(task, known["task"])], base_curvature=known["base"])
    of_files = merge(
        tmp_path / "base", [Task(tmp_path / "task", known["task"])], base_curvature=known["base"]
    )
    view = like(open_checkpoint(of_files), open_checkpoint(base))
    for name, value in of_modules.items():
        assert torch.equal(view[name], value), name
    with pytest.raises(ValueError, match="taken at other weights than task"):
        merge(tmp_path / "base", [Task(tmp_path / "task", known["base"])], base_curvature=known["base"])


def test_factors_of_layers_that_files_stack_are_said_to_stay_behind(tmp_path):
    torch.manual_seed(0)
    base = tf.Dinov2ForImageClassification(tf.Dinov2Config(**IMAGE, use_swiglu_ffn=True, num_labels=3))
    task = tuned(base, 1)
    inputs = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4) % 3}
    base.save_pretrained(tmp_path / "base")
    known = [estimate(model, [inputs], method="kfac", progress=False) for model in (base, task)]
    arguments = {"base_curvature": known[0], "method": "kronecker"}
    with pytest.warns(
        UserWarning, match=r"factors of 4 layers .* of task 1 are not used, first '.*(gate|up)_proj.weight'"
    ):
        report = merge(tmp_path / "base", [Task(task, known[1])], **arguments).report
    assert sum("stacked or split, where factors do not follow" in note for note in report.notes) == 2
    assert not [
        note for note in merge(base, [Task(task, known[1])], **arguments).report.notes if "stacked" in note
    ]


# Files as the hub has them: (architecture, what their names are), loaded by transformers as they are.
OLD = {
    "LayerNorm.gamma": ("bert", lambda s: {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in s.items()
    }),
    "no prefix": ("gpt2", lambda s: {k.removeprefix("transformer."): v for k, v in s.items()}),
    "copies of the embeddings": ("t5", lambda s: {
        **s, **{k: s["shared.weight"].clone() for k in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
    }),
}  # fmt: skip


@pytest.mark.parametrize("missing", ["error", "base"])
@pytest.mark.parametrize("old", OLD)
def test_bases_as_the_hub_has_them(old, missing, tmp_path):
    kind, change = OLD[old]
    torch.manual_seed(0)
    base = MODELS[kind]()
    tasks = [tuned(base, 1), tuned(base, 2)]
    base.save_pretrained(tmp_path / "new")
    rewritten(tmp_path / "new", tmp_path / "old", change)
    for number, task in enumerate(tasks):
        task.save_pretrained(tmp_path / f"{number}")
    plain = merge(base, [Task(one, name=str(n)) for n, one in enumerate(tasks)], method="averaging")
    out, _ = (
        merge(
            tmp_path / "old", [Task(tmp_path / "0"), Task(tmp_path / "1")], method="averaging", missing=missing,
            transforms=transforms, out=tmp_path / name,
        )
        for name, transforms in (("out", ["dare"]), ("plain", []))
    )  # fmt: skip
    loaded = state(type(base).from_pretrained(tmp_path / "plain"))
    for name, value in plain.items():
        torch.testing.assert_close(loaded[name], value, msg=name)
    if kind == "t5":  # random draws too leave tied tensors tied
        assert not {"encoder.embed_tokens.weight", "lm_head.weight"} & set(out.store)


def test_sinusoids_that_no_file_holds_are_the_modules_own(tmp_path):
    counts = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in counts.items()}
    sizes |= {"d_model": 16, "vocab_size": 60, "max_position_embeddings": 16, "pad_token_id": 0}
    ends = {"eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 0}
    base = tf.MarianMTModel(tf.MarianConfig(**sizes, **ends))
    base.save_pretrained(tmp_path / "base")
    assert "model.encoder.embed_positions.weight" not in open_checkpoint(tmp_path / "base")
    loaded = state(load(open_checkpoint(tmp_path / "base")))
    assert all(torch.equal(loaded[name], value) for name, value in state(base).items())
    merge(base, [Task(tmp_path / "base")], method="averaging")
    merge(tmp_path / "base", [Task(base)], method="averaging")


def test_two_tensors_for_one_parameter(tmp_path):
    MODELS["bert"]().save_pretrained(tmp_path / "base")
    both = lambda s: {**s, "bert.embeddings.LayerNorm.gamma": s["bert.embeddings.LayerNorm.weight"].clone()}  # noqa: E731
    rewritten(tmp_path / "base", tmp_path / "both", both)
    with pytest.raises(ValueError, match=r"LayerNorm.gamma.*LayerNorm.weight.* are both"):
        merge(tmp_path / "base", [Task(tmp_path / "both")], method="averaging")


def test_an_incomplete_group_of_experts(tmp_path):
    MODELS["mixtral"]().save_pretrained(tmp_path / "base")
    less = lambda s: {k: v for k, v in s.items() if "layers.0" not in k or "experts.3.w1" not in k}  # noqa: E731
    with pytest.raises(ValueError, match=r"gate_up_proj"):
        load(open_checkpoint(rewritten(tmp_path / "base", tmp_path / "less", less)))


def test_data_never_pass_through_a_parameter_that_no_file_gave(tmp_path):
    MODELS["bert"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = "does not give 'classifier.weight' and 1 others of BertForSequenceClassification"
    with pytest.raises(ValueError, match=said):
        load(open_checkpoint(tmp_path))
    objective = Objective(nn.Linear(2, 1), [(torch.ones(1, 2), torch.ones(1, 1))])
    for weights in ({"weight": torch.ones(1, 2)}, {"weight": torch.ones(1, 3), "bias": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"does not give 'bias'|'weight' has shape \[1, 3\]"):
            objective.losses(weights)
    whole = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    with pytest.raises(ValueError, match=r"a direction moves 'wait', which Linear does not have"):
        objective.expand(whole, {"wait": torch.ones(1, 2)})


def llama(tied):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=tied))


def test_weights_that_untie_what_the_module_ties():
    tied, own = llama(True), llama(False)
    ids = torch.randint(3, 60, (2, 5))
    objective = Objective(tied, [{"input_ids": ids, "labels": ids}])
    weights = state(tied)
    assert objective.losses(weights).tolist() == objective.losses({}).tolist()
    own.load_state_dict({**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    expected = Objective(own, [{"input_ids": ids, "labels": ids}]).losses({})
    torch.testing.assert_close(objective.losses(state(own)), expected)
    with pytest.raises(ValueError, match=r"ties .* two different tensors"):
        objective.gradient(state(own))


def test_forward_mode_derivatives_of_experts():
    model = MODELS["mixtral"]()
    ids = torch.randint(3, 60, (2, 5))
    objective = Objective(model, [{"input_ids": ids, "labels": ids}])
    weights, step = state(model), state(tuned(model, 1))
    direction = {name: step[name] - weights[name] for name in weights}
    _, slope, _ = objective.expand(weights, direction)
    along = sum(float((g * direction[name]).sum()) for name, g in objective.gradient(weights).items())
    assert slope == pytest.approx(along, rel=1e-3)
    assert model.config._experts_implementation == "grouped_mm"


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "compiled layers": lambda model: nn.Sequential(model[0], torch.compile(model[1], backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped_modules_are_their_insides(wrap):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    task = tuned(base, 1)
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    plain = estimate(task, [batch], method="empirical_fisher", progress=False)
    expected = merge(base, [Task(task, plain)], base_curvature=1.0)
    wrapped = WRAPPED[wrap](copy.deepcopy(task))
    known = estimate(wrapped, [batch], method="empirical_fisher", progress=False)
    assert set(known) == set(plain)
    merged = merge(base, [Task(wrapped, known)], base_curvature=1.0)
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    saved = merge(base, [Task(dict(wrapped.state_dict()), known)], base_curvature=1.0)
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    own = merge(wrapped, [Task(task)], method="averaging")
    inside = wrapped.module if wrap == "DataParallel" else getattr(wrapped, "_orig_mod", wrapped)
    inside.load_state_dict(own)
    losses = [Objective(one, [batch]).losses({}).tolist() for one in (wrapped, task)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("names", "bare"),
    [
        (["module.a.b", "module.c"], ["a.b", "c"]),
        (["module.a", "c"], ["module.a", "c"]),
        (["_orig_mod.a", "b._orig_mod.c"], ["a", "b.c"]),
        (["_fsdp_wrapped_module.a._checkpoint_wrapped_module.b"], ["a.b"]),
        (["my_orig_mod.a"], ["my_orig_mod.a"]),
    ],
)
def test_bare_names(names, bare):
    assert list(bare_names(names).values()) == bare


def test_ties_kept_under_different_names(tmp_path):
    base = llama(True)
    task = tuned(base, 1)
    base.save_pretrained(tmp_path / "base")  # keeps the embeddings
    save_model(task, tmp_path / "task.safetensors")  # keeps lm_head
    merged = merge(tmp_path / "base", [Task(tmp_path / "task.safetensors")], method="task_arithmetic")
    torch.testing.assert_close(merged["model.embed_tokens.weight"], state(task)["lm_head.weight"])
    merged = merge(tmp_path / "task.safetensors", [Task(tmp_path / "base")], method="task_arithmetic")
    torch.testing.assert_close(merged["lm_head.weight"], state(base)["lm_head.weight"])


def test_gathered_pieces():
    store = MemoryStore({"a": torch.arange(6.0).view(3, 2), "b": torch.arange(10.0, 14.0).view(2, 2)})
    order = torch.tensor([4, 0, ABSENT, 2])
    part = Part(("a", "b"), Spec("F32", (4, 2)), lambda: (2, order))
    gathered = Gathered(store, {"part": part, "rows": Rows([2, ABSENT, 0]).part(store, "a")})
    whole = [12, 13, 0, 1, 0, 0, 4, 5]
    for first in range(8):
        for last in range(first, 9):
            assert gathered.block("part", first, last).tolist() == whole[first:last]
    assert gathered.spec("rows").shape == (3, 2)
    assert gathered.block("rows", 0, 6).tolist() == [4, 5, 0, 0, 0, 1]
    assert gathered.block("b", 1, 3).tolist() == [11, 12]


def test_equal_is_of_every_value():
    x = torch.arange(1000.0)
    y = x.clone()
    y[500] += 1
    store = MemoryStore({"x": x, "same": x.clone(), "other": y, "wide": x.double()})
    assert [equal(store, "x", store, name) for name in ("same", "other", "wide")] == [True, False, False]
