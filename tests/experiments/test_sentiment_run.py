"""The whole pipeline on a tiny random model and synthetic texts: fine-tune, estimate, merge, evaluate, say the mismatch."""

import json
import math
import shutil

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experiments import running
from experiments.__main__ import main
from experiments.records import of_kind, read_records


@pytest.fixture
def run(results, tiny_config, capsys):
    """Run the command on the tiny config; returns its exit code, output and errors."""

    def command(*overrides, where=results):
        code = main(["run", str(tiny_config), *overrides, "--results", str(where), "--debug"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def without_interval(record):
    macro = {key: value for key, value in record["metrics"]["macro"].items() if key not in ("low", "high")}
    return {**record["metrics"], "macro": macro}


def test_a_run_gives_records_a_table_and_a_model(run, results):
    code, out, err = run()
    assert code == 0, err
    records = read_records(results / "tiny.jsonl")
    models = [record["model"] for record in of_kind(records, "evaluation")]
    assert models == ["base", "books", "songs", "joint", "AM", "TA", "GM", "GM*"]
    for record in of_kind(records, "evaluation"):
        assert set(record["metrics"]) == {"films", "books", "songs", "macro", "per_example", "tasks"}
        assert 0 <= record["metrics"]["macro"]["accuracy"] <= 1
        assert {"commit", "versions", "machine", "seconds", "seed", "key"} <= set(record)
        if record["role"] in ("merge", "joint"):
            assert math.isfinite(record["mismatch"]["total"])
            assert set(record["mismatch"]["tasks"]) == {"books", "songs"}
    (comparison,) = of_kind(records, "comparison")
    assert comparison["low"] <= comparison["difference"] <= comparison["high"]
    by_model = {record["model"]: record for record in of_kind(records, "evaluation")}
    for sweep in of_kind(records, "sweep"):  # alpha = 1 is the merge itself
        assert without_interval(sweep["points"][1]) == without_interval(by_model[sweep["model"]])
        for point in sweep["points"]:
            assert set(point["forecast"]) == {"books", "songs", "mean"}
    chosen = next(record["choice"] for record in records if record.get("model") == "GM*")
    best = min(chosen["tried"], key=lambda cell: cell["nll"])
    assert chosen["chosen"] == {"base_weight": best["value"]}
    assert "GM " in out
    assert "GM - TA, tasks" in out
    assert "4 merges are too few" in out
    (data,) = of_kind(records, "data")
    assert sum(data["rows"]["books"]["train"].values()) == 168
    assert "over alpha from 0.5 to 1" in out
    assert "at the alpha of each seed's lowest forecast" in out
    merged = next(record["folder"] for record in records if record.get("model") == "GM")
    assert merged in out
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    tokens = AutoTokenizer.from_pretrained(merged)("good film", return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 2)


def test_a_second_run_does_nothing_and_says_the_same(run, results, monkeypatch):
    run()
    before = (results / "tiny.jsonl").read_bytes()
    monkeypatch.setattr(running, "execute", None)  # nothing may run
    code, out, err = run()
    assert (code, err) == (0, "")
    assert (results / "tiny.jsonl").read_bytes() == before
    assert "macro" in out


def test_a_changed_option_runs_just_what_depends_on_it(run, results):
    run()
    code, _, err = run("delta0=1e-3", "name=changed")
    assert code == 0
    ran = {
        line.split("] ")[1].split(":")[0]
        for line in err.splitlines()
        if line.startswith("[") and " s" in line[-3:]
    }
    names = {name.removeprefix("sentiment/").removeprefix("seed0/") for name in ran}
    assert {"merge-gm", "evaluate-gm", "mismatch-gm", "choose-gm_", "compare-gm-ta"} <= names
    assert not names & {"data", "base", "books", "songs", "joint", "curvature-base", "gradient-books"}
    assert not names & {
        "mismatch-joint",
        "mismatch-ta",
    }  # what the floor does to their norm is read off a table


def test_the_same_seed_gives_the_same_numbers(run, tmp_path, results):
    run()
    run(where=tmp_path / "again")
    first, second = (read_records(folder / "tiny.jsonl") for folder in (results, tmp_path / "again"))
    assert [record.get("metrics") for record in first] == [record.get("metrics") for record in second]
    assert [record.get("mismatch") for record in first] == [record.get("mismatch") for record in second]


def test_a_merge_that_fails_loses_only_itself(run, results):
    run()
    code, out, err = run(  # the words that no text holds have no curvature, and there is no floor
        "merges.R.method=fisher", "merges.R.options.delta0=0", "name=with_failure"
    )
    assert code == 1
    assert "merge-r failed" in err
    models = [record.get("model") for record in read_records(results / "with_failure.jsonl")]
    assert "GM" in models
    assert "R" not in models
    assert "GM " in out


def test_regmean_has_its_gram_matrices_and_a_floor_is_chosen(run, results):
    run()
    chosen = "merges.M={method: measured, choose: {delta0: [1.0e+3, 1.0e+5]}}"
    code, _, err = run("merges.R.method=regmean", chosen, "name=more")
    assert code == 0, err
    records = {record.get("model"): record for record in read_records(results / "more.jsonl")}
    assert records["M"]["choice"]["chosen"]["delta0"] in (1e3, 1e5)
    assert (
        records["R"]["metrics"] != records["AM"]["metrics"]
        or records["R"]["mismatch"] != records["AM"]["mismatch"]
    )


def test_a_rule_for_two_models_is_refused_for_three(tiny_config):
    from experiments.config import ConfigError, load

    load(tiny_config, ["merges.S.method=slerp"])
    data = "data={source: vader, base: movies, tasks: [amazon, nyt, tweets]}"
    with pytest.raises(ConfigError, match="merge 'S': slerp takes 2 to 2 models, but there are 3 tasks"):
        load(tiny_config, ["merges.S.method=slerp", data])


def test_dry_run_list_and_faults(tiny_config, tmp_path, capsys):
    common = ["--results", str(tmp_path / "none")]
    configs = ["--configs", str(tiny_config.parent)]
    assert main(["run", str(tiny_config), "--dry-run", *common]) == 0
    out = capsys.readouterr().out
    assert "sentiment/seed0/merge-gm" in out
    assert "to run, about" in out
    assert not (tmp_path / "none").exists()
    assert main(["list", *configs]) == 0
    assert "tiny: one core, 0 minutes" in capsys.readouterr().out
    assert main(["list", "--configs", str(tmp_path / "none")]) == 2
    assert "no configs in" in capsys.readouterr().err
    assert main(["run", str(tiny_config), "sedes=[1]", *common]) == 2
    assert "did you mean 'seeds'?" in capsys.readouterr().err
    assert main(["demo", *common, *configs]) == 2
    assert "no config at" in capsys.readouterr().err


def test_nothing_works_without_a_model(tiny_config, tmp_path, capsys):
    code = main(["run", str(tiny_config), "encoder=no/such-model", "--results", str(tmp_path)])
    assert code == 2
    last = capsys.readouterr().err.split("error: ")[1]
    assert last.startswith("stage sentiment/data failed: cannot load a model from no/such-model")
    assert "encoder=encoder stands in for it" in last


def test_data_that_change_are_read_again(tiny_config, tiny_texts, tmp_path):
    from experiments.config import load
    from experiments.studies.cells import Cells

    folder = shutil.copytree(tiny_texts, tmp_path / "own")
    config = load(tiny_config, [f"data.source={folder}"])
    before = Cells(config).data["train"].key
    corpus = folder / "books.jsonl"
    corpus.write_text(corpus.read_text() + corpus.read_text().splitlines()[0] + "\n")
    assert Cells(config).data["train"].key != before


def test_training_keeps_the_optimizer_and_says_its_losses(run, results):
    import torch

    run()
    folder = next((results / "stages" / "sentiment" / "seed0").glob("base-*/optimizer.pt")).parent
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(state["state"][0])
    card = json.loads((folder / "training.json").read_text())
    assert card["precision"] == "float32"
    assert [point["step"] for point in card["losses"]] == list(range(1, 11))


def test_bfloat16_is_used_where_it_is_asked_for_or_fast(monkeypatch):
    import torch

    from experiments.precision import uses_bfloat16

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert [uses_bfloat16(name) for name in ("auto", "bfloat16", "float32")] == [fast, True, False]


def test_a_folder_without_a_model_says_what_stands_in(tmp_path):
    from experiments.models import load_classifier

    with pytest.raises(FileNotFoundError, match=r"cannot load a model from .*encoder=encoder stands in"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("override", "changed", "kept"),
    [
        (
            "data.test=100",
            {"data-test", "evaluate-gm", "sweep-ta-1"},
            {"base", "books", "curvature-base", "merge-gm", "choose-gm_", "mismatch-gm"},
        ),
        (
            "data.validation=20",
            {"data-validation", "choose-gm_", "merge-gm_"},
            {"base", "merge-gm", "evaluate-gm"},
        ),
        (
            "delta0=1e-3",
            {"merge-gm", "choose-gm_"},
            {"merge-ta", "merge-am", "evaluate-ta", "sweep-ta-1", "curvature-base"},
        ),
        ("sweep.alphas=[0.5, 2.0]", {"sweep-ta-2"}, {"sweep-ta-0_5", "merge-gm"}),
        ("fisher.examples=25", {"curvature-base", "merge-gm"}, {"merge-ta", "evaluate-ta", "gradient-books"}),
    ],
)
def test_a_change_plans_what_depends_on_it_alone(tiny_config, tmp_path, tiny_texts, override, changed, kept):
    """On packaged texts: of one's own, a count is taken from what would be trained on."""
    from experiments.config import load
    from experiments.pipeline import in_order
    from experiments.studies.cells import Cells

    def planned(*overrides):
        given = ["~data.source", "data.base=movies", "data.tasks=[amazon, nyt]", *overrides]
        content = load(tiny_config, given)
        return {s.name.split("/")[-1]: s.key for s in in_order(Cells(content).all())}

    before, after = planned(), planned(override)
    different = {name for name in after if before.get(name) != after[name]}
    kept = {{"books": "amazon", "gradient-books": "gradient-amazon"}.get(name, name) for name in kept}
    assert changed <= different
    assert not kept & different
    assert kept <= set(after)
