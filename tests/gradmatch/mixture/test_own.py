"""Mixtures of gradmatch's own form: identity at every level, neighbours and padding, caches, what is computed, spectral and low-rank experts."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from gradmatch import GradmatchError, Task, merge
from gradmatch.mixture import load, mix
from gradmatch.mixture.modules import Mixed
from tests.command import run
from tests.gradmatch.mixture.models import IDS, PROMPTS, SMALL, drawn, logits, moved, save

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 32}
KINDS = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=3)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32)),
    "llama with biases": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SMALL, head_dim=8)),
}  # fmt: skip
WAYS = [  # level, routing, router, top_k, dense_layers, rank
    ("ffn", "token", "mlp", 2, 1, None),
    ("ffn", "sample", "linear", 1, 0, None),
    ("block", "token", "linear", 2, 0, None),
    ("block", "sample", "spectral", 1, 0, None),
    ("model", "sample", "mlp", 1, 1, None),
    ("model", "token", "linear", 2, 0, None),
    ("block", "token", "spectral", 1, 0, 4),
]
ENCODERS = ("bert", "vit")
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (module, its folder, three fine-tunes' folders)."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for kind, make in KINDS.items():
        base = drawn(make())
        tuned = [save(moved(base, seed, scale=0.3), folder / kind / f"e{seed}") for seed in (1, 2, 3)]
        found[kind] = base, save(base, folder / kind / "base"), tuned
    return found


def batch_of(kind):
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS, "attention_mask": MASK}


def held_by(module, name):
    return sum(value.numel() for key, value in module.named_buffers() if key.endswith(name))


@torch.no_grad()
def answer(module, batch):
    found = module(**batch).logits
    return found[batch["attention_mask"] == 1] if found.dim() == 3 else found


@pytest.mark.parametrize("kind", KINDS)
def test_identical_experts_are_the_dense_model(kind, models, tmp_path):
    base, path, _ = models[kind]
    for number, (level, routing, router, top_k, dense, rank) in enumerate(WAYS):
        if kind in ENCODERS and (level, routing) == ("model", "token"):
            continue
        out = tmp_path / str(number)
        made = mix(
            path, [path] * 3, level, routing, router, top_k, dense, rank=rank, form="own", out=out
        ).report
        mixture = load(out)
        torch.testing.assert_close(
            answer(mixture, batch_of(kind)), answer(base, batch_of(kind)), atol=1e-5, rtol=1e-4
        )
        if not rank:
            assert (
                made.weights["output"] < 1.25 * made.weights["base"]
            )  # what the experts share is stored once
            held = sum(p.numel() for p in mixture.parameters())  # and held once in memory
            assert held == made.weights["output"] - (
                0 if router != "spectral" else held_by(mixture, "router.v")
            )
        if kind not in ENCODERS:
            texts = [
                m.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=1) for m in (base, mixture)
            ]
            assert torch.equal(*texts)


@pytest.mark.parametrize("way", WAYS[:6])
def test_an_answer_depends_on_no_neighbour_and_on_no_padding_and_a_cache_changes_nothing(
    way, models, tmp_path
):
    _, path, tuned = models["gpt2"]
    level, routing, router, top_k, dense, rank = way
    mix(
        path,
        tuned,
        level,
        routing,
        router,
        top_k,
        dense,
        prompts=PROMPTS,
        rank=rank,
        form="own",
        out=tmp_path / "out",
    )
    mixture = load(tmp_path / "out")
    together = logits(mixture, IDS, attention_mask=MASK)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = logits(mixture, IDS[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-4)
    # token by token with a cache: after the prompt, a sample's choice holds
    with torch.no_grad():
        first = mixture(input_ids=IDS[:, :5], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for place in range(5, 9):
            found = mixture(input_ids=IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
            steps.append(found.logits)
            cache = found.past_key_values
    if routing == "token":
        torch.testing.assert_close(torch.cat(steps, 1), logits(mixture, IDS), atol=1e-5, rtol=1e-4)
    made = mixture.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(made[:, 5], first.logits[:, -1].argmax(-1))
    beams = mixture.generate(IDS[:, :5], max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)
    assert beams.shape == (2, 8)
    # left padding, as a batch of prompts has it
    padded = torch.cat([torch.full((2, 3), 1), IDS[:, :5]], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 5)], 1).long()
    again = mixture.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again[:, 8:], made[:, 5:])


@pytest.mark.parametrize("level", ["ffn", "block", "model"])
def test_what_a_router_chose_is_all_that_is_computed_and_is_that_expert(level, models, tmp_path):
    base, path, _ = models["bert"]
    only = [
        save(
            moved(
                base,
                seed,
                "encoder.layer.1" if level == "block" else "layer.1.intermediate" if level == "ffn" else "",
                0.3,
            ),
            tmp_path / f"o{seed}",
        )
        for seed in (1, 2)
    ]
    mix(
        path,
        only,
        level,
        "sample",
        "linear",
        1,
        0 if level == "model" else 1,
        form="own",
        out=tmp_path / "out",
    )
    mixture = load(tmp_path / "out")
    gate = mixture.gate if level == "model" else next(m for m in mixture.modules() if isinstance(m, Mixed))
    count = [0, 0]
    for number, expert in enumerate((mixture if level == "model" else gate).experts):
        expert.register_forward_hook(lambda *_, n=number: count.__setitem__(n, count[n] + 1))
    wanted = [
        answer(tf.AutoModelForSequenceClassification.from_pretrained(p).eval(), batch_of("bert"))
        for p in only
    ]
    for number, sign in ((0, 1), (1, -1)):
        count[:] = 0, 0
        with torch.no_grad():  # a router that always says the same: x has a part that is never 0
            gate.router.weight.zero_()
            gate._scores = lambda x, mask, s=sign: torch.tensor([s, -s]).expand(len(x), 1, 2).float()
        torch.testing.assert_close(answer(mixture, batch_of("bert")), wanted[number], atol=1e-5, rtol=1e-4)
        assert count == [1 - number, number]
    gate._scores = lambda x, mask: torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]])  # each row its own
    found = answer(mixture, batch_of("bert"))
    torch.testing.assert_close(found[0], wanted[0][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], wanted[1][1], atol=1e-5, rtol=1e-4)


def test_experts_may_be_models_of_another_architecture_with_the_same_labels(models, tmp_path):
    _, path, tuned = models["bert"]
    small = {**TEXT, "hidden_size": 8, "num_hidden_layers": 1}
    other = save(
        drawn(tf.BertForSequenceClassification(tf.BertConfig(**small, num_labels=3)), 5), tmp_path / "small"
    )
    third = save(
        drawn(
            tf.DistilBertForSequenceClassification(
                tf.DistilBertConfig(vocab_size=64, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3)
            ),
            6,
        ),
        tmp_path / "third",
    )
    assert mix(
        path, [tuned[0], other], "model", "sample", prompts=PROMPTS[:2], out=tmp_path / "two"
    ).report.experts == ["e1", "small"]
    mix(path, [tuned[0], other, third], "model", "sample", prompts=PROMPTS, out=tmp_path / "out")
    mixture = load(tmp_path / "out")
    for number, folder in enumerate((tuned[0], other, third)):
        mixture.gate._scores = lambda x, mask, n=number: torch.eye(3)[n].expand(len(x), 1, 3)
        whole = tf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        torch.testing.assert_close(
            answer(mixture, batch_of("bert")), answer(whole, batch_of("bert")), atol=1e-5, rtol=1e-4
        )


def test_adapters_of_one_base_share_what_they_do_not_change(models, tmp_path):
    from peft import LoraConfig, get_peft_model

    _, path, _ = models["gpt2"]
    for seed in (1, 2):
        adapted = get_peft_model(
            tf.AutoModelForCausalLM.from_pretrained(path),
            LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True),
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
        adapted.save_pretrained(tmp_path / f"a{seed}")
    made = mix(
        path,
        [str(tmp_path / "a1"), str(tmp_path / "a2")],
        "model",
        "sample",
        prompts=PROMPTS[:2],
        out=tmp_path / "out",
    ).report
    assert made.weights["output"] < 1.6 * made.weights["base"]
    mixture = load(tmp_path / "out")
    assert mixture.experts[0].transformer.wte.weight is mixture.experts[1].transformer.wte.weight
    mixture.gate._scores = lambda x, mask: torch.tensor([-1.0, 1.0]).expand(len(x), 1, 2)
    torch.testing.assert_close(
        logits(mixture, IDS), logits(adapted.merge_and_unload(), IDS), atol=1e-5, rtol=1e-4
    )


def test_low_rank_experts_at_full_rank_are_the_experts(models, tmp_path):
    base, path, _ = models["bert"]
    part = "encoder.layer"
    tuned = moved(base, 1, "dense", 0.3)  # linear layers and their biases, in the layers and the pooler
    with torch.no_grad():
        for name, value in base.named_parameters():
            if part not in name or "LayerNorm" in name:
                tuned.get_parameter(name).copy_(value)
    expert = save(tuned, tmp_path / "e")
    made = mix(path, [expert, path], "block", "token", "spectral", 1, rank=24, out=tmp_path / "out").report
    torch.testing.assert_close(
        answer(load(tmp_path / "out"), batch_of("bert")),
        answer(tuned, batch_of("bert")),
        atol=1e-4,
        rtol=1e-3,
    )
    assert any("holds 100.0%" in note for note in made.notes)
    assert any(
        "base does not differ" in note for note in made.notes
    )  # it is chosen nowhere, by no noise either
    near = moved(base, 3, "dense", 1e-6)
    mix(
        path,
        [expert, save(near, tmp_path / "near")],
        "block",
        "token",
        "spectral",
        1,
        rank=24,
        out=tmp_path / "again",
    )
    torch.testing.assert_close(
        answer(load(tmp_path / "again"), batch_of("bert")),
        answer(tuned, batch_of("bert")),
        atol=1e-4,
        rtol=1e-3,
    )
    small = mix(
        path, models["bert"][2], "block", "sample", "spectral", rank=1, gate_rank=1, out=tmp_path / "small"
    ).report
    assert 1 < small.weights["output"] / small.weights["base"] < 1.6
    with pytest.warns(UserWarning, match="all scores are equal"):
        mix(path, models["bert"][2], "ffn", router="spectral", gate_rank=16, out=tmp_path / "full")


def test_a_spectral_router_finds_the_expert_that_an_input_moves(models, tmp_path):
    _, path, _ = models["neox"]
    tuned = []
    for seed in (1, 2):  # the ffn of each moves along one direction of its input
        one = drawn(KINDS["neox"]())
        with torch.no_grad():
            for layer in one.gpt_neox.layers:
                u = torch.randn(24, generator=torch.Generator().manual_seed(seed))
                v = torch.zeros(16)
                v[seed] = 1.0
                layer.mlp.dense_h_to_4h.weight.add_(torch.outer(u, v))
        tuned.append(save(one, tmp_path / f"e{seed}"))
    mix(path, tuned, "ffn", "token", "spectral", 1, gate_rank=1, out=tmp_path / "out")
    place = next(m for m in load(tmp_path / "out").modules() if isinstance(m, Mixed))
    x = torch.zeros(1, 2, 16)
    x[0, 0, 1] = x[0, 1, 2] = 1.0
    assert place.weights(x)[0].argmax(-1).tolist() == [0, 1]


def test_what_is_left_out_of_the_folder_or_belongs_to_other_experts_is_refused(models, tmp_path):
    _, path, tuned = models["bert"]
    for name, some in (("one", tuned[:2]), ("two", tuned[1:])):
        mix(path, some, "model", "sample", prompts=PROMPTS[:2], out=tmp_path / name)
    with pytest.raises(ValueError, match="gradmatch_mixture"):
        tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    (tmp_path / "one/router.safetensors").write_bytes((tmp_path / "two/router.safetensors").read_bytes())
    with pytest.raises(GradmatchError, match="was made for other experts than e1, e2"):
        load(tmp_path / "one")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")
    shard = next((tmp_path / "two").glob("model-*"))
    held = load_file(shard)
    gone = next(name for name in held if name.startswith("experts.1."))
    index = json.loads((tmp_path / "two/model.safetensors.index.json").read_text())
    del index["weight_map"][gone]
    (tmp_path / "two/model.safetensors.index.json").write_text(json.dumps(index))
    save_file({n: v for n, v in held.items() if n != gone}, shard)
    with pytest.raises(GradmatchError, match="would stay as it is drawn at random"):
        load(tmp_path / "two")


def test_models_that_cannot_be_mixed_so_are_refused_by_name(models, tmp_path):
    _, bert, tuned = models["bert"]
    labels = save(
        drawn(tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=2))), tmp_path / "labels"
    )
    bare = save(drawn(tf.BertModel(tf.BertConfig(**TEXT))), tmp_path / "bare")
    words = save(
        drawn(
            tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=70, n_positions=32))
        ),
        tmp_path / "words",
    )
    t5 = save(
        drawn(
            tf.T5ForConditionalGeneration(
                tf.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=64)
            )
        ),
        tmp_path / "t5",
    )
    gpt2 = models["gpt2"][1]
    names = tf.BertConfig(
        **TEXT, id2label=dict(enumerate(["no", "yes", "maybe"])), label2id={"no": 0, "yes": 1, "maybe": 2}
    )
    other = save(drawn(tf.BertForSequenceClassification(names)), tmp_path / "other")
    rows = [
        ((bert, [bert, labels], "model", "sample"), {}, "has the labels LABEL_0, LABEL_1, the base"),
        ((gpt2, [gpt2, words], "model", "sample"), {}, "has a vocabulary of 70"),
        ((gpt2, [gpt2, bert], "model", "sample"), {}, "whole models are mixed where they answer alike"),
        ((bert, tuned, "model", "token"), {}, "choose routing='sample'"),
        ((bert, [other, other]), {}, "has the labels ['no', 'yes', 'maybe']"),
        ((bert, tuned, "model", "sample"), {"dense_layers": [1]}, "give a number"),
        ((bare, [bare, bare]), {}, "names no architecture of transformers with an answer"),
        ((t5, [t5, t5]), {}, "stacks of layers"),
        ((bert, tuned, "ffn", "sample"), {"form": "mixtral"}, "holds ffns that a linear router chooses by token"),
        ((bert, tuned, "ffn"), {"gate_mode": "hidden", "prompts": PROMPTS}, "choose gate_mode='seen'"),
        ((dict(drawn(KINDS["bert"]()).state_dict()), tuned), {}, "has no config.json"),
    ]  # fmt: skip
    for arguments, options, words_of in rows:
        with pytest.raises(GradmatchError) as error:
            mix(*arguments, out=tmp_path / "out", **options)
        assert words_of in str(error.value), (words_of, str(error.value))


def test_a_module_comes_back_where_nothing_is_kept_and_the_command_says_what_it_made(
    models, tmp_path, capsys
):
    base, path, tuned = models["vit"]
    pictures = batch_of("vit")
    mixture = mix(
        base,
        [moved(base, 1), moved(base, 2)],
        "ffn",
        "sample",
        prompts=[[pictures], [{"pixel_values": -pictures["pixel_values"]}]],
    )
    assert answer(mixture, pictures).shape == (3, 3)
    merged = merge(path, [Task(one) for one in tuned], method="averaging")
    assert (
        run(
            f"mix {tmp_path / 'out'} --base {path} --expert {tuned[0]} --expert {tuned[1]} --expert {tuned[2]} --level block --routing sample --router spectral --json --quiet"
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)["report"]
    assert (report["form"], report["settings"]["level"]) == ("own", "block")
    held = {}
    for shard in Path(tmp_path / "out").glob("*.safetensors"):
        held |= load_file(shard)
    torch.testing.assert_close(held["classifier.weight"], merged["classifier.weight"])
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()
