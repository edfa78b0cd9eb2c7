"""The README's examples run as they stand: the Python block, and the command line on tiny models."""

import json
import os
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, LlamaForCausalLM

import gradmatch
from gradmatch.cli import main
from tests.gradmatch.tiny import text_llama

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
WORDS = ["good", "bad", "fine", "poor", "film", "plot", "very", "not"]


def blocks(language):
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_python_example(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["task_arithmetic", "gradient_matching"]


def write_model(folder, seed, start=None):
    """A tiny classifier with its tokenizer; `start`: the model it was fine-tuned from."""
    torch.manual_seed(seed)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **sizes))
    if start is not None:
        model.load_state_dict({name: value + 0.01 * torch.randn_like(value) for name, value in start.items()})
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return model.state_dict()


def write_texts(path, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = ["text,label"]
    for _ in range(12):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=generator)]
        rows.append(f"{' '.join(words)},{int(words.count('good') > words.count('bad'))}")
    path.write_text("\n".join(rows), encoding="utf-8")


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """What the README's reader is said to have."""
    monkeypatch.chdir(tmp_path)
    start = write_model(tmp_path / "base", 0)
    for seed, name in enumerate(("amazon", "nyt"), start=1):
        write_model(tmp_path / name, seed, start)
    for seed, name in enumerate(("movies", "amazon", "nyt")):
        write_texts(tmp_path / f"{name}.csv", seed)
    return tmp_path


def test_the_command_line_examples(readers_folder, capsys):
    (example, *_) = blocks("sh")
    (recipe,) = blocks("yaml")
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    for line in example.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "gradmatch"
        assert main(arguments) == 0, line
        assert ("--dry-run" in arguments) <= (not os.path.exists("merged"))
    assert BertForSequenceClassification.from_pretrained("merged").config.num_hidden_layers == 1


def write_language_model(folder, start=None):
    """A tiny language model with its tokenizer; `start`: the weights it was fine-tuned from."""
    torch.manual_seed(0)
    model, tokenizer = text_llama(["<pad>", *WORDS])
    if start is not None:
        model.load_state_dict({name: value + 0.1 * torch.randn_like(value) for name, value in start.items()})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.state_dict()


def test_the_removal_of_what_a_model_should_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_language_model("TOXIC", write_language_model("MODEL"))
    for kind, words in (("clean", WORDS[:4]), ("toxic", WORDS[4:])):
        text = "".join(f"{' '.join(words[i:] + words[:i])}\n" for i in range(4))
        for name in (kind, f"{kind}-heldout"):
            Path(f"{name}.txt").write_text(text, encoding="utf-8")
    *estimates, budget, subtract = blocks("sh")[1].splitlines()
    for line in (*estimates, budget):
        assert main(shlex.split(line)[1:]) == 0, line
    told = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].partition(": ")[2])
    alpha = json.loads(Path("removal.json").read_text())["budget"]["alpha"]
    assert 0 < alpha <= 1
    asked = shlex.split(subtract.replace("ALPHA", f"{alpha:.6g}"))
    assert main(asked[1:]) == 0
    assert LlamaForCausalLM.from_pretrained("cleaned").config.num_hidden_layers == 1
    options = [dict(zip(words[2:-1:2], words[3::2], strict=True)) for words in (asked, told)]
    assert options[0].pop("-o") == "cleaned"
    assert options[1].pop("-o") == "OUT"
    assert options[0] == options[1]


NAMED = re.compile(r"`(gradmatch(?:\.\w+)+)\b")
IMPORTED = re.compile(r"^from (gradmatch[\w.]*) import (.+)$", re.MULTILINE)


def public_names():
    """Every name of ours that the READMEs tell users, but files (`gradmatch.json`) and entry-point groups."""
    texts = [README, (Path(gradmatch.__file__).parent / "rules" / "README.md").read_text(encoding="utf-8")]
    for text in texts:
        yield from (name for name in NAMED.findall(text) if name != "gradmatch.json")
        for module, names in IMPORTED.findall(text):
            yield from (f"{module}.{name.strip()}" for name in names.split(","))


@pytest.mark.parametrize("name", sorted(set(public_names())))
def test_every_public_name_is_there(name):
    pkgutil.resolve_name(name)
