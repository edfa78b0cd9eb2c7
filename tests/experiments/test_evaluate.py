"""Metrics and statistics against slow definitions."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from experiments.comparing import compare, distance
from experiments.evaluate import expected_calibration_error, measure, with_averages
from experiments.statistics import (
    bootstrap_ratio,
    mean_interval,
    paired_bootstrap,
    spearman,
    t_interval,
    wilson,
)


def test_measures():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 1])
    found = measure(probabilities, labels)
    assert found["accuracy"] == 0.75
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.8) + math.log(0.4)) / 4)
    assert found["n"] == 4
    assert math.isfinite(measure(np.array([[1.0, 0.0]]), np.array([1]))["nll"])


def test_calibration_error_is_the_mean_gap_over_bins():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1.0, 200)
    correct = generator.uniform(size=200) < 0.7
    slow = 0.0
    for b in range(15):
        inside = [i for i in range(200) if b / 15 <= confidence[i] < (b + 1) / 15]
        if inside:
            gap = abs(np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
            slow += len(inside) / 200 * gap
    assert expected_calibration_error(confidence, correct) == pytest.approx(slow)
    assert expected_calibration_error(np.ones(3), np.ones(3, dtype=bool)) == 0.0


def test_macro_counts_domains_and_per_example_counts_examples():
    parts = {
        "a": {"accuracy": 1.0, "nll": 0.0, "ece": 0.0, "n": 300},
        "b": {"accuracy": 0.5, "nll": 1.0, "ece": 0.1, "n": 100},
    }
    found = with_averages(parts)
    assert found["macro"] == {"accuracy": 0.75, "nll": 0.5, "ece": 0.05, "n": 400}
    assert found["per_example"] == {"accuracy": 0.875, "nll": 0.25, "ece": 0.025, "n": 400}


def test_bootstrap_covers_what_is_there_and_nothing_else():
    generator = np.random.default_rng(0)
    sure = [generator.choice([0.0, 1.0], p=[0.7, 0.3], size=(3, 400)) for _ in range(2)]
    low, high = paired_bootstrap(sure, [None, None], 2000)
    mean = float(np.mean([part.mean() for part in sure]))
    assert 0.2 < low < mean < high < 0.4
    error = math.sqrt(0.3 * 0.7 / 2400)  # of the mean of all six hundred times four cells
    assert 2 * error < high - low < 8 * error
    low, high = paired_bootstrap([generator.choice([-1.0, 1.0], size=(1, 400))], [None], 2000)
    assert low < 0 < high
    seeds_differ = np.repeat([[0.0], [1.0]], 500, axis=1)  # no spread over examples, all of it over seeds
    assert paired_bootstrap([seeds_differ], [None], 2000) == (0.0, 1.0)


def test_bootstrap_draws_whole_documents():
    generator = np.random.default_rng(0)
    right = np.repeat(
        generator.choice([0.0, 1.0], size=(1, 40)), 10, axis=1
    )  # the ten texts of a document are alike
    which = np.repeat(np.arange(40), 10)
    low, high = paired_bootstrap([right], [which], 4000)
    error = right.std() / math.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    shuffled = generator.permutation(400)
    assert paired_bootstrap([right[:, shuffled]], [which[shuffled]], 4000) == pytest.approx((low, high))
    low, high = paired_bootstrap([right], [None], 4000)  # as if they were 400 texts
    assert high - low == pytest.approx(2 * 1.96 * error / math.sqrt(10), rel=0.1)


def test_comparison_of_two_evaluations(tmp_path):
    for name, right in (("ours", 90), ("theirs", 60)):
        folder = tmp_path / name
        folder.mkdir()
        np.savez(folder / "a.npz", correct=(np.arange(100) < right).astype(float))
    (tmp_path / "data.json").write_text('{"pad": 0}')
    Dataset.from_dict({"labels": [0, 1] * 50}).save_to_disk(tmp_path / "a" / "test")
    compare(
        tmp_path,
        ours={"0": tmp_path / "ours"},
        theirs={"0": tmp_path / "theirs"},
        data=tmp_path,
        domains=["a"],
    )
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["difference"] == pytest.approx(0.3)
    assert found["by_seed"] == {"0": pytest.approx(0.3)}


def test_bootstrap_of_a_ratio_draws_both_alike():
    generator = np.random.default_rng(0)
    below = [generator.choice([0.0, 1.0], size=(3, 60)), generator.choice([0.0, 1.0], size=(3, 40))]
    value, low, high = bootstrap_ratio([part / 2 for part in below], below, [None, None], 500)
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))
    other = [part * generator.choice([0.0, 1.0], size=part.shape) for part in below]
    value, low, high = bootstrap_ratio(other, below, [None, None], 500)
    assert value == pytest.approx(sum(part.mean() for part in other) / sum(part.mean() for part in below))
    assert low < value < high
    assert np.isnan(bootstrap_ratio(below, [0 * part for part in below], [None, None], 50)[0])


def test_distance_is_relative_to_the_base(tmp_path):
    for name, value in (("model", 1.0), ("base", 4.0), ("joint", 0.0)):
        (tmp_path / name / "model").mkdir(parents=True)
        save_file({"w": torch.full((4,), value)}, tmp_path / name / "model" / "model.safetensors")
    distance(tmp_path, **{name: tmp_path / name for name in ("model", "base", "joint")})
    assert json.loads((tmp_path / "distance.json").read_text()) == {"distance": 2.0, "relative": 0.25}


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)  # scipy.stats.spearmanr
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1], [1]))


def test_intervals():
    assert t_interval([1.0, 2.0, 3.0]) == (
        2.0,
        pytest.approx(4.302653 / 3**0.5, rel=1e-6),
    )  # Student's, 2 degrees
    assert t_interval([1.0]) == (1.0, math.inf)
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(40, 40)[1] == pytest.approx(1.0)
    for constant in (np.full(10, 0.3), [0.3]):
        assert mean_interval(constant) == pytest.approx((0.3, 0.3, 0.3))
    mean, low, high = mean_interval(np.arange(100) % 2 == 0)
    assert low < mean == 0.5 < high
    assert high - low == pytest.approx(4 * 0.5 / np.sqrt(100), rel=0.2)
