"""The assumption of Eq. 8: fine-tuning with its penalty, what a fine-tune leaves of it, refinement, on the tiny world."""

import itertools
import math

import pytest
import torch
import yaml
from torch import nn

from experiments import config as configs
from experiments.penalised import penalty
from experiments.records import of_kind
from experiments.studies.assumption import best_tunings, validation_loss


@pytest.fixture
def assumption_config(beside, tiny_config):
    """A config of the study beside the tiny sentiment config: no penalty to speak of, and one that holds all weights."""
    measured = {"method": "measured", "choose": {"delta0": [1e3, 1e6]}}
    return beside(
        "assumption",
        sentiment=str(tiny_config),
        delta0=[1e-9, 1e7],
        merges={"GM": {"method": "gradient_matching"}, "Measured*": measured},
        refine={"examples": 16, "steps": 2, "dampings": [0.0]},
    )


def test_a_run_tunes_merges_refines_and_says_what_eq_8_leaves(assumption_config, run):
    records, out = run(assumption_config)
    merges = {(record["tuning"], record["merge"]): record for record in of_kind(records, "merge")}
    assert set(merges) == set(itertools.product(("plain", "1e-09", "1e+07"), ("GM", "Measured*")))
    assert merges["plain", "Measured*"]["choice"]["chosen"]["delta0"] in (1e3, 1e6)
    for name in ("GM", "Measured*"):  # one seed: the report's last row is one of the others
        (best,) = best_tunings(of_kind(records, "merge"), name)
        losses = {tuning: validation_loss(merges[tuning, name]) for tuning in ("plain", "1e-09", "1e+07")}
        assert losses[best["tuning"]] == min(losses.values())
        assert f"{name}: by validation loss, a seed each, {best['tuning']}." in out
    others = [record for record in of_kind(records, "merge") if record["tuning"] != "plain"]
    assert (
        best_tunings([*others, {**merges["plain", "GM"], "seed": 1}], "GM") == []
    )  # a seed lacks the others
    left = {(record["tuning"], record["task"]): record for record in of_kind(records, "stationarity")}
    assert all(math.isfinite(record["relative"]) for record in left.values())
    for task in ("books", "songs"):  # the stronger the penalty, the shorter the way
        assert left["1e+07", task]["tau"] < 0.5 * left["plain", task]["tau"]
    (refined,) = of_kind(records, "refinement")
    assert all(after <= before for before, after in itertools.pairwise(refined["values"]))
    assert [record["merge"] for record in of_kind(records, "reference")] == ["joint"]
    assert "0 rises of the objective in" in out
    assert "delta0 = 1e+07" in out


def test_the_penalty_is_half_the_weighted_square():
    module = nn.Linear(2, 1)
    theta0 = {name: value.detach() - 2 for name, value in module.named_parameters()}
    h0 = {"weight": torch.tensor([[1.0, 3.0]]), "bias": torch.tensor([0.5])}
    found = penalty(module, theta0, h0)
    assert float(found.detach()) == pytest.approx(0.5 * 4 * (1 + 3 + 0.5))
    found.backward()
    assert module.weight.grad.tolist() == [pytest.approx([2.0, 6.0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": {"R": {"method": "regmean"}}}, "merge 'R': regmean needs Gram matrices"),
        ({"merges": {"K": {"method": "kronecker"}}}, "merge 'K': kronecker needs Kronecker factors"),
        (
            {"merges": {"P": {"method": "passthrough"}}},
            "merge 'P': passthrough takes 1 to 1 models, but there are 2",
        ),
        ({"refine": {"method": "gradient"}}, "refine.method: unknown method 'gradient'"),
        ({"refine": {"method": "passthrough"}}, "refine: passthrough takes 1 to 1 models"),
        ({"refine": {"dampings": [-1.0]}}, r"refine\.dampings\.0: .*greater than or equal to 0"),
        ({"delta0": [-1.0]}, r"delta0\.0: .*greater than or equal to 0"),
        ({"delta0": [300.0, 300.0]}, r"delta0: 300\.0 stands twice"),
        ({"delta0": [300.0, 300.00001]}, r"delta0: '300' stands twice"),
    ],
)
def test_what_would_fail_after_training_is_refused(assumption_config, change, message):
    content = yaml.safe_load(assumption_config.read_text())
    with pytest.raises(configs.ConfigError, match=message):
        configs.check(content | change, "assumption.yaml")


def test_faults(assumption_config):
    content = yaml.safe_load(assumption_config.read_text())
    with pytest.raises(configs.ConfigError, match="has no seed 3"):
        configs.check(content | {"seeds": [3]}, "assumption.yaml")
    with pytest.raises(configs.ConfigError, match=r"refine.step: unknown key \(did you mean 'steps'\?"):
        configs.check(content | {"refine": {"step": 3}}, "assumption.yaml")
