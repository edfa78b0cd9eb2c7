"""Configs: checked whole, faults named with the path to the key and the nearest name."""

from pathlib import Path

import pytest

from experiments.config import ConfigError, load

ROOT = Path(__file__).parents[2]
SMALL = """
experiment: sentiment
base_training: {steps: 2, learning_rate: 1.0e-3}
task_training: {steps: 2, learning_rate: 1e-3}
joint_training: {steps: 2, learning_rate: 1e-3}
merges: {TA: {method: task_arithmetic}, GM: {method: gradient_matching, choose: {base_weight: [0.1, 1]}}}
compare: [[GM, TA]]
"""


@pytest.fixture
def small(tmp_path):
    """A config file."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_a_config_is_named_after_its_file(small):
    config = load(small)
    assert config.name == "small"
    assert config.task_training.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert config.data.domains == ["movies", "amazon", "tweets", "nyt"]


def test_overrides_change_values_and_the_name_of_the_records(small):
    config = load(small, ["data.test=100", "seeds=[1, 2]"])
    assert (config.data.test, config.seeds) == (100, (1, 2))
    assert config.name.startswith("small-")
    assert load(small, ["data.test=100", "name=mine"]).name == "mine"
    assert load(small, ["wandb=true"]).name == "small"


FAULTS = [
    ("experiment: sentimnt", "experiment: unknown 'sentimnt'; did you mean 'sentiment'?"),
    ("experiment: [", "is no YAML"),
    ("- a list", "must hold a mapping of keys, but holds list"),
    (SMALL + "sedes: [1]", "sedes: unknown key; did you mean 'seeds'?"),
    (SMALL + "data: {taks: [a]}", "data.taks: unknown key; did you mean 'tasks'?"),
    (SMALL + "fisher: {examples: many}", r"fisher.examples: .*integer.*found 'many'"),
    (SMALL + "data: {tasks: [movies]}", "data: `base` and `tasks` must name"),
    (SMALL.replace("steps: 2", "step: 2", 1), "base_training.steps: Field required"),
    (
        SMALL.replace("method: task_arithmetic", "metod: ta"),
        "merges.TA.metod: unknown key; did you mean 'method'?",
    ),
    (
        SMALL.replace("task_arithmetic", "task_arithmetc"),
        "merges.TA: unknown method 'task_arithmetc'.*task_arithmetic",
    ),
    (
        SMALL.replace("base_weight: [0.1, 1]", "base_wight: [1]"),
        "merges.GM: gradient_matching has no option 'base_wight'",
    ),
    (SMALL.replace("base_weight: [0.1, 1]", "base_weight: []"), "takes one option with a list of values"),
    (SMALL.replace("[[GM, TA]]", "[[GM, TAA]]"), "`compare` names 'TAA'"),
    (SMALL + "sweep: {merges: [FA], alphas: [0, 1]}", "`sweep` names 'FA', but the merges are TA, GM"),
    (SMALL.replace("TA: {method", "joint: {method"), "may not be called 'joint'"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS)
def test_faults(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds", "cannot read 'seeds': overrides are written key=value"),
        ("~", "cannot read '~': overrides are written key=value"),
        ("~compar", "'~compar': there is no key 'compar' to leave out; did you mean 'compare'"),
        ("seeds.first=1", "seeds is no mapping"),
        ("sedes=[1]", "did you mean 'seeds'"),
    ],
)
def test_bad_overrides(small, override, message):
    small.write_text(SMALL + "seeds: [0]\n")
    with pytest.raises(ConfigError, match=message):
        load(small, [override])


def test_a_key_can_be_left_out(small):
    config = load(small, ["~compare", "~merges.GM"])
    assert config.compare == ()
    assert set(config.merges) == {"TA"}


def test_a_missing_file_names_the_nearest(small):
    with pytest.raises(ConfigError, match=r"did you mean .*small\.yaml"):
        load(small.with_name("smal.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_short_and_says_its_cost(path):
    load(path)
    lines = path.read_text().splitlines()
    assert len(lines) <= 30
    assert lines[0].startswith("#")
    assert "minutes" in path.read_text().split("experiment:")[0]
