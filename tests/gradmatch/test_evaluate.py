"""Models before and after a merge: losses by hand, paired differences, and the command."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

import gradmatch
from gradmatch import evaluate
from gradmatch.measure.evaluating import called
from tests.command import run
from tests.gradmatch.tiny import save_classifier, save_language_model, tuned


@pytest.fixture
def nets():
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    return {"base": base, "a": tuned(base, 1, 0.5)}, [(x[:25], y[:25]), (x[25:], y[25:])]


def test_losses_and_paired_differences_are_those_by_hand(nets):
    models, batches = nets
    found = evaluate(models, {"t": batches})
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    each = {}
    for name, model in models.items():
        logits = model(x).detach()
        each[name] = nn.functional.cross_entropy(logits, y, reduction="none").double()
        score = found.of(name, "t")
        assert score.loss == pytest.approx(float(each[name].mean()), rel=1e-5)
        assert score.accuracy == pytest.approx(float((logits.argmax(1) == y).float().mean()))
        assert score.accuracy_low < score.accuracy < score.accuracy_high
        assert (score.per, score.perplexity, score.examples) == ("example", None, 40)
    apart = each["a"] - each["base"]
    score = found.of("a", "t")
    assert score.difference == pytest.approx(float(apart.mean()), rel=1e-4)
    half = 2.0227 * float(apart.std()) / math.sqrt(40)  # Student's t with 39 degrees of freedom
    assert score.difference_high - score.difference == pytest.approx(half, rel=1e-3)
    assert found.of("base", "t").difference is None
    assert len(found.to_frame()) == 2
    assert "a" in found._repr_html_()
    assert repr(found) == "Evaluation(2 models, 1 tasks)"


def test_a_merge_is_a_model_with_the_structure_before_it(nets):
    models, batches = nets
    merged = gradmatch.merge(models["base"], [gradmatch.Task(models["a"])], method="averaging")
    found = evaluate({**models, "merged": merged}, {"t": batches})
    assert found.of("merged", "t").loss == pytest.approx(found.of("a", "t").loss, rel=1e-5)
    with pytest.raises(ValueError, match="merged is weights alone"):
        evaluate({"merged": merged}, {"t": batches})


@pytest.mark.parametrize(
    ("models", "data", "said"),
    [
        ([], {"t": [1]}, "give a list of models"),
        ("base", {"t": [1]}, "give a list of models"),
        (["base", "base"], {"t": [1]}, "base is given twice"),
    ],
)
def test_what_is_refused(models, data, said):
    with pytest.raises(ValueError, match=said):
        evaluate(models, data)


def test_data_that_do_not_fit_name_model_and_task(nets):
    with pytest.raises(ValueError, match="base on the data of 't'"):
        evaluate(nets[0], {"t": [(torch.randn(2, 7), torch.zeros(2, dtype=torch.long))]})


def test_models_are_called_by_as_much_of_their_path_as_tells_them_apart():
    assert list(called(["x/base", "y/base", "z/merged/"])) == ["x/base", "y/base", "merged"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_classifier("base")
    shutil.copytree("base", "a")
    tuned(model, 1, 0.3).save_pretrained("a")
    (tmp_path / "t.csv").write_text("text,label\n" + "good film,1\nbad plot,0\nvery dull,0\n" * 4)
    return tmp_path


def test_the_command(folders, capsys):
    card = {"report": {"forecast": {"rises_per_example": {"t": 0.125}}}}
    (folders / "a" / "gradmatch.json").write_text(json.dumps(card))
    assert run("evaluate base a --data t=t.csv --quiet") == 0
    told = capsys.readouterr().out
    assert "t: 12 examples, loss in nats per example" in told
    assert "0.125" in told
    assert run("evaluate base a --data t=t.csv --json --quiet") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["models"] == ["base", "a"]
    assert [row["forecast"] for row in content["rows"]] == [None, 0.125]


def test_language_models_are_told_per_token(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_language_model("lm")
    (tmp_path / "t.txt").write_text("good film\nthe plot was very dull\nnot bad\n")
    assert run("evaluate lm --data t=t.txt --json --quiet") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["per"] == "token"
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("evaluate base", "give --data TASK=FILE"),
        ("evaluate base --data t=t.csv --data t=t.csv", "--data names a task twice"),
        ("evaluate base --data t=u.csv", "u.csv"),
        ("evaluate base --data t.csv", "is not TASK=FILE"),
        ("evaluate bas --data t=t.csv", "did you mean 'base'"),
    ],
)
def test_the_command_refuses(folders, capsys, line, said):
    assert run(line) == 2
    assert said in capsys.readouterr().err
