"""Mixtures against merges: the study on the tiny world, its faults, and its verdicts."""

import pytest
import yaml

from experiments import config as configs
from experiments.records import of_kind
from experiments.studies import mixture


@pytest.fixture
def mixture_config(beside, tiny_config):
    """A config of the mixture study beside the tiny sentiment config."""
    mixtures = {
        "model": {"level": "model", "prompts": 8, "steps": 2},
        "ffn": {"level": "ffn", "routing": "token", "top_k": 2, "prompts": 8},
        "low": {"level": "block", "routing": "token", "router": "spectral", "rank": 2, "gate_rank": 2},
        "near": {"level": "model", "prompts": 8, "near": 0.1},
    }
    claims = {"levels": [["model", "ffn"]], "small": ["low"], "whole": ["model"], "alike": ["near"]}
    return beside("mixture", models=str(tiny_config), mixtures=mixtures, merges=["TA", "GM"], **claims)


def test_mixtures_are_measured_beside_the_merges(mixture_config, run):
    records, out = run(mixture_config)
    found = {row["model"]: row for row in of_kind(records, "mixture")}
    assert set(found) == {"model", "ffn", "low", "near"}
    for row in found.values():
        assert {"books", "songs", "macro"} <= set(row["metrics"])
        assert row["weights"]["output"] > row["weights"]["base"]
        assert row["seconds"] > 0
        for shares in row["shares"].values():
            assert sum(shares) == pytest.approx(1)
    assert found["model"]["trained"]["steps"] == 2
    models = {row["model"]: row for row in of_kind(records, "model")}
    assert {"base", "books", "songs", "TA", "GM", "experts"} <= set(models)
    own = [models[task]["metrics"][task]["accuracy"] for task in ("books", "songs")]
    assert models["experts"]["metrics"]["macro"]["accuracy"] == pytest.approx(sum(own) / 2)
    verdicts = [(row["claim"], row["part"]) for row in of_kind(records, "verdict")]
    assert verdicts == [(20, "model - ffn"), (21, "low"), (22, "model"), (22, "near")]
    assert "size" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": ["AMM"]}, "`merges` names 'AMM'"),
        ({"small": ["lo"]}, "no mixture or merge 'lo'"),
        ({"mixtures": {"m": {"level": "fnn"}}}, "mixtures"),
        ({"seeds": [7]}, "has no seed 7"),
        ({"models": "configs/theory.yaml"}, "is no config of the sentiment or vision experiment"),
    ],
)
def test_faults(mixture_config, change, message):
    content = yaml.safe_load(mixture_config.read_text()) | change
    with pytest.raises(configs.ConfigError, match=message):
        configs.check(content, "mixture.yaml")


@pytest.mark.parametrize(
    ("low", "high", "seeds", "twenty", "beats", "alike"),
    [
        (0.01, 0.03, 3, "holds", "holds", "refuted"),
        (0.01, 0.03, 1, "not shown", "not shown", "refuted"),
        (-0.01, 0.03, 3, "not shown", "not shown", "holds"),
        (-0.03, -0.01, 3, "refuted", "refuted", "holds"),
    ],
)
def test_verdicts(low, high, seeds, twenty, beats, alike):
    row = {"difference": (low + high) / 2, "low": low, "high": high, "seeds": seeds}
    claim = mixture.Part(20, "", "", "", "mixture")
    assert mixture._against(claim, row, at_least=True).verdict == twenty
    assert mixture._against(claim, row).verdict == beats
    assert mixture._against(claim, row, beats=False).verdict == alike
    assert mixture._against(claim, None).verdict == "not shown"
