"""Training of routers and of added blocks alone, the routing report, stacks in depth."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from gradmatch import GradmatchError, Task, merge, open_checkpoint
from gradmatch.mixture import load, mix, routing, size_curve, stack, train_router, training
from gradmatch.mixture.scoring import balance_loss, listening, loss_of
from gradmatch.mixture.stacking import BLOCKS, train_blocks
from tests.command import run
from tests.gradmatch.mixture.models import IDS, PROMPTS, SMALL, decoder, drawn, family, logits, moved, save

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
LABELLED = [
    {"input_ids": IDS, "labels": torch.tensor([0, 1])},
    {"input_ids": IDS.flip(1), "labels": torch.tensor([1, 0])},
]
SPOKEN = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS.flip(1), "labels": IDS.flip(1)}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return family(tmp_path_factory.mktemp("llama"), tf.LlamaConfig(**SMALL))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    base = drawn(tf.BertForSequenceClassification(tf.BertConfig(**TEXT)))
    return save(base, folder / "base"), [save(moved(base, n, scale=0.5), folder / f"e{n}") for n in (1, 2)]


def values(folder):
    found = {}
    for shard in Path(folder).glob("*.safetensors"):
        found |= load_file(shard) if shard.name != "training.safetensors" else {}
    return found


@pytest.mark.parametrize("form", ["mixtral", "own", "qwen2_moe"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_training_in_parts_is_training_at_once_and_moves_routers_alone(form, top_k, llama, tmp_path):
    base, experts = llama
    for name in ("once", "parts"):
        mix(base, experts, prompts=PROMPTS, top_k=top_k, form=form, out=tmp_path / name)
    before = values(tmp_path / "once")
    done = train_router(tmp_path / "once", SPOKEN, 4)
    train_router(tmp_path / "parts", SPOKEN, 2)
    again = train_router(tmp_path / "parts", SPOKEN, 4, resume=True)
    assert (done.steps, again.steps) == (4, 4)
    once, parts = values(tmp_path / "once"), values(tmp_path / "parts")
    routers = {name for name in once if "router" in name or name.endswith("gate.weight")}
    for name, value in once.items():
        assert torch.equal(value, parts[name]), name
        assert torch.equal(value, before[name]) == (name not in routers or ("shared_expert_gate" in name)), (
            name
        )
    with pytest.raises(GradmatchError, match=r"of a training with rate 0\.01"):
        train_router(tmp_path / "once", SPOKEN, 6, rate=0.5, resume=True)


@pytest.mark.parametrize(("level", "router"), [("ffn", "mlp"), ("block", "linear"), ("model", "linear")])
def test_a_router_learns_which_expert_is_right(level, router, bert, tmp_path):
    base, experts = bert
    mix(base, experts, level, "sample", router, out=tmp_path / "out", top_k=1)
    told = [load(tmp_path / "out")]
    labels = logits(tf.AutoModelForSequenceClassification.from_pretrained(experts[1]), IDS).argmax(-1)
    done = train_router(tmp_path / "out", [{"input_ids": IDS, "labels": labels}], 30, rate=0.05, balance=0.0)
    assert done.last < done.first
    after = load(tmp_path / "out")
    frozen = {name: value for name, value in told[0].state_dict().items() if "router" not in name}
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in frozen.items())


def test_the_balance_loss_counts_and_padding_does_not(llama, tmp_path):
    base, experts = llama
    mix(base, experts, prompts=PROMPTS, out=tmp_path / "native")
    mix(base, experts, prompts=PROMPTS, form="own", out=tmp_path / "own")
    wide = torch.cat([IDS, torch.zeros(2, 10, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(2, 9), torch.zeros(2, 10)], 1).long()
    found = []
    for name in ("native", "own"):
        module = load(tmp_path / name)
        for batch in (
            {"input_ids": IDS, "attention_mask": mask[:, :9]},
            {"input_ids": wide, "attention_mask": mask},
        ):
            with listening(module) as scores:
                loss = loss_of(module, batch)
            found.append((float(loss.detach()), float(balance_loss(scores).detach())))
        router = next(
            p for n, p in module.named_parameters() if "router" in n or n.endswith("mlp.gate.weight")
        )
        gradients = []
        for weight in (0.0, 1.0):
            with listening(module) as scores:
                loss = loss_of(module, {"input_ids": IDS}) + weight * balance_loss(scores)
            gradients.append(torch.autograd.grad(loss, router)[0])
        assert not torch.allclose(*gradients)
    for pair in found[1:]:
        assert pair == pytest.approx(found[0], rel=1e-4)


def test_what_cannot_be_trained_is_refused_and_nothing_changes(bert, tmp_path, monkeypatch):
    base, experts = bert
    mix(base, experts, "ffn", "sample", "spectral", out=tmp_path / "spectral")
    mix(base, experts, "model", "sample", out=tmp_path / "out")
    before = values(tmp_path / "out")
    rows = [
        (("spectral", LABELLED), {}, "a spectral router is not"),
        (("out", [{"input_ids": IDS}]), {}, "have no labels"),
        (("out", []), {}, "no batches"),
        (("out", LABELLED), {"steps": 0}, "at least 1 step"),
        (("out", LABELLED), {"resume": True}, "no training to resume"),
        (("out", LABELLED), {"rate": float("inf")}, "a positive rate"),
    ]
    for (name, batches), options, words in rows:
        with pytest.raises(GradmatchError, match=words):
            train_router(tmp_path / name, batches, **options)
    whole = training.loss_of
    monkeypatch.setattr(training, "loss_of", lambda *given: whole(*given) * float("nan"))
    with pytest.raises(
        GradmatchError, match="the loss is nan at step 1; choose a smaller rate; nothing is written"
    ):
        train_router(tmp_path / "out", LABELLED)
    assert all(torch.equal(value, values(tmp_path / "out")[name]) for name, value in before.items())


def test_the_report_tells_who_answers_what_and_names_the_dead(llama, tmp_path, capsys):
    base, experts = llama
    mix(base, experts, prompts=PROMPTS, top_k=1, out=tmp_path / "native")
    module = load(tmp_path / "native")
    chosen = []
    for layer in module.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *args: chosen.append(args[2][2]))
    logits(module, IDS)
    report = routing(tmp_path / "native", {"some": [{"input_ids": IDS}]})
    for layer, some in enumerate(chosen):
        wanted = [(some == number).float().mean().item() for number in range(3)]
        assert report.shares["some"][f"model.layers.{layer}.mlp.gate"] == pytest.approx(wanted)
    mix(base, experts, "model", "sample", prompts=PROMPTS, out=tmp_path / "own")
    with torch.no_grad():
        held = values(tmp_path / "own")["gate.router.weight"]
    from gradmatch.output.folder import replace_tensors

    replace_tensors(tmp_path / "own", {"gate.router.weight": torch.zeros_like(held)})
    (tmp_path / "texts.txt").write_text("once upon a time\n\ntwo plus three\n")
    assert (
        run(
            f"mix report {tmp_path / 'own'} --data x={tmp_path / 'texts.txt'} --figure {tmp_path / 'f.svg'} --json"
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["shares"]["x"]["model"] == [1, 0, 0]
    assert told["dead"] == ["e1", "e2"]
    assert "<svg" in (tmp_path / "f.svg").read_text()
    (tmp_path / "data.csv").write_text("text\nonce upon\ntwo plus\n")
    assert run(f"mix train-router {tmp_path / 'own'} --data {tmp_path / 'data.csv'} --steps 3") == 0
    assert "3 steps" in capsys.readouterr().out
    assert run(f"mix train-router {tmp_path / 'own'}") == 2


def test_the_curve_runs_from_one_merged_model_to_all_experts(bert, tmp_path, capsys):
    base, experts = bert
    labels = [
        logits(tf.AutoModelForSequenceClassification.from_pretrained(one), IDS).argmax(-1)
        for one in (base, *experts)
    ]
    curve = size_curve(
        base,
        experts,
        lambda module: float((logits(module, IDS).argmax(-1) == labels[1]).float().mean()),
        level="block",
        routing="sample",
        prompts=PROMPTS[:2],
    )
    merged = merge(base, [Task(one) for one in experts], method="averaging", out=tmp_path / "merged")
    own = tf.AutoModelForSequenceClassification.from_pretrained(merged.folder)
    assert curve.points[0].score == float((logits(own, IDS).argmax(-1) == labels[1]).float().mean())
    assert [point.at for point in curve.points] == [0, 1, 2]
    assert [point.size for point in curve.points] == sorted(point.size for point in curve.points)
    (tmp_path / "data.csv").write_text("text,label\nonce upon,0\ntwo plus,1\n")
    listed = "".join(f"\n  - {one}" for one in experts)
    (tmp_path / "r.yaml").write_text(f"base: {base}\nlevel: block\nrouter: spectral\nexperts:{listed}\n")
    line = f"mix curve {tmp_path / 'r.yaml'} --data {tmp_path / 'data.csv'} --over rank --figure {tmp_path / 'c.svg'} --json"
    assert run(f"{line} --points 1,3") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["at"] for point in points] == [0, 1, 3]
    assert 1 == points[0]["size"] < points[1]["size"] < points[2]["size"]
    assert "<svg" in (tmp_path / "c.svg").read_text()
    assert run(f"{line} --points 0") == 2
    with pytest.raises(GradmatchError, match="points has 3, and there are 2 layers"):
        size_curve(base, experts, float, points=[3])


STACKS = {
    "llama with biases": lambda: tf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2, half windows": lambda: tf.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "gemma3, a window pattern": lambda: tf.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32),
    "neox": lambda: tf.GPTNeoXConfig(**TEXT),
}


@pytest.mark.parametrize("kind", STACKS)
def test_a_stack_begins_as_the_first_model_and_learns_in_its_new_blocks_alone(kind, tmp_path, capsys):
    base = decoder(STACKS[kind]())
    paths = [save(base, tmp_path / "a"), save(moved(base, 1), tmp_path / "b")]
    assert run(f"stack {paths[0]}:0:2 {paths[1]}:1:2 {paths[1]}:0:2 -o {tmp_path / 'out'} --quiet") == 0
    assert "4 x" not in capsys.readouterr().out
    deeper = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(deeper, IDS), logits(base, IDS))
    if "windows" in kind:
        assert deeper.config.layer_types == [
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ]
    if "pattern" in kind:
        assert deeper.config.layer_types == [
            *base.config.layer_types,
            "full_attention",
            *base.config.layer_types,
        ]
    loss = deeper(input_ids=IDS, labels=IDS).loss
    loss.backward()
    new = {name: p for name, p in deeper.named_parameters() if any(f".{n}." in name for n in (2, 3, 4))}
    ends = [name for name, p in new.items() if not p.any() and name.endswith("weight")]
    assert len(ends) == 6
    assert all(new[name].grad.abs().max() > 0 for name in ends)
    before = values(tmp_path / "out")
    train_blocks(tmp_path / "out", SPOKEN, 3, rate=1e-3)
    after = values(tmp_path / "out")
    moved_ones = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved_ones <= set(load_file(tmp_path / "out" / BLOCKS))
    assert set(ends) <= moved_ones
    shorter = stack([paths[0], paths[0]], [(0, 1), (1, 2)], tmp_path / "same", identity=False)
    assert all(
        torch.equal(shorter[name], value)
        for name, value in base.state_dict().items()
        if name in shorter.store
    )


def test_stacks_that_make_no_sense_are_refused(bert, llama, tmp_path):
    base = llama[0]
    rows = [
        (([base, base], [(0, 2)]), "2 models and 1 ranges"),
        (([base], [(0, 3)]), "it has 2"),
        (([base], [(1, 1)]), "it has 2"),
        (([base, base], [(0, 2), (0, 1, 2)]), "a range of layers is"),
        (([bert[0], bert[0]], [(0, 2), (0, 2)]), "norms behind the sum"),
    ]
    for arguments, words in rows:
        with pytest.raises(GradmatchError, match=words):
            stack(*arguments, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(GradmatchError, match="is no stack"):
        train_blocks(base, SPOKEN)
    assert run(f"stack {base} -o {tmp_path / 'out'}") == 2
    assert open_checkpoint(base) is not None
