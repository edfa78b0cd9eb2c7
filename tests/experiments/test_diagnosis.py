"""The study of failures built on purpose: its stage on a few cases, its table, its config."""

import json
from pathlib import Path

import pytest
import torch

from experiments import config as configs
from experiments.diagnosis import tiny
from experiments.diagnosis.cases import CASES, HEALTHY, VARIANTS, reordered
from experiments.diagnosis.confusion import diagnose_cases
from experiments.studies import diagnosis

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
    assert "a lucky NaN" in text
    assert "1/2    other_base" in text
    assert "true cause first in 3 of 4 failures (75%)" in text
    assert "false alarms in 1 of 2 healthy merges" in text


def test_config_runs_every_case_on_other_seeds_than_the_rules_were_set_on():
    config = configs.load(Path("configs/diagnosis.yaml"))
    assert not set(config.development) & set(config.seeds)
    stages = diagnosis.stages(config)
    assert len(stages) == len(config.development) + len(config.seeds)
    assert all(stage.settings["cases"] == [*CASES, *VARIANTS] for stage in stages)
    failures = [case for case in CASES.values() if case.expected != HEALTHY]
    assert len({case.expected for case in failures}) >= 12


def test_unknown_case_is_an_error():
    with pytest.raises(configs.ConfigError, match="unknown case 'nap'"):
        configs.load(Path("configs/diagnosis.yaml"), ["cases=[nap]"])


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
