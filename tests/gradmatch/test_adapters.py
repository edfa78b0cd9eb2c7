"""LoRA adapters against peft's own merge_and_unload, and those that are refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gradmatch import Task, merge, open_checkpoint


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8, bos_token_id=1, eos_token_id=1
        )
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=30,
            num_labels=2,
        )
    )


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 6}),
    "rslora": (llama, {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": (llama, {"target_modules": ["q_proj", "v_proj"], "r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "r": 3, "fan_in_fan_out": True}),
    "head": (bert, {"target_modules": ["query"], "r": 3, "modules_to_save": ["classifier"]}),
    "bias": (bert, {"target_modules": ["query"], "r": 3, "bias": "lora_only"}),
    "lora bias": (bert, {"target_modules": ["query"], "r": 3, "lora_bias": True}),
}  # fmt: skip


def make(tmp_path, build, settings, seed=0):
    """A base folder and an adapter folder with random factors; returns what peft merges them to."""
    torch.manual_seed(seed)
    model = build()
    if not (tmp_path / "base").exists():
        model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for _name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / f"adapter{seed}")
    return wrapped.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_expands_to_what_peft_merges(tmp_path, case):
    expected = make(tmp_path, *CASES[case])
    found = open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(tmp_path / "base"))
    assert set(found) == set(open_checkpoint(tmp_path / "base"))
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    changed = [
        name for name in found if not torch.equal(found[name], open_checkpoint(tmp_path / "base")[name])
    ]
    assert changed
    name = next(name for name in changed if found[name].dim() == 2)
    flat = found.store.block(name, 5, 23)
    torch.testing.assert_close(flat, found[name].flatten()[5:23])  # ranges that begin and end inside rows


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_adapters_merge_like_two_models(tmp_path):
    settings = CASES["plain"][1]
    models = [make(tmp_path, llama, settings, seed) for seed in (0, 1)]
    tasks = [Task(tmp_path / f"adapter{seed}", weight=0.5) for seed in (0, 1)]
    done = merge(tmp_path / "base", tasks, method="task_arithmetic", out=tmp_path / "out")
    for name in done:
        torch.testing.assert_close(done[name], (models[0][name] + models[1][name]) / 2, rtol=1e-5, atol=1e-6)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 16


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_base_named_by_the_adapter_is_found(tmp_path):
    expected = make(tmp_path, *CASES["plain"])
    found = open_checkpoint(tmp_path / "adapter0")  # its config names the base folder
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def edited(folder, change):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))


def without(folder, part):
    file = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if part not in name}, file)


REFUSED = [
    (lambda folder: edited(folder, {"use_dora": True}), "is a DoRA adapter"),
    (lambda folder: edited(folder, {"peft_type": "IA3"}), "is a IA3 adapter; only LoRA"),
    (lambda folder: edited(folder, {"base_model_name_or_path": None}), "names no base model"),
    (lambda folder: without(folder, "lora_B"), "the adapter is incomplete"),
    (lambda folder: without(folder, "lora_"), "holds no LoRA factors"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("spoil", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_adapters_that_are_refused(tmp_path, spoil, text):
    make(tmp_path, *CASES["plain"])
    if "no LoRA factors" in text:
        file = tmp_path / "adapter0" / "adapter_model.safetensors"
        save_file({"base_model.model.norm.weight": torch.ones(16)}, file)
    else:
        spoil(tmp_path / "adapter0")
    with pytest.raises(ValueError, match=text):
        open_checkpoint(tmp_path / "adapter0")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_for_another_base(tmp_path):
    make(tmp_path, *CASES["head"])
    wide = BertForSequenceClassification(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30
        )
    )
    with pytest.raises(ValueError, match=r"the base's is F32 \[32, 32\]; it is an adapter for another base"):
        open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(wide))
    with pytest.raises(
        ValueError, match=r"adapts 'bert.encoder.layer.0.attention.self.query.weight', which .* does not have"
    ):
        open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(llama()))
    file = tmp_path / "adapter0" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.bert.pooler.dense.bias": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"'bert.pooler.dense.bias' is F32 \[3\], the base's is F32 \[16\]"):
        open_checkpoint(tmp_path / "adapter0")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_a_tied_embedding_changes_the_tied_tensor(tmp_path):
    expected = make(tmp_path, gpt2, {"target_modules": ["wte"], "r": 2})
    found = open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(tmp_path / "base"))
    torch.testing.assert_close(
        found["transformer.wte.weight"], expected["transformer.wte.weight"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", [["lm_head"], ["wte", "lm_head"]])
@pytest.mark.parametrize("memory", [True, False])
def test_adapters_of_tied_weights_are_refused(tmp_path, targets, memory):
    make(tmp_path, gpt2, {"target_modules": targets, "r": 2, "fan_in_fan_out": False})
    base = open_checkpoint(
        GPT2LMHeadModel.from_pretrained(tmp_path / "base") if memory else tmp_path / "base"
    )
    with pytest.raises(ValueError, match=r"is tied to another tensor .* untie the base"):
        open_checkpoint(tmp_path / "adapter0", base=base)


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_two_updates_of_one_tensor_are_refused(tmp_path):
    make(tmp_path, *CASES["plain"])
    rewrite(
        tmp_path / "adapter0",
        lambda held: (
            held
            | {
                n.replace("lora_A.weight", "lora_A.default.weight"): t.clone()
                for n, t in held.items()
                if "lora_A" in n
            }
            | {
                n.replace("lora_B.weight", "lora_B.default.weight"): t.clone()
                for n, t in held.items()
                if "lora_B" in n
            }
        ),
    )
    with pytest.raises(ValueError, match=r"both .* and .* adapt"):
        open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(tmp_path / "base"))


def test_trained_single_tokens_are_refused_by_name(tmp_path):
    make(tmp_path, *CASES["plain"])
    rewrite(
        tmp_path / "adapter0",
        lambda held: held | {"base_model.model.model.embed_tokens.trainable_tokens_delta": torch.ones(2, 16)},
    )
    with pytest.raises(ValueError, match=r"trains single tokens \('base_model.*trainable_tokens_delta'\)"):
        open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(tmp_path / "base"))


def test_a_module_with_adapters_is_refused_by_what_it_is():
    tuned = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PeftModel has adapters beside its weights: pass the folder"):
        merge(llama(), [Task(tuned)], method="averaging")
    assert merge(llama(), [Task(tuned.merge_and_unload())], method="averaging")
