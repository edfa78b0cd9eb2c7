"""`gradmatch diagnose` and `gradmatch forecast` on folders of a tiny transformers model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from gradmatch import open_checkpoint
from gradmatch.cli import main

WORDS = ["good", "bad", "fine", "poor", "film", "book", "a", "the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, one/ and two/ with tokenizers, data files, and a recipe."""
    root = tmp_path_factory.mktemp("models")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(root / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=13,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
    )
    model = BertForSequenceClassification(config)
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


def data_flags(folder):
    return [
        "--data",
        f"one={folder / 'one.jsonl'}",
        "--data",
        f"two={folder / 'two.jsonl'}",
        "--examples",
        "12",
    ]


def test_diagnose_from_files_alone(folder, capsys):
    assert main(["diagnose", str(folder / "recipe.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "Nothing wrong was found" in printed
    assert "note: no data" in printed


def test_diagnose_with_data_writes_json_and_a_page(folder, capsys, tmp_path):
    main(["merge", str(folder / "recipe.yaml"), str(tmp_path / "merged"), "--quiet"])
    flags = ["--json", str(tmp_path / "out" / "d.json"), "--html", str(tmp_path / "d.html")]
    code = main(
        ["diagnose", str(folder / "recipe.yaml"), str(tmp_path / "merged"), *data_flags(folder), *flags]
    )
    assert code == 0
    assert "best weight" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "d.json").read_text())
    assert content["method"] == "averaging"
    assert [task["coefficient"] for task in content["tasks"]] == pytest.approx([0.5, 0.5], abs=1e-4)
    assert (tmp_path / "d.html").read_text().startswith("<!doctype html>")


def test_the_base_takes_data_of_its_own(folder, capsys, tmp_path):
    flags = [
        "--data",
        f"one={folder / 'one.jsonl'}",
        "--data",
        f"base={folder / 'two.jsonl'}",
        "--examples",
        "12",
    ]
    recipe = str(folder / "recipe.yaml")
    assert main(["diagnose", recipe, *flags, "--quick", "--json", str(tmp_path / "d.json")]) == 0
    printed = capsys.readouterr()
    assert "the base's data" in printed.out
    assert "reading 4 models (" in printed.err
    assert "forward passes over 24 examples" in printed.err
    losses = json.loads((tmp_path / "d.json").read_text())["losses"]
    assert {(row["model"], row["task"]) for row in losses} >= {
        ("base", "base"),
        ("merged", "base"),
        ("merged", "one"),
    }
    assert main(["diagnose", recipe, *flags, "--quick", "--quiet"]) == 0
    assert "forward passes" not in capsys.readouterr().err
    assert main(["forecast", recipe, *flags]) == 2  # of a forecast the base is no part
    assert "names a task 'base'" in capsys.readouterr().err


def test_diagnose_by_flags_with_the_merge_first(folder, capsys, tmp_path):
    main(["merge", str(folder / "recipe.yaml"), str(tmp_path / "merged"), "--quiet"])
    tasks = ["--task", str(folder / "one"), "--task", f"{folder / 'two'},weight=1"]
    assert (
        main(["diagnose", str(tmp_path / "merged"), "--base", str(folder / "base"), *tasks, "--quick"]) == 0
    )
    assert "Nothing wrong was found" in capsys.readouterr().out


def test_forecast_saves_products_and_uses_them(folder, capsys, tmp_path):
    saved = ["--save", str(tmp_path / "p.json")]
    recipe = str(folder / "recipe.yaml")
    assert main(["forecast", recipe, *data_flags(folder), *saved, "--pareto"]) == 0
    first = capsys.readouterr().out
    assert "curvature: ggn" in first
    assert "Pareto front" in first
    assert main(["forecast", recipe, "--products", str(tmp_path / "p.json")]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[1:3] == first.splitlines()[1:3]


def test_forecast_writes_a_recipe_that_merges(folder, capsys, tmp_path):
    recipe = str(folder / "recipe.yaml")
    written = tmp_path / "auto.yaml"
    assert main(["forecast", recipe, *data_flags(folder), "--write", str(written), "--upper", "1"]) == 0
    weights = {task["name"]: task["weight"] for task in yaml.safe_load(written.read_text())["tasks"]}
    assert set(weights) == {"one", "two"}
    assert all(0 <= weight <= 1 for weight in weights.values())
    assert main(["merge", str(written), str(tmp_path / "merged"), "--quiet"]) == 0
    assert main(["forecast", recipe, "--write", "x.yaml", "--group", "a"]) == 2
    assert "--write and --group do not go together" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching"])
def test_weights_auto_from_data_from_products_and_from_a_written_recipe_agree(
    folder, tmp_path, method, capsys
):
    content = {
        "base": str(folder / "base"),
        "method": method,
        "weights": "auto",
        "base_curvature": 5.0,
        "tasks": [],
    }
    for name in ("one", "two"):
        assert (
            main(
                [
                    "estimate",
                    str(folder / name),
                    "--data",
                    str(folder / f"{name}.jsonl"),
                    "-o",
                    str(tmp_path / f"{name}.safetensors"),
                ]
            )
            == 0
        )
        content["tasks"].append(
            {"model": str(folder / name), "curvature": str(tmp_path / f"{name}.safetensors"), "name": name}
        )
    recipe, products, written = (str(tmp_path / name) for name in ("r.yaml", "p.json", "w.yaml"))
    Path(recipe).write_text(yaml.safe_dump(content))
    span = "tau" if method == "task_arithmetic" else "preconditioned"
    forecast = ["forecast", recipe, "--span", span, "--save", products, "--write", written]
    assert main([*forecast, *data_flags(folder)]) == 0
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main(["merge", recipe, a, "--quiet", *data_flags(folder)]) == 0
    Path(recipe).write_text(yaml.safe_dump({**content, "products": "p.json"}))
    assert main(["merge", recipe, b, "--quiet"]) == 0
    assert main(["merge", written, c, "--quiet"]) == 0
    assert main(["merge", recipe, "--dry-run"]) == 0
    assert "weights are chosen when merging" in capsys.readouterr().out
    first = dict(open_checkpoint(a))
    for other in (b, c):
        assert all(torch.equal(first[name], value) for name, value in open_checkpoint(other).items())
    card = json.loads((tmp_path / "a" / "gradmatch.json").read_text())
    assert card["report"]["forecast"]["span"] == span
    assert [t["weight"] for t in card["recipe"]["tasks"]] == list(
        card["report"]["forecast"]["weights"].values()
    )
    assert any("weights chosen by forecast" in note for note in card["report"]["notes"])
    for merged in ([a], []):  # by the card's weights, or chosen again
        assert main(["diagnose", recipe, *merged]) == 0


def test_weights_auto_without_anything_to_choose_from(folder, capsys):
    for command in (
        ["merge", str(folder / "recipe.yaml"), "x"],
        ["merge", str(folder / "recipe.yaml"), "--dry-run"],
    ):
        assert main([*command, "--weights", "auto", "--method", "task_arithmetic"]) == 2
        assert "--weights auto (in recipe.yaml: `weights: auto`) needs data" in capsys.readouterr().err


def test_errors_have_no_traceback(folder, capsys):
    recipe = str(folder / "recipe.yaml")
    cases = [
        (["diagnose"], "nothing to look at"),
        (["forecast", recipe], "nothing to choose weights from"),
        (["diagnose", recipe, "--data", "one"], "is not TASK=FILE"),
        (["diagnose", recipe, "--data", f"eno={folder / 'one.jsonl'}"], "names a task 'eno'"),
        (["diagnose", recipe, "--data", "one=/nowhere.jsonl"], "no data file /nowhere.jsonl"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert "Traceback" not in printed.err
        assert printed.out == ""


def test_help_explains(capsys):
    for command in ("diagnose", "forecast"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "examples:" in capsys.readouterr().out
