"""Vocabularies that differ: rows found by token, config and tokenizer that follow."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from gradmatch import Task, merge, open_checkpoint
from gradmatch.estimators import Curvature
from gradmatch.models.rewriting import rewritten
from gradmatch.models.tokenizers import vocabulary
from tests.command import run
from tests.gradmatch.tiny import gpt2, llama

BASE = ["[PAD]", "[CLS]", "a", "b", "c", "d"]


def save(folder, tokens, seed, rows=None, kind="json", width=8):
    """A tiny GPT-2 with its own word-level vocabulary; row i of the embeddings is what `row(token, seed)` gives."""
    rows = rows or len(tokens)
    torch.manual_seed(99)
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 1, "vocab_size": rows, "n_positions": 4}
    model = gpt2(**sizes, eos_token_id=0)
    with torch.no_grad():
        for number in range(rows):
            token = tokens[number] if number < len(tokens) else f"padding {number}"
            model.transformer.wte.weight[number] = row(token, seed, width)
    model.save_pretrained(folder)
    if kind != "json":
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
        return folder
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([token for token in tokens if token.startswith("[")])
    first = [("[CLS]", vocabulary["[CLS]"])]
    made.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=first)
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]").save_pretrained(folder)
    return folder


def row(token, seed, width=8):
    generator = torch.Generator().manual_seed(sum(map(ord, token)) * 1000 + seed)
    return torch.randn(width, generator=generator)


def embeddings(checkpoint):
    return checkpoint["transformer.wte.weight"]


def test_without_a_policy_the_difference_is_described(tmp_path):
    base = save(tmp_path / "base", BASE, 0)
    shifted = save(tmp_path / "shifted", [*BASE[:2], "z", *BASE[2:5]], 1)
    said = "3 tokens have another id, first 'a': 2 in the base, 3 in it; 1 are missing, first 'd'; 1 are added, first 'z'"
    with pytest.raises(ValueError, match=said):
        merge(base, [Task(shifted)], method="averaging")
    one = save(tmp_path / "one", BASE, 1)  # equal vocabularies need no policy
    assert len(merge(base, [Task(one)], method="averaging")) == len(open_checkpoint(base))


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
    new = {"[NEW]": row("[NEW]", 1), "e": (row("e", 1) + row("e", 2)) / 2}
    for number, token in enumerate(tokens):
        theta0 = new.get(token, row(token, 0))
        knowing = (1, 2) if token in ("[PAD]", "[CLS]", "a", "b", "e") else (1,)
        expected = theta0 + 0.5 * sum(row(token, seed) - theta0 for seed in knowing)
        torch.testing.assert_close(found[number], expected)
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
    said = "eos_token_id needs token 'x', which not every model has; choose embeddings='union'"
    with pytest.raises(ValueError, match=said):
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
        expected = theta0 + 0.5 * (1 + h) * tau / (1 + 0.5 * h)
        torch.testing.assert_close(embeddings(merged)[BASE.index(token)], expected)
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
    common = {token: i for i, token in enumerate(t for t in tables[0] if t in tables[1])}
    rebuilt, short = (
        Tokenizer.from_str(json.dumps(json.loads(rewritten(one, [two], ids)["tokenizer.json"])))
        for ids in (union, common)
    )
    assert rebuilt.encode("low wide", add_special_tokens=False).tokens == ["low", "wide"]
    assert rebuilt.token_to_id("<x>") == union["<x>"]
    assert short.encode("low", add_special_tokens=False).tokens[-1] in common


def test_unigram_and_table_vocabularies(tmp_path):
    (tmp_path / "u").mkdir()
    pieces = models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0)
    Tokenizer(pieces).save(str(tmp_path / "u" / "tokenizer.json"))
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
    with pytest.raises(ValueError, match="of one have 6 rows and the base's 8, for the same tokens"):
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
    base, one = (
        save(tmp_path / name, tokens, seed, width=6)
        for seed, (name, tokens) in enumerate((("base", BASE), ("one", [*BASE[:5], "e"])))
    )
    for folder in (base, one):
        held = load_file(folder / "model.safetensors")
        held["words"] = held.pop("transformer.wte.weight")
        save_file(held, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"6 wide and have 6 tokens, and none of the names .*words"):
        merge(base, [Task(one)], method="averaging", embeddings="union")


ALPHABET = ["<pad>", "<s>", "</s>", *"abcdehlorw"]


def numbered(pieces):
    return {piece: n for n, piece in enumerate(["<unk>", *ALPHABET, *pieces])}


def word_pieces(pieces):
    return models.WordPiece(numbered(pieces), unk_token="<unk>")


def unigram(pieces):
    return models.Unigram(
        [("<unk>", 0.0), *((p, -float(n)) for n, p in enumerate([*ALPHABET, *pieces]))], unk_id=0
    )


def merged_pairs(pieces):
    """BPE whose pieces are pairs of what is there, such as "he" of "h" and "e"."""
    pairs = [(piece[:-1], piece[-1]) for piece in pieces]
    return models.BPE(numbered(pieces), pairs, unk_token="<unk>")


def words(pieces):
    return models.WordLevel(numbered(pieces), unk_token="<unk>")


def tokenized(folder, kind, pieces, special, rows=0, seed=0):
    """A model folder with a tokenizer of that kind; returns its tokens and their ids."""
    made = Tokenizer(kind(pieces))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"extra_special_tokens": special})
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    llama(rows or len(fast), tie_word_embeddings=False).save_pretrained(folder)
    return fast.get_vocab()


def rows_of(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


VOCABULARIES = {  # base: pieces, special tokens, rows (0: as many as tokens); the same of the task
    "pieces and special tokens": ((["he", "ll", "hel"], ["<x>"], 0), (["he", "lo"], ["<y>"], 0)),
    "special tokens in another order": ((["he"], ["<x>", "<z>"], 0), (["he"], ["<z>", "<x>"], 0)),
    "padding in both": ((["he"], ["<x>"], 32), (["he", "lo", "wo"], ["<x>", "<y>"], 40)),
    "a special token of one is a piece of the other": ((["he"], ["lo"], 0), (["he", "lo"], [], 0)),
    "nothing added": ((["he", "lo"], ["<x>", "<y>"], 0), (["he"], ["<x>"], 0)),
    "tokens without rows": ((["he"], ["<x>", "<y>"], 15), (["he", "lo"], ["<x>"], 0)),
}


@pytest.mark.parametrize("kind", [merged_pairs, word_pieces, unigram, words])
@pytest.mark.parametrize("case", VOCABULARIES)
def test_every_token_of_the_written_tokenizer_has_its_own_row(tmp_path, case, kind):
    tables, rowless = {}, set()
    for seed, (name, (pieces, special, rows)) in enumerate(
        zip(("base", "task"), VOCABULARIES[case], strict=True)
    ):
        table = tokenized(tmp_path / name, kind, pieces, special, rows, seed)
        size = rows or len(table)
        tables[name] = {token: number for token, number in table.items() if number < size}
        rowless |= set(table) - set(tables[name])
    base, task = tables["base"], tables["task"]
    own = {name: rows_of(tmp_path / name) for name in tables}
    kept = {"union": {**base, **task}, "intersect": set(base) & set(task), "base": base, "task": task}
    for policy, expected in kept.items():
        options = {"embeddings" if policy in ("union", "intersect") else "tokenizer": policy}
        options |= {"method": "task_arithmetic", "out": tmp_path / "out", "overwrite": True}
        merge(tmp_path / "base", [Task(tmp_path / "task")], **options)
        written, rows = AutoTokenizer.from_pretrained(tmp_path / "out"), rows_of(tmp_path / "out")
        found = written.get_vocab()
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(rows)
        assert set(expected) <= set(found)
        assert set(found) - set(expected) <= rowless  # of a tokenizer that is left as it is
        for token in expected:
            table, name = (task, "task") if token in task else (base, "base")
            torch.testing.assert_close(rows[found[token]], own[name][table[token]])
        assert max(written("hello <x> world").input_ids) < len(rows)


STALE = ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "source.spm", "qwen.tiktoken"]


def test_ids_in_configs_follow_in_lists_and_nested_and_stale_files_are_left_out(tmp_path):
    base = tokenized(tmp_path / "base", merged_pairs, ["he", "ll"], ["<x>", "<y>"])
    new = tokenized(tmp_path / "task", merged_pairs, ["he"], ["<x>"], seed=1)
    x, y = base["<x>"], base["<y>"]
    ids = {"eos_token_id": [2, x], "suppress_tokens": [y, x], "inner": {"image_token_id": x}}
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | ids | {"bad_words_ids": [[x, 3]]}))
    for name in STALE:
        (tmp_path / "base" / name).write_bytes(b'{"<x>": 99}')
    options = {"method": "averaging", "embeddings": "intersect", "out": tmp_path / "out"}
    merge(tmp_path / "base", [Task(tmp_path / "task")], **options)
    at = new["<x>"]
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert found["eos_token_id"] == [2, at]
        assert found["suppress_tokens"] == [at]
        assert found["inner"]["image_token_id"] == at
        assert found["bad_words_ids"] == [[at, 3]]
    assert not [name for name in STALE if (tmp_path / "out" / name).exists()]


UNKNOWN = [  # (change of the folders, options, words in the note or the refusal, whether it is one)
    (lambda f: (f / "task" / "tokenizer.json").rename(f / "task" / "tokenizer.model"), {}, r"task could not be read \(tokenizer.model", False),
    (lambda f: (f / "task" / "tokenizer.json").rename(f / "task" / "tokenizer.model"), {"embeddings": "union", "rows": 40}, "task is not known", True),
    (lambda f: (f / "task" / "tokenizer.json").rename(f / "task" / "tokenizer.model"), {"rows": 40}, r"40 rows and the base's 16, and .* could not be read", True),
    (lambda f: (f / "task" / "tokenizer.json").unlink(), {"rows": 40}, "it has no tokenizer", True),
    (lambda f: (f / "base" / "tokenizer.json").unlink(), {"rows": 40}, "vocabulary of the base is not known", True),
    (lambda f: None, {"tokenizer": "tsk"}, r"tokenizer is 'tsk' \(did you mean 'task'", True),
    (lambda f: (f / "task" / "tokenizer.json").unlink(), {"tokenizer": "task"}, "has no tokenizer, which the output was to have", True),
    (lambda f: None, {"rows": 15}, r"the tokenizer of task has 1 tokens beyond the 15 rows", True),
    (lambda f: None, {"chat_template": "chatlm"}, r"chat_template is 'chatlm' \(did you mean 'chatml'", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "options", "text", "refused"), UNKNOWN, ids=[text for _, _, text, _ in UNKNOWN]
)
def test_vocabularies_that_are_not_known_are_said(tmp_path, change, options, text, refused):
    options = dict(options)
    rows = options.pop("rows", 0)
    for name, size in (("base", 0), ("task", rows)):
        tokenized(tmp_path / name, words, ["he"], ["<x>"], size)
    change(tmp_path)
    if refused and "beyond" not in text:
        with pytest.raises(ValueError, match=text):
            merge(tmp_path / "base", [Task(tmp_path / "task")], method="averaging", **options)
        return
    policy = {"embeddings": "union"} if rows else {}
    done = merge(tmp_path / "base", [Task(tmp_path / "task")], method="averaging", **options, **policy)
    assert re.search(text, "\n".join(done.report.notes))


@pytest.mark.parametrize("same", [True, False])
def test_vocabularies_that_cannot_be_read_are_compared_as_files(tmp_path, recwarn, same):
    for name in ("base", "task"):
        tokenized(tmp_path / name, words, ["he"], ["<x>"])
        (tmp_path / name / "tokenizer.json").unlink()
        (tmp_path / name / "tokenizer.model").write_text("one" if same else name)
    notes = merge(tmp_path / "base", [Task(tmp_path / "task")], method="averaging").report.notes
    assert sum("task could not be read" in note for note in notes) == 1
    told = [*notes, *(str(one.message) for one in recwarn)]
    assert sum("another file than the base's" in text for text in told) == (0 if same else 2)


def test_the_tokenizer_and_chat_template_that_are_asked_for(tmp_path):
    texts = {"base": "b {{ messages }}", "one": "t {{ messages }}", "two": "t {{ messages }}\n"}
    for name, template in texts.items():
        tokenized(tmp_path / name, words, ["he"], ["<x>"])
        (tmp_path / name / "chat_template.jinja").write_text(template)
    tasks = [Task(tmp_path / "one"), Task(tmp_path / "two")]

    def made(**wanted):
        options = {"method": "averaging", "out": tmp_path / "out", "overwrite": True}
        merge(tmp_path / "base", tasks, **options, **wanted)
        return AutoTokenizer.from_pretrained(tmp_path / "out")

    assert made().chat_template == texts["base"]
    assert made(chat_template="auto").chat_template == texts["one"]
    assert made(tokenizer="two").chat_template == texts["two"]
    assert made(chat_template="x {{ messages }}").chat_template == "x {{ messages }}"
    said = made(chat_template="chatml").apply_chat_template(
        [{"role": "user", "content": "he"}], tokenize=False
    )
    assert said == "<|im_start|>user\nhe<|im_end|>\n"
    line = f"merge --base {tmp_path}/base --task {tmp_path}/one --method averaging --quiet"
    assert run(f"{line} --tokenizer one -o {tmp_path}/command") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "command").chat_template == texts["one"]
