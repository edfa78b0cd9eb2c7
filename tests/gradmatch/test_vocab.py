"""Vocabularies that differ: rows found by token, config and tokenizer that follow."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gradmatch import Task, merge
from gradmatch.estimators import Curvature
from gradmatch.models.rewriting import rewritten
from gradmatch.models.tokenizers import vocabulary

BASE = ["[PAD]", "[CLS]", "a", "b", "c", "d"]


def save(folder, tokens, seed, rows=None, kind="json", width=8):
    """A tiny GPT-2 with its own word-level vocabulary; row i of the embeddings is what `row(token, seed)` gives."""
    rows = rows or len(tokens)
    torch.manual_seed(99)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=width, n_layer=1, n_head=1, vocab_size=rows, n_positions=4, bos_token_id=1, eos_token_id=0
        )
    )
    with torch.no_grad():
        for number in range(rows):
            token = tokens[number] if number < len(tokens) else f"padding {number}"
            model.transformer.wte.weight[number] = row(token, seed, width)
    model.save_pretrained(folder)
    if kind == "json":
        tokenizer = Tokenizer(
            models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[PAD]")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens([token for token in tokens if token.startswith("[")])
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A", special_tokens=[("[CLS]", tokens.index("[CLS]"))]
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    else:
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


def row(token, seed, width=8):
    generator = torch.Generator().manual_seed(sum(map(ord, token)) * 1000 + seed)
    return torch.randn(width, generator=generator)


def embeddings(checkpoint):
    return checkpoint["transformer.wte.weight"]


def test_without_a_policy_the_difference_is_described(tmp_path):
    base = save(tmp_path / "base", BASE, 0)
    shifted = save(tmp_path / "shifted", [*BASE[:2], "z", *BASE[2:5]], 1)
    with pytest.raises(
        ValueError,
        match=r"3 tokens have another id, first 'a': 2 in the base, 3 in it; 1 are missing, first 'd'; 1 are added, first 'z'",
    ):
        merge(base, [Task(shifted)], method="averaging")


def test_equal_vocabularies_need_no_policy(tmp_path):
    base, one = save(tmp_path / "base", BASE, 0), save(tmp_path / "one", BASE, 1)
    assert len(merge(base, [Task(one)], method="averaging")) == len(
        merge(base, [Task(base)], method="averaging")
    )


@pytest.mark.parametrize("kind", ["json", "lines"])
def test_union(tmp_path, kind):
    base = save(tmp_path / "base", BASE, 0, kind=kind)
    one = save(tmp_path / "one", [*BASE, "[NEW]", "e"], 1, kind=kind)
    two = save(tmp_path / "two", ["[PAD]", "[CLS]", "b", "a", "e"], 2, kind=kind)
    tasks = [Task(one, weight=0.5, name="one"), Task(two, weight=0.5, name="two")]
    done = merge(base, tasks, method="task_arithmetic", embeddings="union", out=tmp_path / "out")
    tokens = [*BASE, "[NEW]", "e"]
    assert done.config["vocab_size"] == len(tokens)
    found = embeddings(done)
    for number, token in enumerate(tokens):
        theta0 = row(token, 0)
        if token == "[NEW]":
            theta0 = row(token, 1)
        if token == "e":
            theta0 = (row(token, 1) + row(token, 2)) / 2
        taus = [
            row(token, s) - theta0
            for s, known in ((1, tokens), (2, ["[PAD]", "[CLS]", "a", "b", "e"]))
            if token in known
        ]
        torch.testing.assert_close(found[number], theta0 + 0.5 * sum(taus))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == len(tokens)
    if kind == "json":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
        assert tokenizer("a e [NEW]")["input_ids"] == [1, 2, 7, 6]


def test_the_new_tokens_of_a_union_take_the_bases_padding_rows_first(tmp_path):
    """As add_tokens does: the ids of the tokenizer have no gaps, and each is its row."""
    base = save(tmp_path / "base", BASE, 0, rows=8)
    one = save(tmp_path / "one", [*BASE, "e"], 1, rows=8)
    found = embeddings(merge(base, [Task(one)], method="averaging", embeddings="union"))
    assert len(found) == 8
    torch.testing.assert_close(found[6], row("e", 1))
    torch.testing.assert_close(found[7], row("padding 7", 0))


def test_intersect_renumbers_tokenizer_and_config(tmp_path):
    base = save(tmp_path / "base", BASE, 0)
    one = save(tmp_path / "one", ["[PAD]", "[CLS]", "c", "a", "d", "x"], 1)
    done = merge(base, [Task(one)], method="averaging", embeddings="intersect", out=tmp_path / "out")
    tokens = ["[PAD]", "[CLS]", "a", "c", "d"]
    assert done.config["vocab_size"] == 5
    for number, token in enumerate(tokens):
        torch.testing.assert_close(embeddings(done)[number], row(token, 1))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer("d c a")["input_ids"] == [1, 4, 3, 2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_intersect_that_loses_a_token_the_config_needs(tmp_path):
    base = save(tmp_path / "base", ["x", "[CLS]", "a"], 0, kind="lines")
    one = save(tmp_path / "one", ["y", "[CLS]", "a"], 1, kind="lines")
    with pytest.raises(
        ValueError,
        match=r"eos_token_id needs token 'x', which not every model has; choose embeddings='union'",
    ):
        merge(base, [Task(one)], method="averaging", embeddings="intersect")
    none = save(tmp_path / "none", ["p", "q", "[CLS]r"], 1, kind="lines")
    with pytest.raises(ValueError, match="no token in common"):
        merge(base, [Task(none)], method="averaging", embeddings="intersect")


def test_curvature_is_aligned_too(tmp_path):
    base = save(tmp_path / "base", BASE, 0)
    one = save(tmp_path / "one", ["[PAD]", "[CLS]", "b", "a"], 1)
    names = [n for n, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()]
    shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_pretrained(one).named_parameters()}
    mean = {n: torch.ones(shapes[n]) for n in names}
    mean["transformer.wte.weight"] = torch.arange(4.0).reshape(4, 1).expand(4, 8) + 1  # by the task's own ids
    known = Curvature.from_dict(mean, 1)
    merged = merge(base, [Task(one, known, 0.5)], base_curvature=1.0, embeddings="union")
    for token, h in (("b", 3.0), ("a", 4.0)):
        theta0, tau = row(token, 0), row(token, 1) - row(token, 0)
        torch.testing.assert_close(
            embeddings(merged)[BASE.index(token)], theta0 + 0.5 * (1 + h) * tau / (1 + 0.5 * h)
        )
    torch.testing.assert_close(embeddings(merged)[BASE.index("d")], row("d", 0))


def bpe(folder, text, special):
    tokenizer = Tokenizer(models.BPE(unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=40, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing((special[0], 0), (special[1], 1))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_bpe_merges_follow(tmp_path):
    one = bpe(tmp_path / "one", ["low lower lowest", "new newer"], ["<s>", "</s>"])
    two = bpe(tmp_path / "two", ["wide wider widest", "low"], ["<s>", "</s>", "<x>"])
    tables = [vocabulary(folder)[1]() for folder in (one, two)]
    union = {token: i for i, token in enumerate(dict.fromkeys([*tables[0], *tables[1]]))}
    content = json.loads(rewritten(one, [two], union)["tokenizer.json"])
    rebuilt = Tokenizer.from_str(json.dumps(content))
    assert rebuilt.encode("low wide", add_special_tokens=False).tokens == ["low", "wide"]
    assert rebuilt.token_to_id("<x>") == union["<x>"]
    common = {token: i for i, token in enumerate(t for t in tables[0] if t in tables[1])}
    content = json.loads(rewritten(one, [two], common)["tokenizer.json"])
    assert (
        Tokenizer.from_str(json.dumps(content)).encode("low", add_special_tokens=False).tokens[-1] in common
    )


def test_unigram_and_table_vocabularies(tmp_path):
    (tmp_path / "u").mkdir()
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0)).save(
        str(tmp_path / "u" / "tokenizer.json")
    )
    assert vocabulary(tmp_path / "u")[1]() == {"<unk>": 0, "a": 1, "b": 2}
    content = json.loads(rewritten(tmp_path / "u", [], {"<unk>": 0, "b": 1})["tokenizer.json"])
    assert content["model"]["vocab"] == [["<unk>", 0.0], ["b", -2.0]]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "t" / "added_tokens.json").write_text('{"<x>": 1}')
    assert vocabulary(tmp_path / "t")[1]() == {"a": 0, "<x>": 1}
    with pytest.raises(ValueError, match=r"neither tokenizer.json nor vocab\.txt"):
        rewritten(tmp_path / "t", [], {"a": 0})
    with pytest.raises(ValueError, match="no tokenizer files"):
        rewritten(None, [], {"a": 0})
    (tmp_path / "t" / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a vocabulary"):
        vocabulary(tmp_path / "t")[1]()


@pytest.mark.parametrize("policy", ["union", "intersect"])
def test_equal_vocabularies_of_other_padding(tmp_path, policy):
    base, one = save(tmp_path / "base", BASE, 0, rows=8), save(tmp_path / "one", BASE, 1)
    with pytest.raises(
        ValueError, match=r"embeddings of one have 6 rows and the base's 8, for the same tokens"
    ):
        merge(base, [Task(one)], method="averaging")
    found = embeddings(merge(base, [Task(one)], method="averaging", embeddings=policy))
    assert len(found) == 8
    for number in range(8):
        expected = row(BASE[number], 1) if number < 6 else row(f"padding {number}", 0)
        torch.testing.assert_close(found[number], expected)
    cropped = merge(one, [Task(base)], method="averaging", embeddings=policy, out=tmp_path / "out")
    assert embeddings(cropped).shape == (6, 8)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 6


def test_models_as_wide_as_their_vocabulary(tmp_path):
    base = save(tmp_path / "base", BASE, 0, width=6)
    one = save(tmp_path / "one", [*BASE[:5], "e"], 1, width=6)
    done = merge(base, [Task(one)], method="averaging", embeddings="union", out=tmp_path / "out")
    assert embeddings(done).shape == (7, 6)
    assert done["transformer.ln_f.weight"].shape == (6,)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys"))


def test_embeddings_that_no_name_tells(tmp_path):
    from safetensors.torch import load_file, save_file

    folders = [
        save(tmp_path / "base", BASE, 0, width=6),
        save(tmp_path / "one", [*BASE[:5], "e"], 1, width=6),
    ]
    for folder in folders:
        held = load_file(folder / "model.safetensors")
        held["words"] = held.pop("transformer.wte.weight")
        save_file(held, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"6 wide and have 6 tokens, and none of the names .*words"):
        merge(folders[0], [Task(folders[1])], method="averaging", embeddings="union")
