"""The study of failures built on purpose: its stage on a few cases, its table, its config."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import config as configs
from experiments.diagnosis import encoder, forecasting, scores, tiny
from experiments.diagnosis.cases import CASES, HEALTHY, VARIANTS, reordered
from experiments.diagnosis.confusion import diagnose_case, diagnose_cases
from experiments.studies import diagnosis, forecast
from gradmatch.estimators import estimate
from gradmatch.measure.forecast import Products

QUICK = ("a lucky NaN", "permuted neurons", "curvature of the wrong model", "healthy: averaging")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    diagnose_cases(folder, seed=0, cases=QUICK)
    return json.loads((folder / "cases.json").read_text())


def test_stage_finds_these_causes(stage):
    assert [(row["case"], row["right"]) for row in stage] == [(case, True) for case in QUICK]
    assert all(row["right_subject"] for row in stage if row["expected"] != HEALTHY)


def test_table_counts_right_wrong_and_false_alarms(stage):
    rows = [{**row, "kind": "case", "seed": 0, "split": "check"} for row in stage]
    rows.append({**rows[0], "seed": 1, "found": "other_base", "right": False})
    rows.append({**rows[-2], "seed": 1, "found": "weight_too_large", "right": False})
    text = diagnosis.report(rows)
    assert "other seeds (0, 1)" in text
    encoders = [{**rows[0], "split": split, "variant": False} for split in ("encoder", "encoder development")]
    assert "encoders, looked at (0)" in diagnosis.report(encoders)
    assert "encoders, other seeds (0)" in diagnosis.report(encoders)
    assert "a lucky NaN" in text
    assert "1/2    other_base" in text
    assert "true cause first in 3 of 4 failures (75%)" in text
    assert "false alarms in 1 of 2 healthy merges" in text


def test_config_runs_every_case_on_other_seeds_than_the_rules_were_set_on():
    config = configs.load(Path("configs/diagnosis.yaml"))
    assert not set(config.development) & set(config.seeds)
    stages = diagnosis.cells(config)
    assert list(stages) == [*config.development, *config.seeds]
    assert all(stage.settings["cases"] == [*CASES, *VARIANTS] for stage in stages.values())
    assert len(diagnosis.stages(config)) == len(stages) + 3  # the encoders of three seeds
    assert len(diagnosis.stages(configs.load(Path("configs/diagnosis.yaml"), ["sentiment=null"]))) == len(
        stages
    )
    alone = configs.load(Path("configs/diagnosis.yaml"), ["development=[]", "seeds=[]", "encoders=[1]"])
    assert [stage.name for stage in diagnosis.stages(alone)] == ["diagnosis/encoder-seed1"]
    with pytest.raises(configs.ConfigError, match="nothing to diagnose"):
        configs.load(Path("configs/diagnosis.yaml"), ["development=[]", "seeds=[]", "sentiment=null"])
    failures = [case for case in encoder.CASES.values() if case.expected != HEALTHY]
    assert len({case.expected for case in failures}) >= 12
    failures = [case for case in CASES.values() if case.expected != HEALTHY]
    assert len({case.expected for case in failures}) >= 12


def test_forecast_study_reads_the_models_of_a_sentiment_config():
    config = configs.load(Path("configs/forecast.yaml"))
    stage = forecast.stages(config)[0]
    assert set(stage.inputs) == {"data", "base", "tasks", "base_curvature", "curvatures"}
    assert len(forecast.stages(configs.load(Path("configs/forecast.yaml"), ["seeds=[]"]))) == 3
    assert len(forecast.stages(configs.load(Path("configs/forecast.yaml"), ["seeds=[1]"]))) == 1
    with pytest.raises(configs.ConfigError, match=r"alpha.yaml has no seed 7; it has 0, 1, 2"):
        configs.load(Path("configs/forecast.yaml"), ["seeds=[7]"])
    with pytest.raises(configs.ConfigError, match="no config of the sentiment experiment"):
        configs.load(Path("configs/forecast.yaml"), ["sentiment=configs/diagnosis.yaml"])
    with pytest.raises(configs.ConfigError, match=r"grid: .*at least 1 item"):
        configs.load(Path("configs/forecast.yaml"), ["grid=[]"])


def test_forecast_report_prints_correlations_and_weights():
    row = {"merge": "AM", "task": "t", "accuracy": 0.5}
    record = {
        "kind": "forecast",
        "seed": 0,
        "correlations": {where: {"exact": {"t": 0.9, "error": 0.01}} for where in ("seen", "measured")},
        "grid": [
            {"weights": {"t": 1.0}, "accuracy": 0.6, "halves": [0.7, 0.5]},
            {"weights": {"t": 0.5}, "accuracy": 0.54, "halves": [0.5, 0.58]},
        ],
        "grid_seconds": 10.0,
        "products_seconds": 2.0,
        "weights": {"closed form, tau": {"t": 0.4}},
        "rows": [row, {**row, "merge": "closed form, tau", "accuracy": 0.59}],
    }
    text = forecast.report([record])
    assert "0.600  t 1.00" in text
    assert "scored on the other" in text
    assert f"{0.5:.3f}\n" in text.split("scored on the other")[1][:20]
    assert "0.590  t 0.40" in text
    assert "0.590  (-0.010)" in text
    assert forecast.report([]) == "no records"


def test_scores_leave_calibration_and_chosen_merges_out():
    kinds = ("exact", "kronecker", "diagonal")
    rows = []
    for place, name in enumerate(("TA 0", "AM", "TA 1", "FA", "GM", "TIES", "closed form, tau")):
        for task, factor in (("one", 2.0), ("two", -1.0)):
            rise = 0.1 * place if name != "closed form, tau" else -9.0
            row = {"merge": name, "task": task, "coordinates": [place]}
            row |= {"seen": factor * rise, "measured": rise}
            rows.append({**row, **dict.fromkeys(kinds, rise)})
    given = ("u",), np.zeros(1), np.array([1.0]), np.zeros((1, 1))
    products = [Products(task, *given, num_examples=10) for task in ("one", "two")]
    factors = scores.scales(dict.fromkeys(kinds, products), rows)
    # seen = factor * rise, forecast = place / 10
    assert factors["exact"] == pytest.approx({"one": 2.0, "two": -1.0})
    found = scores.correlations(rows, factors)
    assert found["seen"]["exact, calibrated"]["error"] == pytest.approx(0.0, abs=1e-12)
    assert found["seen"]["exact"]["two"] == pytest.approx(-1.0)
    assert found["measured"]["exact"]["all pairs"] == pytest.approx(1.0)
    assert found["measured"]["seen"]["one"] == pytest.approx(1.0)


def test_unknown_case_is_an_error():
    with pytest.raises(configs.ConfigError, match="unknown case 'nap'"):
        configs.load(Path("configs/diagnosis.yaml"), ["cases=[nap]"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seeds=[2, 3]"], "seed 2 is in `development` and in `seeds`"),
        (["development_encoders=[5]"], "alpha.yaml has no seed 5; it has 0, 1, 2"),
        (["encoders=[6]"], "alpha.yaml has no seed 6"),
        (["sentiment=null", "encoders=[0]"], r"`encoders` has \[0\], but no config `sentiment` trains them"),
        (["sentiment=configs/vision.yaml"], "vision.yaml is no config of the sentiment experiment"),
    ],
)
def test_faults_of_seeds_and_encoders(overrides, message):
    with pytest.raises(configs.ConfigError, match=message):
        configs.load(Path("configs/diagnosis.yaml"), overrides)


def test_rules_know_nothing_of_the_cases():
    text = "".join(path.read_text() for path in Path("gradmatch/diagnosis").glob("*.py"))
    assert not [name for name in CASES if f'"{name}"' in text]
    assert "experiments" not in text


def test_reordered_neurons_are_the_same_function():
    net = tiny.TinyNet().eval()
    theta = reordered(tiny.state(net), torch.randperm(tiny.WIDTH))
    tokens = torch.randint(tiny.VOCABULARY, (8, tiny.LENGTH))
    torch.testing.assert_close(tiny.net_of(theta)(tokens), net(tokens))
    assert not torch.equal(theta["token.weight"], net.token.weight)


@pytest.fixture(scope="module")
def encoders():
    """A tiny random encoder and two fine-tunes of it, as the real ones come."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    module = BertForSequenceClassification(BertConfig(vocab_size=60, num_labels=2, **size)).eval()
    base = tiny.state(module)
    ids = torch.randint(1, 60, (16, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (16,))}
    tasks, curvatures = {}, {}
    for name in ("base", "one", "two"):
        theta = {n: v + 1e-3 * torch.randn_like(v) if v.is_floating_point() else v for n, v in base.items()}
        module.load_state_dict(base if name == "base" else theta)
        curvatures[name] = estimate(module, [batch], progress=False)
        if name != "base":
            tasks[name] = theta
    data = {task: [batch] for task in tasks}
    return encoder.Encoders(module, base, tasks, curvatures, data, data)


FOUND = ["permuted neurons", "a lucky NaN", "vocabulary shifted by one", "curvature of the wrong model"]
FOUND += ["head of another task", "layers exchanged", "the same task twice", "merge by an older recipe"]


@pytest.mark.parametrize("name", FOUND)
def test_faults_of_encoders_are_found_in_their_weights(encoders, name):
    row = diagnose_case(name, encoder.CASES[name], encoders)
    assert row["found"] == row["expected"]


def test_permuted_encoder_is_the_same_function(encoders):
    told = encoder.permuted_neurons(encoders)
    inputs = {key: encoders.data["one"][0][key] for key in ("input_ids", "attention_mask")}
    outputs = []
    for theta in (encoders.tasks["one"], told["tasks"][0].model):
        encoders.module.load_state_dict(theta)
        outputs.append(encoders.module(**inputs).logits)
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.fixture(scope="module")
def folders(encoders, tmp_path_factory):
    """The encoders as the folders of a sentiment run's stages, with data."""
    from datasets import Dataset

    root = tmp_path_factory.mktemp("stages")
    generator = torch.Generator().manual_seed(0)
    for domain in ("one", "two"):
        for split in ("train", "validation", "test"):
            ids = torch.randint(1, 60, (24, 6), generator=generator).tolist()
            labels = torch.randint(2, (24,), generator=generator).tolist()
            rows = {"input_ids": ids, "attention_mask": [[1] * 6] * 24, "labels": labels}
            Dataset.from_dict(rows).save_to_disk(str(root / "data" / domain / split))
    (root / "data" / "data.json").write_text('{"pad": 0}')
    for name, theta in {"base": encoders.base, **encoders.tasks}.items():
        encoders.module.load_state_dict(theta)
        encoders.module.save_pretrained(root / name / "model")
        encoders.curvatures[name].save(root / f"curvature-{name}" / "curvature.safetensors")
    tasks = {task: root / task for task in encoders.tasks}
    curvatures = {task: root / f"curvature-{task}" for task in encoders.tasks}
    given = {"base_curvature": root / "curvature-base", "curvatures": curvatures}
    return {"data": root / "data", "base": root / "base", "tasks": tasks, **given}


def test_forecast_stage(folders, tmp_path):
    settings = {"split": "train", "count": 16, "kfac": 8, "test": 12, "grid": [0.0, 1.0]}
    settings |= {"draws": 2, "seed": 0, "delta0": 1e-6}
    forecasting.forecast(tmp_path, **folders, **settings)
    found = json.loads((tmp_path / "forecast.json").read_text())
    kinds = {f"{kind}{how}" for kind in ("exact", "kronecker", "diagonal") for how in ("", ", calibrated")}
    assert set(found["correlations"]["seen"]) == kinds
    assert set(found["correlations"]["measured"]) == {*kinds, "seen"}
    assert len(found["grid"]) == 4
    assert all(sum(point["halves"]) / 2 == pytest.approx(point["accuracy"]) for point in found["grid"])
    assert set(found["weights"]["closed form, preconditioned"]) == {"gm:one", "gm:two"}
    some = {"AM", "GM", "TIES", "only one", "random 1", "Kronecker, tau"}
    assert {row["merge"] for row in found["rows"]} >= some
    own = [row for row in found["rows"] if row["merge"] == f"only {row['task']}"]
    assert all(abs(row["measured"]) < 1e-4 and abs(row["exact"]) < 1e-4 for row in own)
    assert found["quadratic"]["exact"]["one"] > 0
    assert forecast.report([{"kind": "forecast", "seed": 0, **found}]).startswith("Rank correlation")


def test_encoder_stage(folders, tmp_path, monkeypatch):
    chosen = {name: encoder.CASES[name] for name in ("a lucky NaN", "vocabulary shifted by one")}
    monkeypatch.setattr(encoder, "CASES", chosen)
    encoder.diagnose_encoder(tmp_path, **folders, count=12, seed=0)
    rows = json.loads((tmp_path / "cases.json").read_text())
    assert [row["found"] for row in rows] == ["not_finite", "vocabulary_shift"]
    assert [row["right_subject"] for row in rows] == [True, True]  # "one", the first task
