"""Selections: what the strategies take, what is refused without ending the search, budgets, logs that go on, forecasts."""

import copy
import json
import random

import numpy as np
import pytest
import torch
import transformers as tf

from gradmatch import GradmatchError, Task, merge, zoo
from gradmatch.zoo.scores import OnExamples
from gradmatch.zoo.strategies import STRATEGIES
from tests.command import run
from tests.gradmatch.cases import curvature, state, tuned
from tests.gradmatch.tiny import WORDS, save_classifier

BASE = {"w": torch.zeros(2)}
ZOO = {
    "a": {"w": torch.tensor([2.0, 0.0])},
    "b": {"w": torch.tensor([0.0, 2.0])},
    "c": {"w": torch.tensor([-9.0, 9.0])},
    "d": {"w": torch.tensor([1.2, 1.0])},
    "e": {"w": torch.tensor([0.9, 1.0])},
}


def near(merged):
    """Minus the distance to (1, 1): a loss turned round."""
    return -float((merged["w"] - 1.0).norm())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_climbs_leaves_out_what_harms_and_merges_what_it_says(strategy):
    found = zoo.select(BASE, ZOO, near, strategy)
    assert found.score > -0.21  # of d alone
    assert sum(found.weights.values()) == pytest.approx(1.0)
    assert near(found.merge()) == pytest.approx(found.score)
    assert near(merge(BASE, found.tasks, method="linear")) == pytest.approx(found.score)
    assert "c" in found.left_out
    assert found.left_out["c"].startswith("the score falls from")
    assert set(found.weights) | set(found.left_out) == set(ZOO)
    assert found.complete
    assert found.evaluations == sum(line["kind"] == "evaluation" for line in found.history)
    assert "left out c" in found.summary()
    assert json.loads(json.dumps(found.to_dict()))["score"] == found.score


def test_the_third_that_is_taken_has_a_third_and_a_rejected_one_leaves_no_trace():
    models = {
        name: {"w": torch.tensor([value, 0.0])}
        for name, value in {"x": 1.01, "bad": 50.0, "y": 0.97, "z": 1.04}.items()
    }
    found = zoo.select(BASE, models, lambda merged: -abs(float(merged["w"][0]) - 1))
    assert found.weights == pytest.approx({"x": 1 / 3, "y": 1 / 3, "z": 1 / 3})  # 1.01, then .99, then 1.007
    assert list(found.left_out) == ["bad"]


def test_a_loss_and_its_accuracy_give_the_same_soup_and_ties_go_by_name():
    def accuracy(merged):
        return 1 - min(1.0, float((merged["w"] - 1).norm()) / 100)

    for strategy in ("average", "exhaustive"):
        assert (
            zoo.select(BASE, ZOO, near, strategy).weights == zoo.select(BASE, ZOO, accuracy, strategy).weights
        )
    flat = zoo.select(BASE, dict(reversed(ZOO.items())), lambda _: 0.0)
    assert list(flat.weights) == ["a", "b", "c", "d", "e"]


def test_exhaustive_tries_every_pair_and_coefficient_ten_shares():
    found = zoo.select(BASE, ZOO, near, "exhaustive")
    pairs = [line for line in found.history if line["kind"] == "evaluation" and len(line["weights"]) == 2]
    assert len(pairs) == 4
    shares = zoo.select(BASE, {name: ZOO[name] for name in "ab"}, near, "coefficient")
    assert shares.weights == pytest.approx({"a": 0.5, "b": 0.5})
    assert shares.evaluations == 2 + 9


def broken(what):
    def score(merged):
        if float(merged["w"][0]) == 2.0:
            return what() if callable(what) else what
        return near(merged)

    return score


def raises():
    raise RuntimeError("no such benchmark\nand more")


@pytest.mark.filterwarnings("ignore:a candidate is refused")
@pytest.mark.parametrize(
    ("what", "why"),
    [
        (float("nan"), "its score is NaN"),
        (float("inf"), "its score is inf"),
        (None, "its score is None, which is no number"),
        ([], "its score is empty"),
        (raises, "RuntimeError: no such benchmark"),
    ],
)
def test_a_candidate_without_a_score_is_refused_and_the_search_goes_on(what, why):
    with pytest.warns(UserWarning, match="a candidate is refused"):
        found = zoo.select(BASE, ZOO, broken(what))
    assert why in found.left_out["a"]
    assert "a" not in found.weights
    line = next(line for line in found.history if line.get("why"))
    assert line["score"] is None


@pytest.mark.filterwarnings("ignore:a candidate is refused")
def test_models_that_are_destroyed_are_refused_whatever_their_score_would_be():
    nan = {"w": torch.tensor([torch.nan, 1.0])}
    found = zoo.select(BASE, {**ZOO, "nan": nan, "zero": {"w": torch.zeros(2)}}, lambda _: 1.0)
    assert "NaN" in found.left_out["nan"]
    assert found.left_out["zero"] == "all its weights are 0"
    with pytest.raises(GradmatchError, match=r"no candidate has a score .a: its score is NaN"):
        zoo.select(BASE, {"a": ZOO["a"]}, lambda _: float("nan"))


def test_the_callers_random_states_are_left_alone():
    def score(merged):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        return near(merged)

    torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002
    wanted = [torch.rand(1).item(), random.random(), np.random.rand()]  # noqa: NPY002
    torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002
    zoo.select(BASE, ZOO, score)
    assert [torch.rand(1).item(), random.random(), np.random.rand()] == wanted  # noqa: NPY002


def test_a_budget_ends_the_search_with_what_stands_and_a_log_goes_on(tmp_path):
    log, calls = tmp_path / "deep" / "log.jsonl", []

    def score(merged):
        calls.append(1)
        return near(merged)

    whole = zoo.select(BASE, ZOO, near)
    short = zoo.select(BASE, ZOO, score, budget=5, log=log)
    assert (len(calls), short.evaluations, short.complete) == (5, 5, False)
    assert any("budget ended" in why for why in short.left_out.values())
    assert "where the budget ended" in short.summary()
    with log.open("a") as file:
        file.write('{"kind": "evaluation", "key": "cut in ha')
    with pytest.warns(UserWarning, match="was not written whole"):
        more = zoo.select(BASE, ZOO, score, log=log)
    assert more.weights == whole.weights
    assert len(calls) == whole.evaluations  # nothing is paid for twice
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["kind"] == "begin"
    assert lines[-1]["kind"] == "result"
    again = zoo.select(BASE, ZOO, score, log=log)
    assert (again.weights, len(calls)) == (whole.weights, whole.evaluations)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"strategy": "coefficient"}, "strategy is 'average', here it is 'coefficient'"),
        ({"tasks": {**ZOO, "a": {"w": torch.tensor([3.0, 0.0])}}}, "models 'a' is"),
        ({"tasks": {name: ZOO[name] for name in "abc"}}, "models 'd' is"),
        ({"score": lambda merged: 0.0}, "score is"),
        ({"method": "task_arithmetic"}, "method is 'linear'"),
        ({"dtype": "float64"}, "options 'dtype' is None"),
        ({"base": {"w": torch.ones(2)}}, "base is"),
    ],
)
def test_a_log_of_another_search_is_refused(tmp_path, change, what):
    given = {"base": BASE, "tasks": ZOO, "score": near, "strategy": "average"}
    zoo.select(**given, log=tmp_path / "log")
    with pytest.raises(GradmatchError, match=rf"is the log of another search: its {what}"):
        zoo.select(**{**given, **change}, log=tmp_path / "log")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "greedy"}, "strategy is 'greedy' .did you mean 'greedy_soup'"),
        ({"budget": 0}, "budget is 0, and a search needs at least one evaluation"),
        ({"score": 3}, "score must be a function"),
        ({"score": lambda merged: (1.0, 2.0)}, "the score is 2 numbers"),
        ({"forecast": True}, "a has no curvature file to forecast by"),
        ({"tasks": []}, "no model was found"),
        ({"method": "tis"}, "no candidate has a score .a: unknown method 'tis'"),
    ],
)
@pytest.mark.filterwarnings("ignore:a candidate is refused")
def test_what_is_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        zoo.select(**{"base": BASE, "tasks": ZOO, "score": near, **change})


def test_a_log_that_is_none(tmp_path):
    (tmp_path / "log").write_text("thesis\n")
    with pytest.raises(GradmatchError, match="line 1: no line of a search's log"):
        zoo.select(BASE, ZOO, near, log=tmp_path / "log")
    with pytest.raises(IsADirectoryError, match="a log is a file"):
        zoo.select(BASE, ZOO, near, log=tmp_path)


def test_where_there_are_curvatures_forecasts_come_first():
    base = state(0)
    tasks, own = {}, {}
    for seed, name in enumerate("abcd", 1):
        own[name] = tuned(base, seed, 0.05 if name != "d" else 3.0)
        tasks[name] = Task(own[name], curvature(own[name], 1, 1000))
    goal = {key: sum(own[name][key] for name in "abc") / 3 for key in base}

    def score(merged):
        return -sum(float((merged[key] - goal[key]).square().sum()) for key in goal)

    found = zoo.select(base, tasks, score)
    assert set(found.weights) == {"a", "b", "c"}
    assert found.evaluations == 3  # one alone, two mixtures; seven without forecasts
    assert "forecast to cost the median task" in found.left_out["d"]
    assert zoo.select(base, tasks, score, forecast=False).weights == pytest.approx(found.weights)
    assert zoo.select(base, tasks, score, "coefficient").evaluations == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two fine-tunes and examples, in files."""
    top = tmp_path_factory.mktemp("classifiers")
    base = save_classifier(top / "base")
    for seed, scale in ((1, 0.3), (2, 0.3), (3, 30.0)):
        own = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.add_(
                    scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                )
        own.save_pretrained(top / "zoo" / f"m{seed}")
    rows = [f"{a} {b},{n % 2}" for n, (a, b) in enumerate((a, b) for a in WORDS[3:9] for b in WORDS[3:9])]
    (top / "d.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return top


def test_scores_of_a_file_are_the_accuracy_and_the_loss(folder):
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder / "zoo" / "m1").eval()
    rows = [line.split(",") for line in (folder / "d.csv").read_text().splitlines()[1:]]
    words = tf.AutoTokenizer.from_pretrained(folder / "base")
    with torch.inference_mode():
        logits = model(
            **words([text for text, _ in rows], return_tensors="pt", padding=True)
        ).logits.log_softmax(-1)
    labels = torch.tensor([int(label) for _, label in rows])
    accuracy = OnExamples(folder / "base", folder / "d.csv")
    assert accuracy(model.state_dict()) == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    loss = OnExamples(folder / "base", {"x": folder / "d.csv"}, "loss", batch_size=5)
    assert loss(model.state_dict()) == pytest.approx(
        float(logits[torch.arange(len(labels)), labels].mean()), rel=1e-5
    )
    assert accuracy.label.startswith("accuracy on data ")
    (folder / "other.csv").write_text((folder / "d.csv").read_text().replace("good good", "good fine"))
    assert OnExamples(folder / "base", folder / "other.csv").label != accuracy.label


def test_nan_outputs_have_no_score_though_all_labels_are_the_first_class(folder, tmp_path):
    (tmp_path / "zeros.csv").write_text("text,label\ngood,0\nbad,0\n")
    score = OnExamples(folder / "base", tmp_path / "zeros.csv")
    weights = tf.AutoModelForSequenceClassification.from_pretrained(folder / "base").state_dict()
    assert score(weights) >= 0
    weights["classifier.bias"] = torch.full_like(weights["classifier.bias"], torch.nan)
    with pytest.raises(GradmatchError, match="NaN or infinite, so it has no score"):
        score(weights)
    with pytest.raises(GradmatchError, match="metric is 'f1'"):
        OnExamples(folder / "base", tmp_path / "zeros.csv", "f1")
    with pytest.raises(GradmatchError, match="no data: name a file"):
        OnExamples(folder / "base", {})


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"zoo select {folder}/zoo --base {folder}/base --data {folder}/d.csv --metric loss --quiet "
    assert run(line + "--log l.jsonl --json -o out") == 0
    told = json.loads(capsys.readouterr().out)
    card = json.loads((tmp_path / "out" / "gradmatch.json").read_text())
    assert {task["name"] for task in card["recipe"]["tasks"]} == set(told["weights"])
    assert "m3" in told["left_out"]
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert OnExamples(folder / "base", folder / "d.csv", "loss")(merged) == pytest.approx(
        told["score"], rel=1e-5
    )
    assert run(line + "-o out") == 2
    assert "pass overwrite (--overwrite)" in capsys.readouterr().err
    assert run(line + f"--data {folder}/d.csv") == 2
    assert "--data names 'd' twice" in capsys.readouterr().err
    assert run(line + "--tasks arc") == 2
    assert "not both" in capsys.readouterr().err
    assert run(f"zoo select {folder}/zoo --data {folder}/d.csv") == 2
    assert "no base" in capsys.readouterr().err
    assert run(line + "--option t=3") == 2
    assert "linear has no option 't'" in capsys.readouterr().err
