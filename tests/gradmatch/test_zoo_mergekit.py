"""Configs of mergekit-evolve run as they are; scores of lm-eval's tasks, local ones without network, and their traps."""

import functools
import json

import pytest
import torch
import yaml

from gradmatch import GradmatchError, Task, merge, zoo
from gradmatch.recipes.mergekit.evolving import read_evolving
from gradmatch.zoo.tasks import OnTasks, Told, parse_told
from tests.command import run
from tests.gradmatch.tiny import save_language_model, tuned


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """A language model, two fine-tunes, and a multiple-choice task in a folder."""
    top = tmp_path_factory.mktemp("evolve")
    base = save_language_model(top / "base")
    for seed in (1, 2):
        save_language_model(top / f"m{seed}")
        tuned(base, seed, 0.3).save_pretrained(top / f"m{seed}")
    (top / "tasks").mkdir()
    rows = [
        {"text": f"the film was {a}", "gold": n % 2}
        for n, a in enumerate(["good", "bad", "fine", "dull", "great", "poor"] * 2)
    ]
    rows.sort(key=lambda row: row["gold"])
    (top / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(top)
    return top


def write_task(top, prompt="{{text}}", **more):
    task = {
        "task": "films", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(top / "tasks" / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": prompt, "doc_to_target": "gold",
        "doc_to_choice": ["good", "bad"], "metric_list": [{"metric": "acc"}], **more,
    }  # fmt: skip
    (top / "tasks" / "films.yaml").write_text(yaml.safe_dump(task))


GENOME = {"models": ["m1", "m2"], "merge_method": "linear", "base_model": "base"}


def config(top, genome=(), **more):
    content = {"genome": {**GENOME, **dict(genome)}, "tasks": [{"name": "films"}], **more}
    (top / "evolve.yml").write_text(yaml.safe_dump(content))
    return read_evolving(top / "evolve.yml")


@pytest.mark.parametrize(
    ("genome", "numbers"),
    [
        ({}, 2),
        ({"merge_method": "task_arithmetic", "filters": ["mlp", "attn"]}, 6),
        ({"merge_method": "ties"}, 4),  # a weight and a density each
        ({"merge_method": "dare_ties", "layer_granularity": 1}, 12),  # embeddings, the layer, norm
        ({"merge_method": "task_arithmetic", "layer_granularity": 1, "smooth": True}, 2),
        ({"merge_method": "slerp"}, 2),
    ],
)
def test_every_method_is_searched_over_the_numbers_of_its_genome(top, genome, numbers):
    asked = config(top, genome)
    assert len(asked.space.bounds()) == numbers
    assert asked.start == "uniform"
    score = lambda merged: float(merged["transformer.h.0.mlp.c_fc.weight"].float().mean())  # noqa: E731
    found = zoo.evolve(
        asked.base, asked.models, score, trials=3, space=asked.space, start=asked.start, **asked.options
    )
    assert found.trials == 3
    tasks = [Task(asked.models[t.name], weight=t.weight, name=t.name, options=t.options) for t in found.tasks]
    again = merge(asked.base, tasks, method=found.method, **found.options)
    assert score(again) == found.score
    assert next(iter(again.values())).dtype == torch.bfloat16


def test_what_a_config_says_is_taken_over(top):
    asked = config(
        top, {"normalize": False, "allow_negative_weights": True}, limit=4, num_fewshot=2, random_init=True, apply_chat_template=False, fewshot_as_multiturn=False,
        tasks=[{"name": "films", "weight": -1.0, "metric": "acc_norm,none"}],
    )  # fmt: skip
    assert asked.settings == {"limit": 4, "shots": 2, "chat": False, "multiturn": False}
    assert asked.scored == [Told("films", "acc_norm,none", -1.0)]
    assert asked.start == "random"
    assert next(iter(asked.space.bounds().values())) == (-1.0, 1.0)
    assert asked.space.normalize is False
    assert any("shuffle" in note for note in asked.notes)


@pytest.mark.parametrize(
    ("genome", "message"),
    [
        ({"layer_granularity": 3}, "layer_granularity is 3, which does not divide the 1 layers"),
        ({"merge_method": "ties", "base_model": None}, "ties needs a base_model"),
        (
            {"merge_method": "slerp", "models": ["m1", "m2", "base"]},
            "slerp goes between two models, and 3 are named",
        ),
        ({"modls": []}, "unknown key 'genome.modls'"),
        ({"merge_method": "della"}, "genome.merge_method: Input should be"),
    ],
)
def test_what_is_refused(top, genome, message):
    with pytest.raises(GradmatchError, match=message):
        config(top, genome)


def test_tasks_on_a_command_line():
    assert parse_told("arc") == Told("arc")
    assert parse_told("arc,metric=acc_norm,none,weight=-2") == Told("arc", "acc_norm,none", -2.0)
    with pytest.raises(GradmatchError, match="the weight is no number"):
        parse_told("arc,weight=x")


def test_without_lm_eval_it_is_told(top, monkeypatch):
    monkeypatch.setattr("gradmatch.zoo.tasks.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lm-eval is not installed; pip install 'gradmatch\[lm-eval\]'"):
        OnTasks(top / "base", ["films"])


class TestTasks:
    """With lm-eval installed; the one task lies in a folder, its rows in a file."""

    @pytest.fixture(autouse=True)
    def installed(self, top, monkeypatch):
        pytest.importorskip("lm_eval")
        write_task(top)

    def made(self, top, **more):
        return OnTasks(top / "base", ["films"], include=top / "tasks", **more)

    def test_the_score_is_the_share_of_right_choices_and_follows_the_prompt(self, top):
        weights = dict(zoo.finding.open_checkpoint(top / "m1"))
        score = self.made(top)
        first = score(weights)
        assert 0 <= first <= 1
        assert score(weights) == first
        write_task(top, prompt="not {{text}} was")
        other = self.made(top)
        assert other.label != score.label
        assert isinstance(other(weights), float)

    def test_nan_has_no_score_though_it_would_count_as_the_first_choice(self, top):
        weights = {name: value.clone() for name, value in zoo.finding.open_checkpoint(top / "m1").items()}
        weights["transformer.ln_f.bias"][0] = torch.nan
        with pytest.raises(GradmatchError, match="NaN or infinite, so it has no score"):
            self.made(top)(weights)

    def test_a_limit_draws_over_the_whole_task_and_is_recorded(self, top):
        drawn = self.made(top, limit=6, seed=1).drawn["films"]
        assert len(drawn) == 6
        assert drawn != list(range(6))
        assert self.made(top, limit=6, seed=1).drawn["films"] == drawn

    def test_metrics_tasks_and_shots_that_are_not_there(self, top, monkeypatch):
        from lm_eval.tasks import TaskManager

        own = functools.partial(
            TaskManager, include_defaults=False
        )  # reading thousands of task files takes a minute
        monkeypatch.setattr(
            "lm_eval.tasks.TaskManager", lambda include_path, **_: own(include_path=include_path)
        )
        weights = dict(zoo.finding.open_checkpoint(top / "m1").items())
        with pytest.raises(GradmatchError, match="task 'films' has no metric 'f1,none'; it has acc,none"):
            OnTasks(top / "base", [Told("films", "f1,none")], include=top / "tasks")(weights)
        with pytest.raises(GradmatchError, match=r"lm-eval knows no task 'flims' .did you mean 'films'"):
            OnTasks(top / "base", ["flims"], include=top / "tasks")
        write_task(top, num_fewshot=0)
        with pytest.raises(GradmatchError, match="task 'films' fixes its shots at 0, and 3 are asked for"):
            self.made(top, shots=3)

    def test_a_config_runs_from_the_command(self, top, tmp_path, capsys, monkeypatch):
        config(top, {}, apply_chat_template=False)
        monkeypatch.chdir(tmp_path)
        line = f"zoo evolve --config {top}/evolve.yml --include {top}/tasks --trials 2 --quiet -o out --json"
        assert run(line) == 0
        told = capsys.readouterr().out
        assert json.loads(told[told.index("{") :])["trials"] == 2
        assert (tmp_path / "out" / "config.json").is_file()
