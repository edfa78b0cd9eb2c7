"""Mixtures of ffns that transformers loads by itself: identity for every target, what is held of a family, what is lost, mergekit-moe's recipes."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file, save_file

from gradmatch import GradmatchError, open_checkpoint
from gradmatch.mixture import load as load_mixture_module
from gradmatch.mixture import mix
from gradmatch.mixture.prompts import gate_vectors, seen_vectors
from gradmatch.mixture.request import Prompts
from gradmatch.models.loading import load
from gradmatch.recipes.mixture import load_mixture
from tests.command import run
from tests.gradmatch.mixture.models import IDS, PROMPTS, SMALL, decoder, family, logits, moved, save

YAML = os.environ.get("GRADMATCH_MERGEKIT") or shutil.which("mergekit-yaml")
MERGEKIT = Path(YAML).with_name("mergekit-moe") if YAML else None
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": tf.LlamaConfig(**SMALL, rms_norm_eps=1e-3),
    "llama, tied, scaled rope": tf.LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=ROPE),
    "llama, wide heads": tf.LlamaConfig(**SMALL, head_dim=8),
    "mistral, window": tf.MistralConfig(**SMALL, sliding_window=4),
    "qwen2, tied, half windows": tf.Qwen2Config(**SMALL, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": tf.Qwen3Config(**SMALL, head_dim=8),
    "qwen3, biases": tf.Qwen3Config(**SMALL, head_dim=8, attention_bias=True),
}  # fmt: skip
CASES = [
    (family, form, top_k, dense)
    for family in FAMILIES
    for form, top_k, dense in (("auto", 2, 0), ("auto", 1, [0]), ("qwen2_moe", 3, 0))
    if not (family.startswith("qwen3") and form == "qwen2_moe")
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """base and three experts that differ from it everywhere."""
    return family(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])


@pytest.mark.parametrize(("name", "form", "top_k", "dense"), CASES)
def test_identical_experts_are_the_dense_model(name, form, top_k, dense, tmp_path):
    base = decoder(FAMILIES[name])
    path = save(base, tmp_path / "base")
    mix(
        path, [path] * 4, top_k=top_k, dense_layers=dense, form=form, gate_mode="random", out=tmp_path / "out"
    )
    mixture, told = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(logits(mixture, IDS), logits(base, IDS), atol=1e-5, rtol=1e-4)
    assert mixture.config.tie_word_embeddings == base.config.tie_word_embeddings
    gates = [name for name, _ in mixture.named_parameters() if name.endswith("mlp.gate.weight")]
    assert gates == [f"model.layers.{n}.mlp.gate.weight" for n in range(2) if not dense or n not in dense]
    if "moe" in mixture.config.model_type:  # the unselected mass counts: the test bites
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["norm_topk_prob"] is True
        assert config["mlp_only_layers"] == (dense or [])
        (tmp_path / "out/config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))
        other = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert (logits(other, IDS) - logits(base, IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["mixtral", "qwen2_moe"])
def test_experts_are_the_sources_bit_by_bit_and_a_missing_one_is_no_random_one(llama, form, tmp_path):
    base, experts = llama
    out = tmp_path / "out"
    mix(base, experts, prompts=PROMPTS, form=form, out=out)
    mixture = tf.AutoModelForCausalLM.from_pretrained(out)
    for number, path in enumerate(experts):
        source = load_file(Path(path) / "model.safetensors")
        fused = mixture.model.layers[1].mlp.experts
        parts = [source[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up")]
        torch.testing.assert_close(fused.gate_up_proj[number], torch.cat(parts), atol=0, rtol=0)
        torch.testing.assert_close(
            fused.down_proj[number], source["model.layers.1.mlp.down_proj.weight"], atol=0, rtol=0
        )
    shard = next(out.glob("model-*.safetensors"))
    held = load_file(shard)
    gone = next(name for name in held if ".experts.2." in name)
    save_file({name: value for name, value in held.items() if name != gone}, shard)
    with pytest.raises(GradmatchError, match="does not"):
        load(open_checkpoint(out))


def test_what_is_not_mixed_is_merged_by_any_rule_and_the_report_says_what_is_lost(tmp_path):
    base = decoder(FAMILIES["llama"])
    parts = {"norm": "input_layernorm", "attention": "self_attn", "ffn": "mlp"}
    paths = {name: save(moved(base, 3, part), tmp_path / name) for name, part in parts.items()}
    path = save(base, tmp_path / "base")
    with pytest.warns(UserWarning, match="norm equals the base in every ffn"):
        made = mix(
            path, list(paths.values()), gate_mode="random", out=tmp_path / "out", method="task_arithmetic"
        ).report
    state = {name: value.clone() for name, value in base.state_dict().items()}
    for lost, part in (("norm", "input_layernorm"), ("attention", "self_attn")):
        theta = load_file(Path(paths[lost]) / "model.safetensors")
        name = next(name for name in state if part in name)
        written = open_checkpoint(tmp_path / "out")[name]
        torch.testing.assert_close(written, state[name] + (theta[name] - state[name]) / 3)
    assert made.lost["ffn"]["mixed"] > 0
    assert made.lost["norm"]["mixed"] == 0
    assert "self_attn" in made.lost["attention"]["most"]
    assert any("outside the ffns" in note and "norm" in note for note in made.notes)
    kept = mix(
        path, list(paths.values()), gate_mode="random", out=tmp_path / "base-outside", method="base"
    ).report
    theta, key = load_file(Path(paths["norm"]) / "model.safetensors"), "input_layernorm"
    away = sum((theta[n] - state[n]).square().sum() for n in state if key in n) ** 0.5
    assert kept.lost["norm"]["lost"] == pytest.approx(float(away), rel=1e-5)
    for name, value in load_file(Path(path) / "model.safetensors").items():
        if ".mlp." not in name:
            assert torch.equal(open_checkpoint(tmp_path / "base-outside")[name], value)


def test_biases_of_qwen2_stay_bit_by_bit_and_llama_gets_none(llama, tmp_path):
    base, experts = family(tmp_path, tf.Qwen2Config(**SMALL), 2, "mlp")
    mix(base, experts, prompts=PROMPTS[:2], out=tmp_path / "out")
    source = load_file(Path(base) / "model.safetensors")
    made = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(made[name], source[name]) for name in source if ".mlp." not in name)
    mix(llama[0], llama[1], prompts=PROMPTS, form="qwen2_moe", out=tmp_path / "plain")
    assert json.loads((tmp_path / "plain/config.json").read_text())["qkv_bias"] is False


def test_a_lora_adapter_is_an_expert(llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tf.AutoModelForCausalLM.from_pretrained(llama[0])
    adapted = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=6, target_modules=["gate_proj", "up_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    mix(llama[0], [llama[0], str(tmp_path / "adapter")], gate_mode="random", out=tmp_path / "out")
    whole = adapted.merge_and_unload().state_dict()
    made = open_checkpoint(tmp_path / "out")
    for projection, short in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        found = made[f"model.layers.1.block_sparse_moe.experts.1.{short}.weight"]
        torch.testing.assert_close(found, whole[f"model.layers.1.mlp.{projection}_proj.weight"])


def test_rows_of_every_gate_mode_by_hand(llama):
    base, texts = open_checkpoint(llama[0]), ["sum two", "two plus three"]
    prompts = [Prompts.of({"positive": texts, "negative": ["a king"]}), Prompts.of(["once"])]
    sizes = {"layers": 2, "width": 16}
    model = load(base).to(torch.bfloat16).eval()
    words = {
        w: n
        for n, w in enumerate(json.loads((Path(llama[0]) / "tokenizer.json").read_text())["model"]["vocab"])
    }

    def numbers(text):
        return [0, *(words[word] for word in text.split())]

    def unit(row):
        return row / row.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def last(text):
        states = model(torch.tensor([numbers(text)]), output_hidden_states=True).hidden_states[:-1]
        return torch.stack(states)[:, 0, -1]

    # one prompt at a time, so that no padding takes part but the left one of the shorter text, which a mask hides
    by_hand = unit((last(texts[0]) + last(texts[1])) / 2 - last("a king"))
    rows = gate_vectors(base, ["a", "b"], prompts, "hidden", **sizes)
    torch.testing.assert_close(rows[:, 0].float(), by_hand.float(), atol=0.03, rtol=0)  # bfloat16
    assert torch.equal(rows, gate_vectors(base, ["a", "b"], prompts, "hidden_last", **sizes))
    embedding = base["model.embed_tokens.weight"]
    cheap = [unit(sum(embedding[numbers(text)].sum(0) for text in some)) for some in (texts, ["a king"])]
    rows = gate_vectors(base, ["a", "b"], prompts, "cheap_embed", **sizes)
    torch.testing.assert_close(rows[1, 0], unit(cheap[0] - cheap[1]))
    torch.testing.assert_close(rows[0, 0], rows[1, 0])
    torch.testing.assert_close(rows[0, 1], unit(embedding[numbers("once")].sum(0)))
    normal = gate_vectors(base, ["a"] * 50, None, "random", **sizes)
    assert normal.shape == (2, 50, 16)
    assert normal.std() == pytest.approx(1, rel=0.1)
    flat = gate_vectors(base, ["a"] * 50, None, "uniform_random", **sizes)
    assert 0.24 < flat.abs().max() <= 0.25
    assert torch.equal(normal, gate_vectors(base, ["a"] * 50, None, "random", **sizes))
    # what the router sees: the ffn's input, mean over tokens, centred over the experts
    module, seen = load(base).eval(), []
    module.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    means = []
    for some in (["sum two", "two plus three"], ["a king"], ["once"]):
        seen.clear()
        for text in some:
            module(torch.tensor([numbers(text)[1:]]))
        means.append(torch.cat([s[0] for s in seen]).mean(0))
    v = torch.stack([means[0] - means[1], means[2]])
    places = ["model.layers.0.mlp", "model.layers.1.mlp"]
    torch.testing.assert_close(
        seen_vectors(load(base), places, base, ["a", "b"], prompts)[1], unit(v - v.mean(0))
    )


RECIPES = {
    "hidden": {"gate_mode": "hidden"},
    "three prompts, negative ones": {"gate_mode": "hidden_avg", "negative": ["a queen"]},
    "cheap": {"gate_mode": "cheap_embed", "experts_per_token": 1},
    "scaled, bfloat16": {"gate_mode": "cheap_embed", "dtype": "bfloat16", "residual_scale": 0.3},
    "shared": {"gate_mode": "hidden", "shared": 1},
    "qwen3": {"gate_mode": "hidden", "family": "qwen3"},  # its biases are lost by theirs
    "qwen2": {"gate_mode": "hidden_last", "family": "qwen2, tied, half windows", "shared": 1},
}


def moe_recipe(base, experts, gate_mode="hidden", negative=None, residual_scale=None, shared=False, **top):
    listed = [
        {"source_model": path, "positive_prompts": some} for path, some in zip(experts, PROMPTS, strict=False)
    ]
    for one in listed:
        one |= {"negative_prompts": negative} if negative else {}
        one |= {"residual_scale": residual_scale} if residual_scale else {}
    content = {"base_model": base, "gate_mode": gate_mode, "experts": listed, **top}
    if shared:
        content["experts"] = listed[:2]  # mergekit-moe opens it only where it is an expert too
        content["shared_experts"] = [{**listed[shared], "positive_prompts": ["time"]}]
    return content


@pytest.mark.skipif(not MERGEKIT or not MERGEKIT.exists(), reason="mergekit-moe is not installed")
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_mergekit_moe_give_its_output(name, llama, tmp_path):
    given = dict(RECIPES[name])
    kind = given.pop("family", None)
    base, experts = family(tmp_path / "models", FAMILIES[kind]) if kind else llama
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(moe_recipe(base, experts, **given)))
    subprocess.run(
        [MERGEKIT, recipe, tmp_path / "theirs", "--device", "cpu"],
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert run(f"mix {recipe} {tmp_path / 'ours'} --quiet") == 0
    mine, theirs = (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / one).state_dict() for one in ("ours", "theirs")
    )
    assert set(mine) <= set(theirs)
    for key, value in theirs.items():
        if key not in mine:  # where a family has no biases they write zeros
            assert "_proj.bias" in key
            assert not value.any()
            continue
        close = {"atol": 1e-6, "rtol": 0} if "gate.weight" in key else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(mine[key], value, **close)


REFUSED = [  # changes of a recipe that works, words of the message
    ({"expert": {"positive_prompt": ["x"]}}, "unknown key 'positive_prompt' of an expert (did you mean 'positive_prompts'?)"),
    ({"gate_modes": "hidden"}, "unknown key 'gate_modes' of a recipe of mergekit-moe (did you mean 'gate_mode'?)"),
    ({"gate_mode": "mlp"}, "gate_mode is 'mlp'"),
    ({"expert": {"positive_prompts": None, "negative_prompts": ["the king"]}}, "no positive prompts"),
    ({"expert": {"positive_prompts": []}}, "no positive prompts"),
    ({"expert": {"positive_prompts": [" "]}}, "is empty"),
    ({"expert": {"positive_prompts": ["the king " * 40]}}, "and {base} takes 32; shorten it"),
    ({"experts_per_token": 5}, "top_k is 5, and there are 3 experts"),
    ({"experts_per_token": 0}, "top_k is 0"),
    ({"architecture": "deepseek"}, "trust_remote_code"),
    ({"architecture": "mixtrl"}, "architecture is 'mixtrl' (did you mean 'mixtral'?)"),
    ({"architecture": "qwen3"}, "qwen3_moe holds mixtures of qwen3, not of llama"),
    ({"same": True}, "the prompts of all experts are the same"),
    ({"one": True}, "all experts are"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_recipes_that_mean_nothing_are_refused_by_name(change, words, llama, tmp_path, capsys):
    base, experts = llama
    content = moe_recipe(base, experts)
    change = dict(change)
    own = change.pop("expert", {})
    content["experts"][1] = {k: v for k, v in {**content["experts"][1], **own}.items() if v is not None}
    for one in content["experts"]:
        one |= {"positive_prompts": ["king"]} if change.get("same") else {}
        one |= {"source_model": experts[0]} if change.get("one") else {}
    content |= {k: v for k, v in change.items() if k not in ("same", "one")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert run(f"mix {tmp_path / 'r.yaml'} {tmp_path / 'out'} --quiet") == 2
    assert words.replace("{base}", base) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shared_source_that_is_used_nowhere_else_builds(llama, tmp_path):
    base, experts = llama
    content = moe_recipe(base, experts, shared=2, gate_mode="random")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    first, second = (
        load_file(mix(**load_mixture(tmp_path / "r.yaml"), out=tmp_path / o).folder / "router.safetensors")
        for o in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)  # the same seed, the same bytes
    source = load_file(Path(experts[2]) / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(
        open_checkpoint(tmp_path / "a")["model.layers.0.mlp.shared_expert.up_proj.weight"], source
    )


def test_near_equal_prompts_are_told(llama, tmp_path):
    base, experts = llama
    with pytest.warns(UserWarning, match="e0 and e1 have the same prompts"):
        report = mix(base, experts, prompts=[["king"], ["king"], ["sum two"]], out=tmp_path / "out").report
    assert any("condition number" in note and "e0 and e1" in note for note in report.notes)


def models_that_differ(llama, tmp_path):
    wide = save(decoder(tf.LlamaConfig(**{**SMALL, "intermediate_size": 32})), tmp_path / "wide")
    words = save(decoder(tf.LlamaConfig(**{**SMALL, "vocab_size": 70})), tmp_path / "words")
    deep = save(decoder(tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 3})), tmp_path / "deep")
    other = save(decoder(tf.MistralConfig(**SMALL)), tmp_path / "other")
    biased = save(decoder(tf.LlamaConfig(**SMALL, attention_bias=True)), tmp_path / "biased")
    gemma = save(decoder(tf.GemmaConfig(**SMALL, head_dim=8)), tmp_path / "gemma")
    tied = decoder(tf.LlamaConfig(**SMALL))
    tied.config.update({"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]})
    tied.config.save_pretrained(tmp_path / "tied")
    save_file(
        {name: value.contiguous() for name, value in tied.state_dict().items()},
        tmp_path / "tied/model.safetensors",
    )
    base = llama[0]
    return [
        ((base, [base, wide]), {}, "of any width"),
        ((base, [base, words]), {}, "their vocabularies differ"),
        ((base, [base, deep]), {}, "which the base lacks"),
        ((base, [base, other]), {}, "the base a llama"),
        ((base, [base]), {}, "at least two experts"),
        ((base, llama[1]), {"prompts": PROMPTS[:2]}, "prompts has 2 entries"),
        ((base, llama[1]), {"top_k": 4}, "top_k is 4"),
        ((base, llama[1]), {"dense_layers": 2}, "leave at least one to mix"),
        ((base, llama[1]), {"dense_layers": [0], "form": "mixtral"}, "cannot leave [0] dense; qwen2_moe can"),
        ((base, llama[1]), {"level": "fnn"}, "did you mean 'ffn'"),
        ((base, llama[1]), {"method": "base", "density": 0.5}, "density plays no role"),
        ((base, llama[1]), {"rank": 2}, "router='spectral'"),
        ((base, llama[1]), {"dtype": "bf16"}, "did you mean 'bfloat16'"),
        ((base, llama[1]), {"prompts": "abc"}, "give a list of texts"),
        ((biased, [biased, biased]), {"form": "mixtral"}, "mixtral has no place for 'model.layers.0.self_attn.k_proj.bias'"),
        ((biased, [biased, biased]), {"form": "qwen2_moe"}, "o_proj.bias"),
        ((gemma, [gemma, gemma]), {"form": "mixtral"}, "not of gemma"),
        ((str(tmp_path / "tied"), [base, base]), {}, "'lm_head.weight' differs from 'model.embed_tokens.weight'"),
    ]  # fmt: skip


def test_models_that_do_not_go_together_are_refused_by_name(llama, tmp_path):
    for arguments, options, words in models_that_differ(llama, tmp_path):
        with pytest.raises(GradmatchError) as error:
            mix(*arguments, gate_mode=options.pop("gate_mode", "random"), out=tmp_path / "out", **options)
        assert words in str(error.value), (words, str(error.value))
    with pytest.raises(FileExistsError):
        mix(*llama, out=llama[0])


def test_modules_in_memory_are_mixed_as_their_folders_are(llama, tmp_path):
    base = decoder(tf.LlamaConfig(**SMALL))  # its config was never saved, and names no architecture
    experts = [moved(base, 1), moved(base, 2)]
    mixture = mix(base, experts, gate_mode="random")
    paths = [save(one, tmp_path / str(n)) for n, one in enumerate([base, *experts])]
    other = mix(paths[0], paths[1:], gate_mode="random")
    assert torch.equal(logits(mixture, IDS), logits(other, IDS))
    own = mix(base, experts, gate_mode="random", form="own")
    torch.testing.assert_close(
        logits(own, IDS), logits(mix(paths[0], paths[1:], gate_mode="random", form="own"), IDS)
    )


def test_either_layout_on_disk_is_read_the_same(llama, tmp_path):
    base, experts = llama
    mix(base, experts, prompts=PROMPTS, out=tmp_path / "apart")
    module = load(open_checkpoint(tmp_path / "apart"))
    fused = {name: value.contiguous() for name, value in module.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    (tmp_path / "fused").mkdir()
    save_file(fused, tmp_path / "fused/model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tmp_path / "apart/config.json", tmp_path / "fused/config.json")
    for reader in (load_mixture_module, tf.AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(reader(tmp_path / "fused"), IDS), logits(module, IDS))


def test_a_recipe_of_ours_and_flags(llama, tmp_path, capsys):
    base, experts = llama
    listed = [{"model": path, "positive_prompts": some} for path, some in zip(experts, PROMPTS, strict=True)]
    content = {"base": base, "experts": listed, "method": "ties", "options": {"density": 0.5}, "top_k": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert run(f"mix {tmp_path / 'r.yaml'} {tmp_path / 'out'} --top-k 2 --json --quiet") == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["settings"]["top_k"] == 2
    assert report["settings"]["method"] == "ties"
    assert report["form"] == "mixtral"
    card = json.loads((tmp_path / "out/gradmatch.json").read_text())
    assert str(tmp_path) not in json.dumps(card)
    assert set(card["inputs"]) == {"e0", "e1", "e2"}
    assert (tmp_path / "out/tokenizer.json").exists()
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**content, "routr": "linear"}))
    assert run(f"mix {tmp_path / 'bad.yaml'} {tmp_path / 'o'}") == 2
    assert "unknown key 'routr' of the recipe (did you mean 'router'?)" in capsys.readouterr().err
