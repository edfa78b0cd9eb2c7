"""`gradmatch budget` on a tiny language model in files: the path, the budget, the report, and bad input."""

import json
import math
import re

import pytest
import torch

from gradmatch.estimators import estimate
from tests.command import run
from tests.gradmatch.tiny import text_llama

WORDS = ["<pad>", *["the", "cat", "sat", "on", "a", "mat", "you", "fool", "pig", "swine", "rain", "falls"]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """base/, toxic/, clean.safetensors, toxic.safetensors, clean.txt, toxic.txt."""
    folder = tmp_path_factory.mktemp("budget")
    torch.manual_seed(0)
    model, tokenizer = text_llama(WORDS)
    (folder / "clean.txt").write_text("the cat sat on a mat\nrain falls on the cat\n" * 3)
    (folder / "news.txt").write_text("the rain falls\na mat sat on the rain\n")
    (folder / "prompts.txt").write_text("the cat\nyou\n")
    (folder / "toxic.txt").write_text("you fool you pig\nyou swine sat on a fool\n" * 2)
    for name, side, steps in (("base", "clean", 20), ("toxic", "toxic", 5)):
        lines = (folder / f"{side}.txt").read_text().splitlines()
        encoded = tokenizer(lines, return_tensors="pt", padding=True)
        batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        estimate(model, [batch], samples=4, progress=False).save(folder / f"{side}.safetensors")
        if name == "base":
            estimate(model, [batch], method="kfac", progress=False).save(folder / "kfac.safetensors")
    return folder


def call(files, line="", task="toxic,curvature={}/toxic.safetensors"):
    given = f"--base {files}/base --task {files}/{task.format(files)}"
    return run(f"budget {given} --base-curvature {files}/clean.safetensors {line}")


def test_without_data_the_path_is_diagonal(files, capsys):
    assert call(files, "--alphas 0.1 0.2") == 0
    out = capsys.readouterr().out
    assert out.count("diagonal") == 4
    for text in ("largest alpha with at most 1 % clamped", "H0 norm", "no budget was given"):
        assert text in out
    assert "gradmatch subtract" not in out


def test_with_data_the_budget_is_kept(files, tmp_path, capsys):
    data = f"--retain {files}/clean.txt --remove {files}/toxic.txt"
    report = tmp_path / "removal.json"
    code = call(files, f"{data} --nats 0.05 --share 0.5 --method removal --report {report}")
    assert code == 0, capsys.readouterr().err
    content = json.loads(report.read_text())
    chosen = content["budget"]["alpha"]
    tried = {point["alpha"]: point for point in content["budget"]["path"]}
    assert 0 < chosen <= 1
    assert tried[chosen]["collateral"] <= 0.05
    assert tried[chosen]["measured_collateral"] <= 0.05
    assert content["report"]["alpha"] == chosen
    assert {point["collateral_by"] for point in content["path"]} == {"ggn"}
    assert content["chosen"]["measured_forgetting"] > 0
    assert content["data"]["retain"] == {"file": str(files / "clean.txt"), "examples": 6}
    out = capsys.readouterr()
    assert f"4 examples of {files / 'toxic.txt'}, " in out.out
    assert "tokens each: a nat per example is " in out.out
    assert "budget of 0.05 nats" in out.out
    assert "pass/s" in out.err or "s/pass" in out.err


def test_the_command_it_ends_with_removes_what_was_forecast(files, tmp_path, capsys):
    options = "--guard scale --base-weight 10 --alphas 0.3 --nats 100"
    assert call(files, f"{options} --report {tmp_path}/r.json") == 0
    printed = capsys.readouterr()
    assert "the collateral was not measured" in printed.err
    command = printed.out.strip().splitlines()[-1].partition("gradmatch ")[2]
    assert run(re.sub(r"\bOUT\b", f"{tmp_path}/cleaned", command)) == 0
    report = json.loads((tmp_path / "r.json").read_text())["report"]
    card = json.loads((tmp_path / "cleaned" / "gradmatch.json").read_text())
    moved = sum(tensor["norm_h0"] ** 2 for tensor in card["report"]["moved"].values())
    assert math.sqrt(moved) == pytest.approx(report["total"]["h0_norm"], rel=1e-4)
    assert card["report"]["clamped_share"] == pytest.approx(report["total"]["clamped"])


def test_a_guarded_removal_is_chosen_compared_read_and_written_with_its_cost(files, tmp_path, capsys):
    data = f"--retain {files}/clean.txt --beside {files}/news.txt --remove {files}/toxic.txt"
    given = f"budget --base {files}/base --task {files}/toxic --base-curvature {files}/kfac.safetensors --method guarded {data}"
    line = f"--alphas 1 4 --damping 0.01 0.1 --nats-per-token 0.1 --compare --prompts {files}/prompts.txt -o {tmp_path}/cleaned"
    assert run(f"{given} {line} --report {tmp_path}/r.json --quiet") == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "r.json").read_text())
    assert [one["method"] for one in content["compared"]] == ["negation", "guarded", "ascent"]
    for one in content["compared"]:
        for side in ("retain", "news"):
            before, after = (one["losses"][side][when] for when in ("before", "after"))
            assert after["mean"] - before["mean"] <= 0.1 + 1e-6
            assert after["low"] < after["mean"] < after["high"]
            assert after["perplexity"] == pytest.approx(math.exp(after["mean"]))
    for text in (
        "nats a token [",
        "perplexity",
        "prompt: 'the cat'",
        "  before:",
        "of each model (two-sided 5 %",
    ):
        assert text in out
    card = (tmp_path / "cleaned" / "README.md").read_text()
    for text in (
        "## Removed",
        "loss on news (news.txt)",
        "the step was spent on",
        "check the result with a scorer",
    ):
        assert text in card
    assert str(tmp_path) not in card
    chosen = content["choice"]
    assert {one["damping"] for one in chosen["tried"]} == {0.01, 0.1}
    written = json.loads((tmp_path / "cleaned" / "gradmatch.json").read_text())["report"]["removed"]
    assert written["weight"] == chosen["alpha"]


def test_an_ascent_needs_no_bad_model(files, tmp_path, capsys):
    given = f"--base {files}/base --base-curvature {files}/kfac.safetensors --method ascent --remove {files}/toxic.txt"
    assert run(f"budget {given} --retain {files}/clean.txt --nats 0.2 --quiet") == 0
    command = capsys.readouterr().out.strip().splitlines()[-1].partition("gradmatch ")[2]
    assert run(command.replace("OUT", f"{tmp_path}/cleaned") + " --steps 2 --quiet") == 0
    assert "ascent: theta0" in capsys.readouterr().out
    assert (tmp_path / "cleaned" / "model.safetensors").is_file()


ONE = "guarded --task {0}/toxic --base-curvature {0}/kfac.safetensors"
REFUSED = [
    (f"{ONE} --retain {{0}}/clean.txt --remove {{0}}/copy.txt --nats 1", "stand in both: what must stay cannot go"),
    (f"{ONE} --damping 0 --nats 1", "--damping must be positive"),
    ("guarded --task {0}/toxic --base-curvature {0}/toxic.safetensors --nats 1", "other weights"),
    ("guarded --task {0}/toxic --nats 1", "needs --base-curvature"),
    ("guarded --base-curvature {0}/kfac.safetensors --nats 1", "needs --task"),
    ("ascent --base-curvature {0}/kfac.safetensors --nats 1", "ascent needs to know what is to go"),
    (f"{ONE} --nats-per-token 1", "give --retain"),
    (f"{ONE} --retain {{0}}/clean.txt --beside {{0}}/news.txt --beside {{0}}/news.txt --nats 1", "names two of the data"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), REFUSED)
def test_what_a_budget_refuses_is_said_and_nothing_is_written(files, tmp_path, capsys, line, said):
    (files / "copy.txt").write_text((files / "clean.txt").read_text())
    assert run(f"budget --base {files}/base --method {line.format(files)} -o {tmp_path}/bad --quiet") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_a_model_without_probabilities_is_not_compared(files):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gradmatch.removal import continuations

    model, tokenizer = (
        kind.from_pretrained(files / "base") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    broken = {"model.norm.weight": torch.full_like(model.model.norm.weight, torch.nan)}
    with pytest.raises(ValueError, match="model 2 of 2 gives no probabilities"):
        continuations(model, tokenizer, [{}, broken], ["the cat"], tokens=2)
    one, other = continuations(model, tokenizer, [{}, {}], ["the cat", "you"], tokens=3)
    assert one == other
    assert bool(torch.isfinite(model.model.norm.weight).all())
    with pytest.raises(ValueError, match="no prompts"):
        continuations(model, tokenizer, [{}], [" "])


def test_what_cannot_be_removed_is_told_and_ends_with_1(files, capsys):
    assert call(files, f"--retain {files}/clean.txt --nats 1e-9 --share 0.5 --alphas 0.5") == 1
    assert "no alpha fits" in capsys.readouterr().out
    assert call(files, "--nats 1", task="base,curvature={}/clean.safetensors") == 1
    assert "there is nothing to remove" in capsys.readouterr().out


BAD = "--nats 0|--report absent/r.json|--nats 1 --alphas 0|--share 1.5|--examples 0|--max-length 1|--keep 0|--delta0 -1"


@pytest.mark.parametrize("line", [*BAD.split("|"), "--base-curvature -2", "--alphas -1", "--task absent"])
def test_bad_input_is_refused_before_any_data_is_read(files, monkeypatch, line):
    """What is said of it stands in test_refusals.py."""
    monkeypatch.setattr("gradmatch.commands.budget.objectives", lambda *_: pytest.fail("data was read"))
    assert call(files, f"--retain {files}/clean.txt {line}") == 2
