"""Adding tasks: every subset merged and measured, on the tiny world, and what the report says of it."""

import pytest
import yaml

from experiments import config as configs
from experiments.records import of_kind
from experiments.studies import adding


@pytest.fixture
def adding_config(beside, tiny_config):
    """A config of the adding study beside the tiny sentiment config."""
    merges = {
        "TA": {"method": "task_arithmetic"},
        "GM": {"method": "gradient_matching"},
        "GM*": {"method": "gradient_matching", "choose": {"base_weight": [0.1, 1.0]}},
    }
    return beside("adding", sentiment=str(tiny_config), merges=merges, compare=["GM", "TA"])


def test_the_whole_subset_gives_the_sentiment_runs_numbers(adding_config, tiny_config, run):
    records, out = run(adding_config)
    assert "GM has a smaller mismatch than TA in" in out
    subsets = of_kind(records, "subset")
    expected = [(["books", "songs"], name) for name in ("TA", "GM", "GM*")]
    assert [(record["tasks"], record["model"]) for record in subsets] == expected
    whole = {record["model"]: record for record in run(tiny_config)[0] if "metrics" in record}
    for record in subsets:
        own = whole[record["model"]]
        assert record["metrics"]["books"] == own["metrics"]["books"]
        assert record["mismatch"] == own["mismatch"]
        assert record.get("choice") == own.get("choice")
        assert {"commit", "versions", "machine", "seconds", "seed", "key"} <= set(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": ["GM", "XX"]}, "`compare` names 'XX'"),
        ({"seeds": [7]}, "has no seed 7; it has 0"),
        ({"seeds": [0, 0]}, "seeds: "),
        (
            {"merges": {"GM": {"method": "regmean"}, "TA": {"method": "task_arithmetic"}}},
            "merge 'GM': regmean needs Gram matrices",
        ),
        ({"sentiment": "configs/theory.yaml"}, "is no config of the sentiment experiment"),
    ],
)
def test_faults(adding_config, change, message):
    content = yaml.safe_load(adding_config.read_text()) | change
    with pytest.raises(configs.ConfigError, match=message):
        configs.check(content, "adding.yaml")


def cell(seed, tasks, model, mismatch, accuracy):
    found = {"kind": "subset", "seed": seed, "tasks": tasks, "model": model, "compare": ["GM", "TA"]}
    found["mismatch"] = {"per_example": mismatch, "total": mismatch}
    return found | {"metrics": {"macro": {"accuracy": accuracy}}}


def test_correlation_and_share_are_those_of_the_records():
    cells = [
        cell(seed, tasks, model, mismatch, accuracy)
        for seed in (0, 1)
        for tasks in (["a", "b"], ["a", "c"])
        for model, mismatch, accuracy in (
            ("TA", 0.4 + seed, 0.7),
            ("GM", 0.2 + 2 * seed, 0.8),
            ("AM", 0.1, 0.9),
        )
    ]
    ((size, (rho, low, high, count)),) = adding.correlations(cells).items()
    assert (size, count) == (2, 12)
    assert low <= rho <= high
    assert rho == pytest.approx((low + high) / 2)  # the mean of two seeds
    assert 0.6 < rho < 1
    within = {2: (pytest.approx(0.75), 0.5, 4)}  # 1 and .5: with seed 1, GM's is the largest
    assert adding.within_subsets(cells) == within
    share, low, high, subsets = adding.smaller_share(cells)
    assert (share, subsets) == (0.5, 4)  # with seed 1, GM's is the larger
    assert low < 0.5 < high
