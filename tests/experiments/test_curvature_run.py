"""Cheap curvature: every kind of estimate on the tiny world, errors against an oracle, and what the report makes of it."""

import math

import pytest
import torch
import yaml
from torch import nn

from experiments import config as configs
from experiments.estimates import errors, squared_batch_means
from experiments.records import of_kind
from experiments.statistics import t_interval
from experiments.studies import curvature

KINDS = ("fisher", "ggn", "empirical", "batch", "batch means", "adam", "ivon")


@pytest.fixture
def curvature_config(beside, tiny_config):
    """A config of the curvature study beside the tiny sentiment config: one estimate of each kind."""
    estimates = {kind: {"kind": kind, "examples": 16, "batch_size": 4} for kind in KINDS}
    reference = {"kind": "ggn", "examples": 1000}
    return beside(
        "curvature", sentiment=str(tiny_config), estimates=estimates, full="fisher", reference=reference
    )


def test_every_kind_gives_a_merge_its_seconds_and_its_error(curvature_config, run):
    records, out = run(curvature_config)
    merges = of_kind(records, "merge")
    assert [record["estimate"] for record in merges] == ["TA", *KINDS]
    for record in merges[1:]:
        assert record["estimate_seconds"] > 0
        assert set(record["metrics"]) == {"books", "songs", "macro", "per_example"}
    wrong = of_kind(records, "error")
    assert {(record["estimate"], record["task"]) for record in wrong} == {
        (kind, task) for kind in KINDS for task in ("books", "songs")
    }
    for record in wrong:
        assert math.isfinite(record["relative_error"])
        assert record["trace_ratio"] > 0
        assert -1 <= record["log_correlation"] <= 1
    assert "squared batch means x B" in out
    gains = of_kind(records, "gain")  # none where the full estimate gains nothing over task arithmetic
    accuracy = {record["estimate"]: record["metrics"]["macro"]["accuracy"] for record in merges}
    for gain in gains:
        whole = accuracy["fisher"] - accuracy["TA"]
        assert gain["kept"] == pytest.approx((accuracy[gain["estimate"]] - accuracy["TA"]) / whole)
        assert gain["low"] <= gain["high"]
    assert [gain["estimate"] for gain in gains] == (
        list(KINDS) if accuracy["fisher"] != accuracy["TA"] else []
    )
    biases = [(record["estimate"], record["task"]) for record in of_kind(records, "bias")]
    assert biases == [("batch means", "books"), ("batch means", "songs")]


def test_errors_of_known_estimates():
    truth = {"a": torch.tensor([1.0, 2.0, 0.0]), "b": torch.tensor([[4.0]])}
    double = {name: 2 * value for name, value in truth.items()}
    found = errors(double, truth)
    assert found["relative_error"] == pytest.approx(1)
    assert found["trace_ratio"] == pytest.approx(2)
    assert found["log_correlation"] == pytest.approx(1)
    other = {"a": torch.tensor([2.0, 1.0, 3.0]), "b": torch.tensor([[1.0]])}
    x = torch.tensor([2.0, 1.0, 1.0]).log()
    y = torch.tensor([1.0, 2.0, 4.0]).log()
    expected = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert errors(other, truth)["log_correlation"] == pytest.approx(expected, rel=1e-5)
    constant = {"a": torch.ones(3), "b": torch.ones(1, 1)}
    assert math.isnan(errors(constant, truth)["log_correlation"])


class Squares(nn.Module):
    """Loss: the mean over the batch of (w x)^2 / 2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.loss = (self.w * x).square().mean() / 2
        return self


def test_squared_batch_means():
    given = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0])}]
    found = squared_batch_means(Squares(), given)
    assert found["w"].tolist() == pytest.approx([((2 * 2.5) ** 2 + (2 * 9) ** 2) / 2])
    assert found["unused"].tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full": "none"}, "`full` is 'none', but the estimates are fisher"),
        ({"reference_seeds": [4]}, "has no seed 4"),
        ({"estimates": {"x": {"kind": "fischer"}}, "full": "x"}, "estimates.x.kind"),
    ],
)
def test_faults(curvature_config, change, message):
    content = yaml.safe_load(curvature_config.read_text()) | change
    with pytest.raises(configs.ConfigError, match=message):
        configs.check(content, "curvature.yaml")


def test_batch_bias_is_one_where_there_is_none():
    spec = {"kind": "batch means", "batch_size": 8}
    cells = [{"kind": "bias", "spec": spec, "trace_ratio": ratio} for ratio in (0.125, 0.25)]
    mean, half = t_interval([1.0, 2.0])
    assert curvature.batch_bias(cells) == pytest.approx((1.5, mean - half, mean + half, 8, 2))
    assert curvature.batch_bias([{"kind": "error", "spec": spec}]) is None
