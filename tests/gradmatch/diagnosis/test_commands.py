"""`gradmatch diagnose` and `gradmatch forecast` on folders of a tiny transformers model."""

import json

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from gradmatch import open_checkpoint
from tests.command import run

WORDS = ["good", "bad", "fine", "poor", "film", "book", "a", "the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, one/ and two/ with tokenizers, data files, and a recipe."""
    root = tmp_path_factory.mktemp("models")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(root / "vocab.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=13, num_labels=2, **sizes))
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name in ("one", "two"):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.002 * torch.randn_like(value))
        model.save_pretrained(root / name)
        rows = [{"text": f"a {word} {name}", "label": int(word in ("good", "fine"))} for word in WORDS * 2]
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {"base": "base", "method": "averaging", "tasks": [{"model": "one"}, {"model": "two"}]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def data_flags(folder, **names):
    given = names or {"one": "one", "two": "two"}
    return " ".join(f"--data {task}={folder}/{name}.jsonl" for task, name in given.items()) + " --examples 12"


def test_diagnose_from_files_alone(folder, capsys):
    assert run(f"diagnose {folder}/recipe.yaml") == 0
    printed = capsys.readouterr().out
    assert "Nothing wrong was found" in printed
    assert "note: no data" in printed


def test_diagnose_with_data_writes_json_and_a_page(folder, capsys, tmp_path):
    run(f"merge {folder}/recipe.yaml {tmp_path}/merged --quiet")
    flags = f"--json {tmp_path}/out/d.json --html {tmp_path}/d.html"
    assert run(f"diagnose {folder}/recipe.yaml {tmp_path}/merged {data_flags(folder)} {flags}") == 0
    assert "best weight" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "d.json").read_text())
    assert content["method"] == "averaging"
    assert [task["coefficient"] for task in content["tasks"]] == pytest.approx([0.5, 0.5], abs=1e-4)
    assert (tmp_path / "d.html").read_text().startswith("<!doctype html>")


def test_the_base_takes_data_of_its_own(folder, capsys, tmp_path):
    given = f"{folder}/recipe.yaml {data_flags(folder, one='one', base='two')}"
    assert run(f"diagnose {given} --quick --json {tmp_path}/d.json") == 0
    printed = capsys.readouterr()
    assert "the base's data" in printed.out
    assert "reading 4 models (" in printed.err
    assert "forward passes over 24 examples" in printed.err
    losses = json.loads((tmp_path / "d.json").read_text())["losses"]
    told = {(row["model"], row["task"]) for row in losses}
    assert told >= {("base", "base"), ("merged", "base"), ("merged", "one")}
    assert run(f"diagnose {given} --quick --quiet") == 0
    assert "forward passes" not in capsys.readouterr().err
    assert run(f"forecast {given}") == 2  # of a forecast the base is no part
    assert "names a task 'base'" in capsys.readouterr().err


def test_diagnose_by_flags_with_the_merge_first(folder, capsys, tmp_path):
    run(f"merge {folder}/recipe.yaml {tmp_path}/merged --quiet")
    tasks = f"--base {folder}/base --task {folder}/one --task {folder}/two,weight=1"
    assert run(f"diagnose {tmp_path}/merged {tasks} --quick") == 0
    assert "Nothing wrong was found" in capsys.readouterr().out


def test_forecast_saves_products_and_uses_them(folder, capsys, tmp_path):
    recipe = f"{folder}/recipe.yaml"
    assert run(f"forecast {recipe} {data_flags(folder)} --save {tmp_path}/p.json --pareto") == 0
    first = capsys.readouterr().out
    assert "curvature: ggn" in first
    assert "Pareto front" in first
    assert run(f"forecast {recipe} --products {tmp_path}/p.json") == 0
    assert capsys.readouterr().out.splitlines()[1:3] == first.splitlines()[1:3]


def test_forecast_writes_a_recipe_that_merges(folder, tmp_path):
    written = tmp_path / "auto.yaml"
    assert run(f"forecast {folder}/recipe.yaml {data_flags(folder)} --write {written} --upper 1") == 0
    weights = {task["name"]: task["weight"] for task in yaml.safe_load(written.read_text())["tasks"]}
    assert set(weights) == {"one", "two"}
    assert all(0 <= weight <= 1 for weight in weights.values())
    assert run(f"merge {written} {tmp_path}/merged --quiet") == 0


@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching"])
def test_weights_auto_from_data_from_products_and_from_a_written_recipe_agree(
    folder, tmp_path, method, capsys
):
    content = {"base": f"{folder}/base", "method": method, "weights": "auto", "base_curvature": 5.0}
    content["tasks"] = []
    for name in ("one", "two"):
        curvature = f"{tmp_path}/{name}.safetensors"
        assert run(f"estimate {folder}/{name} --data {folder}/{name}.jsonl -o {curvature}") == 0
        content["tasks"].append({"model": f"{folder}/{name}", "curvature": curvature, "name": name})
    recipe, written = tmp_path / "r.yaml", tmp_path / "w.yaml"
    recipe.write_text(yaml.safe_dump(content))
    span = "tau" if method == "task_arithmetic" else "preconditioned"
    saved = f"--save {tmp_path}/p.json --write {written}"
    assert run(f"forecast {recipe} --span {span} {saved} {data_flags(folder)}") == 0
    a, b, c = (tmp_path / name for name in "abc")
    assert run(f"merge {recipe} {a} --quiet {data_flags(folder)}") == 0
    recipe.write_text(yaml.safe_dump({**content, "products": "p.json"}))
    assert run(f"merge {recipe} {b} --quiet") == 0
    assert run(f"merge {written} {c} --quiet") == 0
    assert run(f"merge {recipe} --dry-run") == 0
    assert "weights are chosen when merging" in capsys.readouterr().out
    first = dict(open_checkpoint(a))
    for other in (b, c):
        assert all(torch.equal(first[name], value) for name, value in open_checkpoint(other).items())
    card = json.loads((a / "gradmatch.json").read_text())
    chosen = card["report"]["forecast"]
    assert chosen["span"] == span
    assert [t["weight"] for t in card["recipe"]["tasks"]] == list(chosen["weights"].values())
    assert any("weights chosen by forecast" in note for note in card["report"]["notes"])
    for merged in (a, ""):  # by the card's weights, or chosen again
        assert run(f"diagnose {recipe} {merged}") == 0


@pytest.mark.parametrize("command", ["diagnose", "forecast"])
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(f"{command} --help")
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out
