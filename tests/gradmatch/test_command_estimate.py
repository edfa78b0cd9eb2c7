"""`gradmatch estimate`, from the command line to the file."""

import subprocess
import sys

import pytest
import torch

from gradmatch.commands.estimate import METHODS, task_of
from gradmatch.estimators import Curvature, estimate
from gradmatch.estimators.estimation import ESTIMATORS
from tests import oracle
from tests.command import run
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


def estimated(line):
    return run(f"estimate {line}")


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(text for text in TEXTS if " " in text))
    return path


def stepped(model, folder, **batch):
    """Saves AdamW's state after one step at learning rate 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(**batch).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def test_a_classifier_and_a_csv_file(tmp_path, reviews, capsys):
    model = save_classifier(tmp_path / "model")
    out = tmp_path / "c.safetensors"
    assert estimated(f"{tmp_path}/model --data {reviews} -o {out} --gradient --batch-size 4 --quiet") == 0
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


def test_a_language_model_a_text_file_and_a_limit(tmp_path, lines):
    model = save_language_model(tmp_path / "model")
    out = tmp_path / "c.safetensors"
    options = "--limit 3 --method empirical_fisher --quiet"
    assert estimated(f"{tmp_path}/model --data {lines} -o {out} {options}") == 0
    found = Curvature.load(out, model=model)
    assert found.info["examples_seen"] == "3"
    assert found.num_examples == 4  # rows of the data, not of the sample
    assert found.info["likelihood"] == "causal_lm"


def test_adam(tmp_path):
    model = save_classifier(tmp_path / "model")
    stepped(model, tmp_path, input_ids=torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 1]))
    line = f"{tmp_path}/model --adam {tmp_path}/optimizer.pt -o {tmp_path}/c.safetensors"
    assert estimated(f"{line} --num-examples 50 --batch-size 2") == 0
    found = Curvature.load(tmp_path / "c.safetensors")
    assert found.info["estimator"] == "adam"
    torch.testing.assert_close(found["classifier.weight"], 2 * model.classifier.weight.grad**2)


def test_adam_of_a_language_model_is_calibrated_by_rows(tmp_path, lines, capsys):
    ids = torch.ones(2, 3, dtype=torch.long)
    stepped(save_language_model(tmp_path / "model"), tmp_path, input_ids=ids, labels=ids)
    line = f"{tmp_path}/model --adam {tmp_path}/optimizer.pt -o {tmp_path}/c.safetensors"
    assert estimated(f"{line} --num-examples 50 --batch-size 2") == 2
    assert "a mean over predicted tokens, and no file tells" in capsys.readouterr().err
    assert estimated(f"{line} --data {lines} --calibrate 3") == 0
    assert "to the trace of the empirical Fisher of 3 examples" in capsys.readouterr().out
    assert Curvature.load(tmp_path / "c.safetensors").num_examples == 4


def test_rows_without_text_are_left_out_aloud_and_others_keep_their_numbers(tmp_path, capsys):
    save_classifier(tmp_path / "model")
    data = tmp_path / "reviews.csv"
    data.write_text("text,label\n" + f",class0\n{TEXTS[0]},class1\n{TEXTS[1]},classX\n")
    line = f"{tmp_path}/model --data {data} -o {tmp_path}/c.safetensors --quiet"
    assert estimated(line) == 2
    assert "row 2: column 'label' holds the unknown label 'classX'" in capsys.readouterr().err
    data.write_text(data.read_text().replace("classX", "class0"))
    assert estimated(line) == 0
    printed = capsys.readouterr()
    said = "text column 'text', label column 'label'\n1 of 3 rows have no text in column 'text'"
    assert said in printed.out
    assert "N = 2" in printed.out
    assert printed.err == ""


def test_methods_in_the_help_are_those_of_the_library():
    assert set(METHODS) == set(ESTIMATORS)


def test_an_existing_file_is_not_replaced(tmp_path, reviews):
    out = tmp_path / "c.safetensors"
    out.write_text("precious")
    assert estimated(f"model --data {reviews} -o {out}") == 2
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
