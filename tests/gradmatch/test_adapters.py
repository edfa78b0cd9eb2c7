"""LoRA adapters against peft's own merge_and_unload, and those that are refused."""

import json
import re
import shutil

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from gradmatch import GradmatchError, Task, merge, open_checkpoint
from gradmatch.estimators import Curvature
from gradmatch.models.adapter_config import FREE
from gradmatch.recipes.recipe import load_recipe
from tests.command import run
from tests.gradmatch.tiny import WORDS, tokenizer
from tests.gradmatch.tiny import gpt2 as tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied=False):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, vocab_size=30, tie_word_embeddings=tied))


def gpt2(kind=tf.GPT2LMHeadModel):
    return tiny_gpt2(kind, vocab_size=30, n_positions=8, pad_token_id=0)


def gpt2_classifier():
    return gpt2(tf.GPT2ForSequenceClassification)


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(**SMALL, vocab_size=30, num_labels=2))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=30, decoder_start_token_id=0, **sizes))


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**sizes, num_labels=3))


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 6}),
    "alpha left out": (llama, {"target_modules": ["q_proj"], "r": 4}),
    "alpha 0": (llama, {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 0, "modules_to_save": ["norm"]}),
    "rslora": (llama, {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": (llama, {"target_modules": ["q_proj", "v_proj"], "r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}}),
    "patterns, or": (llama, {"target_modules": ["q_proj", "v_proj"], "r": 4, "alpha_pattern": {"q_proj|proj": 16}}),
    "patterns, the first counts": (llama, {"target_modules": ["q_proj"], "r": 4, "alpha_pattern": {"layers.1.self_attn.q_proj": 3, ".*q_proj": 5}}),
    "patterns, whole names": (llama, {"target_modules": ["q_proj"], "r": 4, "alpha_pattern": {"_proj": 3}, "rank_pattern": {r"model\.layers\.0\..*": 2}}),
    "gaussian, excluded": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"], "init_lora_weights": "gaussian"}),
    "some layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "orthogonal": (llama, {"target_modules": ["v_proj"], "r": 4, "init_lora_weights": "orthogonal"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    "tied embedding": (gpt2, {"target_modules": ["wte"], "r": 2}),
    "saved and tied": (lambda: llama(True), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "r": 3, "fan_in_fan_out": True}),
    "conv1d, square": (gpt2, {"target_modules": r".*attn\.c_proj", "r": 3}),
    "conv1d and linear": (gpt2_classifier, {"target_modules": "all-linear", "r": 2}),
    "conv1d and linear, square": (gpt2_classifier, {"target_modules": r".*attn\.c_proj|score", "r": 2}),
    "head": (bert, {"target_modules": ["query"], "r": 3, "modules_to_save": ["classifier"]}),
    "bias of adapted layers": (bert, {"target_modules": ["query"], "r": 3, "bias": "lora_only"}),
    "all biases": (bert, {"target_modules": ["query"], "r": 3, "bias": "all"}),
    "lora bias": (bert, {"target_modules": ["query"], "r": 3, "lora_bias": True}),
    "two towers": (t5, {"target_modules": ["q", "v", "wo"], "r": 3}),
    "convolutions": (resnet, {"target_modules": ["convolution"], "r": 3}),
}  # fmt: skip


def drawn(wrapped):
    """With noise on what is trained."""
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped


def configured(folder, **changes):
    """Changes keys of an adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def make(tmp_path, build, settings, seed=0):
    """A base folder and an adapter folder with random factors; returns what peft merges them to."""
    torch.manual_seed(seed)
    base, folder = tmp_path / "base", tmp_path / f"adapter{seed}"
    if not base.exists():
        build().save_pretrained(base)
    kind = type(build())
    drawn(peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(**settings))).save_pretrained(
        folder
    )
    return peft.PeftModel.from_pretrained(kind.from_pretrained(base), folder).merge_and_unload().state_dict()


def opened(tmp_path):
    return open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(tmp_path / "base"))


@pytest.mark.parametrize("case", CASES)
def test_expands_to_what_peft_merges(tmp_path, case):
    expected = make(tmp_path, *CASES[case])
    found, base = opened(tmp_path), open_checkpoint(tmp_path / "base")
    assert set(base) <= set(found) <= set(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    changed = [name for name in base if not torch.equal(found[name], base[name])]
    assert changed or case == "saved and tied"
    for name in changed[:1]:
        flat = found.store.block(name, 5, 13)
        torch.testing.assert_close(flat, found[name].flatten()[5:13])  # ranges that begin and end inside rows


def test_two_adapters_merge_like_two_models(tmp_path):
    models = [make(tmp_path, *CASES["plain"], seed) for seed in (0, 1)]
    tasks = [Task(tmp_path / f"adapter{seed}", weight=0.5) for seed in (0, 1)]
    done = merge(tmp_path / "base", tasks, method="task_arithmetic", out=tmp_path / "out")
    for name in done:
        torch.testing.assert_close(done[name], (models[0][name] + models[1][name]) / 2, rtol=1e-5, atol=1e-6)
    assert tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 16


@pytest.mark.parametrize("task", ["adapter0", "base"])
def test_an_adapter_as_the_base_is_written_with_its_bases_config(tmp_path, task):
    expected = make(tmp_path, *CASES["plain"])
    tasks, method = [Task(tmp_path / task, weight=0.0)], "task_arithmetic"
    merge(tmp_path / "adapter0", tasks, method=method, out=tmp_path / "out")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_an_adapter_beside_another_as_the_base(tmp_path, stacked):
    """It is expanded on the base of both, unless its config says that it was trained on the other."""
    one, two = (make(tmp_path, *CASES["plain"], seed) for seed in (0, 1))
    if stacked:
        configured(tmp_path / "adapter1", base_model_name_or_path=str(tmp_path / "adapter0"))
    merged = merge(tmp_path / "adapter0", [Task(tmp_path / "adapter1")], method="averaging")
    base = open_checkpoint(tmp_path / "base")
    for name, value in merged.items():
        expected = two[name] + one[name] - base[name] if stacked else two[name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_modules_saved_whole_break_ties(tmp_path, saved):
    """What was trained is what is written; a base that stays tied cannot take it, and says so."""
    llama(tied=True).save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "modules_to_save": saved}
    ids = torch.randint(0, 30, (2, 7))
    expected = tuned(tf.LlamaForCausalLM, tmp_path / "base", tmp_path / "adapter", settings)(
        input_ids=ids
    ).logits
    adapter = Task(tmp_path / "adapter")
    merge(tmp_path / "adapter", [adapter], method="averaging", out=tmp_path / "out")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    for tied in (tmp_path / "base", tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")):
        with pytest.raises(ValueError, match=r"trains embeddings or head by itself .*untie the base"):
            merge(tied, [adapter], method="averaging")


def test_a_base_whose_files_call_its_tensors_otherwise(tmp_path):
    """GPT-2 as the hub has it, without the prefix of the module."""
    expected = make(tmp_path, *CASES["conv1d"])
    file = tmp_path / "base" / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    merged = merge(tmp_path / "base", [Task(tmp_path / "adapter0")], method="averaging")
    name = "h.0.attn.c_attn.weight"
    torch.testing.assert_close(merged[name], expected[f"transformer.{name}"], rtol=1e-5, atol=1e-6)


def test_a_pickled_adapter_is_read_where_that_is_asked_for(tmp_path):
    expected = make(tmp_path, *CASES["plain"])
    held = load_file(tmp_path / "adapter0" / "adapter_model.safetensors")
    (tmp_path / "adapter0" / "adapter_model.safetensors").unlink()
    torch.save(held, tmp_path / "adapter0" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle"):
        open_checkpoint(tmp_path / "adapter0")
    found = open_checkpoint(tmp_path / "adapter0", allow_pickle=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    make(folder, *CASES["plain"])
    return folder


def renamed(old, new):
    return lambda held: {name.replace(old, new): tensor for name, tensor in held.items()}


def doubled(held):
    return held | {n.replace(".weight", ".default.weight"): t.clone() for n, t in held.items()}


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."
REFUSED = [  # (changes of the config, change of the tensors, words)
    ({"use_dora": True}, None, "use_dora=True in its adapter_config.json: DoRA"),
    ({"peft_type": "IA3"}, None, "peft_type='IA3' in its adapter_config.json: only LoRA"),
    ({"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa' in its adapter_config.json: .* changed the base"),
    ({"init_lora_weights": "pissa_niter_4"}, None, "init_lora_weights='pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, None, "init_lora_weights='olora'"),
    ({"init_lora_weights": "loftq"}, None, "init_lora_weights='loftq'"),
    ({"init_lora_weights": "corda"}, None, "init_lora_weights='corda'"),
    ({"init_lora_weights": "lora_ga"}, None, "init_lora_weights='lora_ga'"),
    ({"init_lora_weights": "of tomorrow"}, None, "init_lora_weights='of tomorrow'"),
    ({"alora_invocation_tokens": [3]}, None, r"alora_invocation_tokens=\[3\] .*aLoRA"),
    ({"kasa_config": {"beta": 0.1}}, None, "kasa_config=.*KaSA"),
    ({"layer_replication": [[0, 2], [1, 2]]}, None, "layer_replication=.*layers are repeated"),
    ({"target_parameters": ["mlp.experts.down_proj"]}, None, "target_parameters=.*stacked experts"),
    ({"trainable_token_indices": [1]}, None, "trainable_token_indices=.*single rows"),
    ({"use_qalora": True}, None, "use_qalora=True"),
    ({"ensure_weight_tying": True}, None, "ensure_weight_tying=True"),
    ({"loftq_config": {"loftq_bits": 4}}, None, "loftq_config="),
    ({"bias": "some"}, None, "bias='some'"),
    ({"lora_alpha": "8"}, None, "lora_alpha='8'"),
    ({"r": 0}, None, "r=0"),
    ({"rank_pattern": {"q_proj": 2.5}}, None, "rank_pattern="),
    ({"alpha_pattern": ["q_proj"]}, None, "alpha_pattern="),
    ({"modules_to_save": "lm_head"}, None, "modules_to_save='lm_head'"),
    ({"key_of_tomorrow": 1}, None, "key_of_tomorrow=1 in its adapter_config.json: not understood"),
    ({"alpha_pattern": {"(": 2}}, None, "no regular expression"),
    ({"r": 4}, None, "has rank 3, its adapter_config.json says 4"),
    ({"base_model_name_or_path": None}, None, "names no base model"),
    ({}, lambda held: {n: t for n, t in held.items() if "lora_B" not in n}, "the adapter is incomplete"),
    ({}, lambda held: {"base_model.model.model.norm.weight": torch.ones(16)}, "holds no LoRA factors"),
    ({}, lambda held: held | {PREFIX + "lora_magnitude_vector": torch.ones(16)}, "lora_magnitude_vector' is no factor"),
    ({}, lambda held: held | {PREFIX + "lora_B.bias": torch.ones(16)}, "lora_B.bias' is no factor"),
    ({}, lambda held: held | {"base_model.model.model.norm.weight": torch.ones(3)}, r"norm.weight' is F32 \[3\], the base's is F32 \[16\]"),
    ({}, doubled, "both .* and .* adapt"),
    ({}, renamed("lora_A.weight", "lora_A.other.weight"), "is no factor"),
    ({}, renamed("layers.0", "layers.7"), "adapts 'model.layers.7.* which .* does not have"),
    ({}, renamed("q_proj", "k_proj"), None),
]  # fmt: skip


@pytest.mark.parametrize(("change", "tensors", "text"), REFUSED, ids=[str(text) for _, _, text in REFUSED])
def test_adapters_that_are_refused(plain, tmp_path, change, tensors, text):
    folder = configured(shutil.copytree(plain / "adapter0", tmp_path / "adapter"), **change)
    if tensors:
        file = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file)
    if text is None:  # nothing in the file tells which layer of one shape was adapted
        open_checkpoint(folder)
        return
    with pytest.raises(GradmatchError, match=text) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value)
    assert error.value.code in ("bad_adapter", "shape_mismatch")


@pytest.mark.parametrize("key", sorted(peft.LoraConfig(r=3).to_dict()))
def test_every_key_of_the_installed_peft_is_free_or_refused_by_name(plain, tmp_path, key):
    folder = configured(shutil.copytree(plain / "adapter0", tmp_path / "adapter"), **{key: {"some": "value"}})
    base = open_checkpoint(plain / "base")
    if key in FREE:
        open_checkpoint(folder, base=base)
        return
    with pytest.raises(ValueError, match=f"{key}={{'some': 'value'}}"):
        open_checkpoint(folder, base=base)


def test_a_bias_for_layers_that_have_none_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    tuned(
        tf.LlamaForCausalLM,
        tmp_path / "base",
        tmp_path / "a",
        {"target_modules": ["q_proj"], "lora_bias": True},
    )
    with pytest.raises(ValueError, match=r"lora_bias=True .* a layer without a bias .* lora_bias=False"):
        open_checkpoint(tmp_path / "a")


def test_a_convolution_of_groups_is_refused_by_name(tmp_path):
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "image_size": 8}
    kind = tf.ConvNextForImageClassification
    kind(tf.ConvNextConfig(**sizes, num_labels=2)).save_pretrained(tmp_path / "base")
    tuned(kind, tmp_path / "base", tmp_path / "a", {"target_modules": ["dwconv"], "r": 16})
    with pytest.raises(
        ValueError, match=r"dwconv.weight', a convolution of 8 groups, .* merge_and_unload first"
    ):
        open_checkpoint(tmp_path / "a")


def test_adapters_that_lead_back_to_themselves(plain, tmp_path):
    for name, base in (("one", "two"), ("two", "one")):
        folder = shutil.copytree(plain / "adapter0", tmp_path / name)
        configured(folder, base_model_name_or_path=str(tmp_path / base))
    with pytest.raises(ValueError, match="leads back to itself"):
        open_checkpoint(tmp_path / "one")


def test_adapters_for_another_base(tmp_path):
    make(tmp_path, *CASES["head"])
    wide = tf.BertForSequenceClassification(tf.BertConfig(**{**SMALL, "hidden_size": 32}, vocab_size=30))
    for base, text in (
        (wide, r"the base's is F32 \[32, 32\]; it is an adapter for another base"),
        (llama(), r"adapts 'bert.encoder.layer.0.attention.self.query.weight', which .* does not have"),
    ):
        with pytest.raises(ValueError, match=text):
            open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(base))


def test_a_square_weight_of_a_state_dict_may_lie_either_way(tmp_path):
    make(tmp_path, *CASES["conv1d, square"])
    with pytest.raises(ValueError, match="which is square"):
        open_checkpoint(tmp_path / "adapter0", base=open_checkpoint(gpt2().state_dict()))


def tuned(kind, base, folder, settings, tokens=None):
    """An adapter with random factors, saved with the tokenizer where the vocabulary grew; the model as it was trained."""
    model = kind.from_pretrained(base)
    if tokens:
        model.resize_token_embeddings(len(tokens))
        tokens.save_pretrained(folder)
    wrapped = drawn(peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, **settings})))
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("build", [lambda: llama(True), gpt2])
def test_of_tied_embeddings_both_change_as_with_peft_and_alone_where_the_base_is_untied(tmp_path, build):
    build().save_pretrained(tmp_path / "base")
    kind, ids = type(build()), torch.randint(0, 30, (2, 7))
    target = "embed_tokens" if kind is tf.LlamaForCausalLM else "wte"
    trained = tuned(kind, tmp_path / "base", tmp_path / "adapter", {"target_modules": [target]})
    logits = trained(input_ids=ids).logits
    expected = trained.merge_and_unload().state_dict()
    with pytest.warns(
        UserWarning, match=f"adapts '.*{target}.weight', which the base ties to lm_head.weight: both"
    ):
        merged = merge(tmp_path / "base", [Task(tmp_path / "adapter")], method="averaging")
    assert any("both change, as with peft" in note for note in merged.report.notes)
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    untied = kind.from_pretrained(tmp_path / "base")  # as the warning says
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
    untied.config.tie_word_embeddings = False
    untied.save_pretrained(tmp_path / "untied")
    merge(tmp_path / "untied", [Task(tmp_path / "adapter")], method="averaging", out=tmp_path / "out")
    loaded = kind.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["saved with the adapter", "saved modules", "adapted too"],
)
def test_an_adapter_with_tokens_of_its_own(tmp_path, capsys, tied, settings):
    """Its embeddings are longer than the base's: aligned by token as whole models are, and it is its tokenizer that counts."""
    words, config = tokenizer(), tf.LlamaConfig(**SMALL, vocab_size=len(WORDS), tie_word_embeddings=tied)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    words.add_tokens(["<one>", "<two>"])
    settings = {"target_modules": ["q_proj"], **settings}
    trained = tuned(tf.LlamaForCausalLM, tmp_path / "base", tmp_path / "ad", settings, words)
    ids = torch.tensor([[3, len(WORDS), 4, len(WORDS) + 1, 5]])
    task = Task(tmp_path / "ad")
    if tied and settings != {"target_modules": ["q_proj"]}:
        with pytest.raises(ValueError, match="untie the base: load it"):
            merge(tmp_path / "base", [task], method="averaging")
        return
    with pytest.raises(
        ValueError, match=r"vocabulary of ad .20 tokens. differs from the base's .18.: 2 are added"
    ):
        merge(tmp_path / "base", [task], method="averaging")
    merge(tmp_path / "base", [task], method="averaging", embeddings="union", out=tmp_path / "union")
    merge(tmp_path / "ad", [task], method="averaging", out=tmp_path / "itself")
    for out in ("union", "itself"):
        loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / out)
        logits = trained(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)
        assert tf.AutoTokenizer.from_pretrained(tmp_path / out).get_vocab() == words.get_vocab()
    short = merge(tmp_path / "base", [task], method="averaging", embeddings="intersect")
    embedding = trained.get_input_embeddings().weight
    expected = open_checkpoint(tmp_path / "ad")["model.embed_tokens.weight"][: len(WORDS)]
    torch.testing.assert_close(short["model.embed_tokens.weight"], expected)
    assert len(embedding) == len(WORDS) + 2
    (tmp_path / "d.txt").write_text("<one> <two>\n")
    command = f"estimate {tmp_path}/ad --data {tmp_path}/d.txt -o {tmp_path}/c.safetensors --quiet"
    assert run(f"{command} --method empirical_fisher") == 0
    assert Curvature.load(tmp_path / "c.safetensors").mean("model.embed_tokens.weight")[len(WORDS) :].any()


BASES = {  # what the config names, what is given -> words of the note and of the warning
    "itself": ("base", "base", "", ""),
    "by another path": ("base", "link", "", ""),
    "a copy": ("base", "copy", "", ""),
    "in half precision": ("base", "half", "", ""),
    "as a module": ("base", "module", "", ""),
    "the snapshot of its id": ("me/base", "models--me--base/snapshots/" + 40 * "a", "", ""),
    "a folder of that name": ("me/base", "base", "", ""),
    "not to be found": ("me/gone", "base", "'me/gone' is not here", ""),
    "others' weights": (
        "base",
        "other",
        r"trained on 'base'.* on 'other', whose weights differ",
        "weights differ",
    ),
    "others' weights, as a module": (
        "other",
        "module",
        "'LlamaForCausalLM', whose weights differ",
        "weights differ",
    ),
    "another id": (
        "me/gone",
        "models--me--base/snapshots/" + 40 * "a",
        r"'me/gone'.* on 'me/base@aaa",
        "'me/gone'",
    ),
    "an adapter": ("adapter0", "base", r"on 'adapter0'.* on 'base', whose weights differ", "weights differ"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    make(folder, *CASES["plain"])
    base = tf.LlamaForCausalLM.from_pretrained(folder / "base")
    base.half().save_pretrained(folder / "half")
    llama().save_pretrained(folder / "other")
    (folder / "link").symlink_to(folder / "base")
    for copy in ("copy", "models--me--base/snapshots/" + 40 * "a"):
        shutil.copytree(folder / "base", folder / copy)
    return folder


@pytest.mark.parametrize("case", BASES)
def test_an_adapter_on_another_base_than_its_own_is_told(bases, tmp_path, recwarn, case):
    named, given, note, warned = BASES[case]
    folder = shutil.copytree(bases / "adapter0", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = named if "/" in named else str(bases / named)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = tf.LlamaForCausalLM.from_pretrained(bases / "base") if given == "module" else bases / given
    notes = merge(base, [Task(folder)], method="averaging").report.notes
    said = [text for text in notes if "was trained on" in text]
    assert len(said) == bool(note), notes
    assert all(re.search(note, text) and str(bases) not in text for text in said), notes
    texts = [str(one.message) for one in recwarn if "was trained on" in str(one.message)]
    assert len(texts) == bool(warned), texts
    assert all(warned in text for text in texts), texts


@pytest.mark.parametrize("targets", [["lm_head"], ["wte", "lm_head"]])
@pytest.mark.parametrize("memory", [True, False])
def test_adapters_of_tied_weights_are_refused(tmp_path, targets, memory):
    make(tmp_path, gpt2, {"target_modules": targets, "r": 2, "fan_in_fan_out": False})
    given = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "base") if memory else tmp_path / "base"
    base = open_checkpoint(given)
    with pytest.raises(ValueError, match=r"is tied to another tensor .* untie the base"):
        open_checkpoint(tmp_path / "adapter0", base=base)


def test_an_adapters_file_in_place_of_its_folder_is_named(plain):
    with pytest.raises(ValueError, match="holds an adapter's factors alone; name the folder"):
        merge(plain / "base", [Task(plain / "adapter0" / "adapter_model.safetensors")], method="averaging")


def test_a_module_with_adapters_is_refused_by_what_it_is():
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PeftModel has adapters beside its weights: pass the folder"):
        merge(llama(), [Task(model)], method="averaging")
    assert merge(llama(), [Task(model.merge_and_unload())], method="averaging")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """base/, adapter0/ and adapter1/ of it, merged0/ as peft merges it, a tokenizer in each of base and merged, data.jsonl."""
    folder = tmp_path_factory.mktemp("trained")
    config = tf.LlamaConfig(**SMALL, vocab_size=len(WORDS), tie_word_embeddings=False)
    for seed in (0, 1):
        make(folder, lambda: tf.LlamaForCausalLM(config), CASES["plain"][1], seed)
    base = tf.LlamaForCausalLM.from_pretrained(folder / "base")
    peft.PeftModel.from_pretrained(base, folder / "adapter0").merge_and_unload().save_pretrained(
        folder / "merged0"
    )
    for name in ("base", "merged0"):
        tokenizer().save_pretrained(folder / name)
    rows = [" ".join(WORDS[3 + (n + k) % 15] for k in range(4)) for n in range(6)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def estimated(trained, name, out, options=""):
    line = f"estimate {name} --data {trained}/data.jsonl -o {out} --quiet {options}"
    assert run(f"{line} --method empirical_fisher") == 0
    return Curvature.load(out)


def test_the_curvature_of_an_adapter_is_that_of_the_merged_model_and_serves_in_a_merge(
    trained, tmp_path, capsys
):
    expected = estimated(trained, trained / "merged0", tmp_path / "merged.safetensors")
    for n, name in enumerate((trained / "adapter0", f"{trained / 'base'}+{trained / 'adapter0'}")):
        curvature = estimated(trained, name, tmp_path / f"{n}.safetensors")
        assert set(curvature) == set(expected)
        for name in expected:
            torch.testing.assert_close(curvature.mean(name), expected.mean(name), rtol=1e-3, atol=1e-7)
    assert "is an adapter: it is measured with its base" in capsys.readouterr().err
    one, other = (
        merge(trained / "base", [Task(trained / model, tmp_path / file, 0.7)], base_curvature=1.0)
        for model, file in (("adapter0", "0.safetensors"), ("merged0", "merged.safetensors"))
    )
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6)


def test_the_curvature_of_the_factors_alone(trained, tmp_path):
    found = estimated(trained, trained / "adapter0", tmp_path / "f.safetensors", "--on factors")
    assert len(found) == len(load_file(trained / "adapter0" / "adapter_model.safetensors"))
    assert all(".lora_" in name for name in found)
    with pytest.raises(ValueError, match=r"has no block for|another model|belongs to another"):
        merge(trained / "base", [Task(trained / "adapter0", found)], base_curvature=1.0)


@pytest.mark.parametrize("theirs", [True, False])
def test_adapters_in_recipes(trained, tmp_path, theirs):
    """Whole models named as base+adapter, without a base; what is written loads, with the tokenizer of the base."""
    names = [f"base+adapter{seed}" for seed in (0, 1)]
    ours = {"base": names[0], "method": "linear", "tasks": [{"model": name, "weight": 0.5} for name in names]}
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    recipe = {"merge_method": "linear", "models": models} if theirs else ours
    (trained / "recipe.yml").write_text(json.dumps(recipe))
    merge(**load_recipe(trained / "recipe.yml"), out=tmp_path / "out")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    one, two = (open_checkpoint(trained / f"adapter{seed}") for seed in (0, 1))
    for name in one:
        torch.testing.assert_close(loaded[name], (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer().get_vocab()


def test_inspect_says_what_an_adapter_is(trained, capsys):
    assert run(f"inspect {trained}/adapter0") == 0
    said = capsys.readouterr().out
    base = f"base: {trained / 'base'}"
    for text in ("adapter: LORA", base, "rank: 3", "targets: down_proj, q_proj", "lora_A.weight"):
        assert text in said
    assert "cannot be merged" not in said
