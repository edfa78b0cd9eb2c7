"""The examples of README and docs run as they stand on tiny models; commands that they print exist, and so do names."""

import contextlib
import importlib.util
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
from gradmatch.cli import COMMANDS, build_parser, main
from gradmatch.recipes.recipe import load_recipe
from tests.gradmatch.tiny import text_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
WORDS = ["good", "bad", "fine", "poor", "film", "plot", "very", "not"]


def blocks(language, text=README):
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_is_one_screen():
    assert len(README.splitlines()) <= 120


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
        assert ("--dry-run" in arguments) <= (not os.path.exists("out"))
    assert BertForSequenceClassification.from_pretrained("out").config.num_hidden_layers == 1


def test_the_python_example(readers_folder, capsys):
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    told = capsys.readouterr().out
    assert "gradient_matching: theta0" in told
    assert "Looked at" in told
    assert BertForSequenceClassification.from_pretrained("merged").config.num_hidden_layers == 1


@pytest.mark.parametrize("name", ["docs/start.md", "docs/howto/own.md", "docs/howto/publish.md"])
def test_the_pages_python(name, readers_folder, capsys):
    for example in blocks("python", PAGES[name]):
        exec(compile(example, name, "exec"), {})


def test_the_start_runs_as_it_is_written(readers_folder, capsys):
    for example in blocks("sh", PAGES["docs/start.md"]):
        for line in example.splitlines():
            assert main(shlex.split(line)[1:]) == 0, line
    assert Path("why.html").is_file()


def test_every_printed_command_is_one():
    """Each line of every sh block is parsed, with its values."""
    count = 0
    for name, text in PAGES.items():
        print(name)  # shown where a line of it is no command
        for line in "".join(blocks("sh", text)).replace("\\\n", " ").replace(" && ", "\n").splitlines():
            program, *words = shlex.split(line, comments=True) or [""]
            if program == "gradmatch":
                words = [word.replace("ALPHA", "0.5") for word in words]
                with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
                    build_parser(words).parse_args(words)
                count += 1
    assert count > 40


def test_the_recipes_of_the_pages_are_recipes(readers_folder):
    for name, text in PAGES.items():
        for content in blocks("yaml", text):
            if re.search(r"^(tasks|merge_method):", content, re.MULTILINE):
                Path("page.yaml").write_text(content, encoding="utf-8")
                assert load_recipe("page.yaml")["tasks"], name


def test_the_reference_has_every_public_name_and_command():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    told = set(re.findall(r"^::: ([\w.]+)$", site.python(), re.MULTILINE))
    own = {name for name in told if not name.startswith("gradmatch.plots.")}
    assert {name.rpartition(".")[2] for name in own} == set(gradmatch.__all__) == set(gradmatch.EXPORTS)
    for name in told:
        pkgutil.resolve_name(name)
    assert set(re.findall(r"^## gradmatch (\w+)$", site.commands(), re.MULTILINE)) == set(COMMANDS)
    assert all(f"`{method}`" in site.recipes() for method in gradmatch.RULES)
    navigation = (ROOT / "mkdocs.yml").read_text()
    hidden = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    assert all(page in navigation for page in hidden)


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
    *estimates, budget, subtract = blocks("sh", PAGES["docs/howto/removal.md"])[0].splitlines()
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
    texts = [
        *PAGES.values(),
        (Path(gradmatch.__file__).parent / "rules" / "README.md").read_text(encoding="utf-8"),
    ]
    for text in texts:
        yield from (name for name in NAMED.findall(text) if name != "gradmatch.json")
        for module, names in IMPORTED.findall(text):
            yield from (f"{module}.{name.strip()}" for name in names.split(","))


@pytest.mark.parametrize("name", sorted(set(public_names())))
def test_every_public_name_is_there(name):
    pkgutil.resolve_name(name)
