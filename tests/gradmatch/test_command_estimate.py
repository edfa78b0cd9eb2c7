"""`gradmatch estimate`, from the command line to the file."""

import subprocess
import sys

import pytest
import torch

from gradmatch.cli import main
from gradmatch.commands.estimate import METHODS, task_of
from gradmatch.estimators import Curvature, estimate
from gradmatch.estimators.estimation import ESTIMATORS
from tests import oracle
from tests.gradmatch.tiny import save_classifier, save_language_model, tokenizer

TEXTS = ["good film", "the plot was bad", "fine", "very dull", "not a great plot", "bright"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"{text},class{n % 2}\n" for n, text in enumerate(TEXTS)))
    return path


def test_a_model_that_is_not_there_is_said_at_once(tmp_path, reviews, capsys):
    save_classifier(tmp_path / "model")
    for name, text in (
        ("modl", "(did you mean 'model'?)"),
        ("model/config.json", "is a file; name the folder"),
    ):
        assert run(tmp_path / name, "--data", reviews, "-o", tmp_path / "c.safetensors") == 2
        assert text in capsys.readouterr().err


def run(*words):
    return main(["estimate", *map(str, words)])


def test_a_classifier_and_a_csv_file(tmp_path, reviews, capsys):
    model = save_classifier(tmp_path / "model")
    out = tmp_path / "c.safetensors"
    assert (
        run(tmp_path / "model", "--data", reviews, "-o", out, "--gradient", "--batch-size", 4, "--quiet") == 0
    )
    printed = capsys.readouterr().out
    assert f"{out}: fisher of" in printed
    assert "N = 6" in printed
    found = Curvature.load(out, model=model)
    encoded = dict(tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    expected = estimate(model, [{**encoded, "labels": torch.arange(6) % 2}], gradient=True, progress=False)
    assert oracle.relative_l1(found, expected) < 1e-5
    assert found.has_gradient
    assert found.info["labels"] == "exact expectation over labels"
    assert not (tmp_path / "c.safetensors.partial").exists()


def test_a_language_model_a_text_file_and_a_limit(tmp_path):
    model = save_language_model(tmp_path / "model")
    lines = tmp_path / "lines.txt"
    lines.write_text("\n\n".join(text for text in TEXTS if " " in text))
    out = tmp_path / "c.safetensors"
    words = (
        tmp_path / "model",
        "--data",
        lines,
        "-o",
        out,
        "--limit",
        3,
        "--method",
        "empirical_fisher",
        "--quiet",
    )
    assert run(*words) == 0
    found = Curvature.load(out, model=model)
    assert found.info["examples_seen"] == "3"
    assert found.num_examples == 4  # rows of the data, not of the sample
    assert found.info["likelihood"] == "causal_lm"


def test_adam(tmp_path):
    model = save_classifier(tmp_path / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 1])}
    model(**batch).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    out = tmp_path / "c.safetensors"
    words = (tmp_path / "model", "--adam", tmp_path / "optimizer.pt", "-o", out)
    assert run(*words, "--num-examples", 50, "--batch-size", 2) == 0
    found = Curvature.load(out)
    assert found.info["estimator"] == "adam"
    torch.testing.assert_close(found["classifier.weight"], 2 * model.classifier.weight.grad**2)


def test_adam_of_a_language_model_is_calibrated_by_rows(tmp_path, capsys):
    model = save_language_model(tmp_path / "model")
    lines = tmp_path / "lines.txt"
    lines.write_text("\n\n".join(text for text in TEXTS if " " in text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    ids = torch.ones(2, 3, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    words = (tmp_path / "model", "--adam", tmp_path / "optimizer.pt", "-o", tmp_path / "c.safetensors")
    assert run(*words, "--num-examples", 50, "--batch-size", 2) == 2
    assert "a mean over predicted tokens, and no file tells" in capsys.readouterr().err
    assert run(*words, "--data", lines, "--calibrate", 3) == 0
    assert "to the trace of the empirical Fisher of 3 examples" in capsys.readouterr().out
    assert Curvature.load(tmp_path / "c.safetensors").num_examples == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x.csv", "--method", "fischer"], "unknown method 'fischer'; did you mean 'fisher'?"),
        (["--data", "x.csv", "--adam", "o.pt"], "give either --data (to measure) or --adam"),
        ([], "give either --data (to measure) or --adam"),
        (["--adam", "o.pt", "--batch-size", 8], "--adam needs --num-examples"),
        (["--adam", "o.pt", "--num-examples", 5, "--calibrate", 4], "--calibrate needs both --adam"),
        (["--data", "x.csv", "--limit", "0"], "--examples must be at least 1, got 0"),
        (
            ["--data", "x.csv", "--method", "kfac", "--tolerance", "0.1"],
            "tolerance is not available for --method kfac",
        ),
        (
            ["--data", "x.csv", "--method", "kfac", "--gradient"],
            "gradient is not available for --method kfac",
        ),
        (["--data", "x.csv", "--tolerance", "2"], "relative error between 0 and 1"),
        (["--data", "x.csv", "--method", "ggn", "--reduction", "batch"], "right only for --method fisher"),
        (["--data", "x.csv"], "no data file x.csv"),
    ],
)
def test_errors_are_one_line_and_code_2(tmp_path, capsys, words, message):
    assert run("model", "-o", tmp_path / "c.safetensors", *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("curv.txt", "known by their ending; name it"),
        ("curv", "curv.safetensors"),
        ("folder.safetensors", "is a folder; name the file to write in it"),
    ],
)
def test_the_output_is_a_safetensors_file(tmp_path, capsys, name, message):
    (tmp_path / "folder.safetensors").mkdir()
    assert run("model", "-o", tmp_path / name, "--data", "x.csv") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_rows_without_text_are_left_out_aloud_and_others_keep_their_numbers(tmp_path, capsys):
    save_classifier(tmp_path / "model")
    data, out = tmp_path / "reviews.csv", tmp_path / "c.safetensors"
    data.write_text("text,label\n" + f",class0\n{TEXTS[0]},class1\n{TEXTS[1]},classX\n")
    assert run(tmp_path / "model", "--data", data, "-o", out, "--quiet") == 2
    err = capsys.readouterr().err
    assert "row 2: column 'label' holds the unknown label 'classX'" in err
    data.write_text(data.read_text().replace("classX", "class0"))
    assert run(tmp_path / "model", "--data", data, "-o", out, "--quiet") == 0
    printed = capsys.readouterr()
    assert (
        "text column 'text', label column 'label'\n1 of 3 rows have no text in column 'text'" in printed.out
    )
    assert "N = 2" in printed.out
    assert printed.err == ""


def test_methods_in_the_help_are_those_of_the_library():
    assert set(METHODS) == set(ESTIMATORS)


def test_an_existing_file_is_not_replaced(tmp_path, reviews, capsys):
    out = tmp_path / "c.safetensors"
    out.write_text("precious")
    assert run("model", "--data", reviews, "-o", out) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert out.read_text() == "precious"


def test_a_model_of_another_kind():
    class Config:
        architectures = ("BertModel",)

    with pytest.raises(ValueError, match="is saved as BertModel: pass --task"):
        task_of(Config, "model")


def test_help_needs_no_torch():
    code = "import sys; from gradmatch.cli import main\ntry: main(['estimate', '--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0
    assert "--standard-error" in found.stdout


def test_in_python_a_path_is_a_model_and_a_file_is_data(tmp_path, reviews):
    import gradmatch

    model = save_classifier(tmp_path / "model")
    found = gradmatch.estimate(tmp_path / "model", reviews, progress=False)
    encoded = {**tokenizer()(TEXTS, padding=True, return_tensors="pt"), "labels": torch.arange(6) % 2}
    expected = gradmatch.estimate(model, [encoded], progress=False)
    assert oracle.relative_l1(found, expected) < 1e-5
    assert found.num_examples == 6
    assert found.info["fingerprint"] == expected.info["fingerprint"]
    state = {name: value for name, value in model.state_dict().items() if name != "classifier.weight"}
    model.save_pretrained(tmp_path / "headless", state_dict=state)
    tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        gradmatch.estimate(tmp_path / "headless", reviews, progress=False)
