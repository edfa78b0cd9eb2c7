"""Configs: checked whole, faults named with the path to the key and the nearest name."""

import re
import shlex
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
    ("experiment: sentimnt", r"experiment: unknown 'sentimnt' \(did you mean 'sentiment'?"),
    ("experiment: [", "is not YAML"),
    ("- a list", "must hold a mapping of keys, but holds list"),
    ("# nothing", r"bad.yaml is empty: its first key is `experiment`, one of adding"),
    ("seeds: [0]", "experiment: missing; write one of adding"),
    ("experiment: [theory]", r"experiment: unknown \['theory'\]"),
    ("experiment: {a: 1}", "experiment: unknown {'a': 1}"),
    ("experiment: theory\nseeds: 5\nseeds: 6", "is not YAML: the key 'seeds' is given twice .*line 3"),
    (SMALL + "quick: [2]", r"quick: must be a list of key=value, .*found \[2\]"),
    (SMALL + "quick: seeds=[2]", "quick: must be a list of key=value, .*found 'seeds="),
    (SMALL + "name: ../../x", "name: '../../x' cannot name the file of the records"),
    (SMALL + "name: 3", "name: Input should be a valid string"),
    (SMALL + "seeds: 3", r"seeds: must be a list, as \[0, 1\] \(found 3\)"),
    (SMALL + "seeds: [0, 1, 0]", r"seeds: 0 stands twice in \[0, 1, 0\]"),
    (SMALL + "seeds: [-1]", r"seeds\.0: .*greater than or equal to 0 \(found -1\)"),
    (SMALL + "seeds: [4294967296]", r"seeds\.0: .*less than 4294967296"),
    (SMALL + "data: {tasks: amazon}", r"data\.tasks: must be a list, as \[a, b\] \(found 'amazon'\)"),
    (SMALL + "data: {tasks: [imdb]}", "data: vader has no domain 'imdb'; it has movies"),
    (
        SMALL + "data: {source: vader, corpora: {movies: {path: vader}, amazon: {path: x}}, tasks: [amazon]}",
        "data: give either `source` or `corpora`",
    ),
    (
        SMALL + "data: {corpora: {movies: {path: x}, imdb: {path: vader}}, tasks: [imdb]}",
        "data: vader has no domain 'imdb'",
    ),
    (SMALL + "task_steps: {amazon: 0}", r"task_steps\.amazon: .*greater than 0 \(found 0\)"),
    (SMALL + "evaluation: text", "evaluation: 'text' names no function: write package.module:function"),
    (SMALL + "evaluation: 'no_such.module:f'", "evaluation: there is no module 'no_such'"),
    (SMALL + "data: {labels: [bad, good, good]}", "data.labels: 'good' stands twice"),
    (SMALL + "delta0: .inf", r"delta0: .*finite number \(found inf\)"),
    (SMALL.replace("task_arithmetic", "task_arithmetic, alpha: .nan"), r"merges\.TA\.alpha: .*finite number"),
    (SMALL.replace("task_arithmetic", "kronecker"), "merge 'TA': kronecker needs Kronecker factors"),
    (SMALL + "sweep: {merges: [TA], alphas: [0, -1]}", r"sweep\.alphas\.1: .*greater than or equal to 0"),
    (SMALL + "sweep: {merges: [TA], alphas: [0, .nan]}", r"sweep\.alphas\.1: .*finite number"),
    (SMALL + "sweep: {merges: [TA], alphas: [1, 1.0]}", r"sweep\.alphas: 1\.0 stands twice"),
    (SMALL + "sedes: [1]", r"sedes: unknown key \(did you mean 'seeds'?"),
    (SMALL + "data: {taks: [a]}", r"data.taks: unknown key \(did you mean 'tasks'?"),
    (SMALL + "fisher: {examples: many}", r"fisher.examples: .*integer.*found 'many'"),
    (SMALL + "data: {tasks: [movies]}", "data: `base` and `tasks` must differ, but 'movies' is both"),
    (SMALL.replace("steps: 2", "step: 2", 1), "base_training.steps: Field required"),
    (
        SMALL.replace("method: task_arithmetic", "metod: ta"),
        r"merges.TA.metod: unknown key \(did you mean 'method'?",
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
        ("seeds", r"small\.yaml: cannot read 'seeds': overrides are written key=value"),
        ("seeds=[0", r"small\.yaml: 'seeds=\[0' is not YAML"),
        ("data={test: 5, test: 6}", "is not YAML: the key 'test' is given twice"),
        ("~", "cannot read '~': overrides are written key=value"),
        ("~compar", r"'~compar': there is no key 'compar' to leave out \(did you mean 'compare'"),
        ("~dta.test", r"small\.yaml: '~dta\.test': there is no key 'dta' to leave out; known: experiment"),
        ("~task_steps.a", "there is no key 'a' to leave out; known: none"),
        ("seeds.first=1", r"small\.yaml: 'seeds\.first=1': seeds is no mapping"),
        ("sedes=[1]", "did you mean 'seeds'"),
    ],
)
def test_bad_overrides(small, override, message):
    small.write_text(SMALL + "seeds: [0]\ntask_steps: {}\n")
    with pytest.raises(ConfigError, match=message):
        load(small, [override])


def test_a_key_can_be_left_out(small):
    config = load(small, ["~compare", "~merges.GM"])
    assert config.compare == ()
    assert set(config.merges) == {"TA"}


def test_a_config_that_is_not_in_utf_8_is_named(small):
    small.write_bytes(SMALL.encode() + b"# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"small\.yaml is not YAML: unacceptable character"):
        load(small)


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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_commands_in_a_comment_write_the_records_that_it_names(path):
    comment = path.read_text().split("experiment:")[0]
    named = {path.stem, *re.findall(r"name=([\w-]+)", comment)}
    assert set(re.findall(r"results/([\w-]+)\.jsonl", comment)) <= named
    commands = re.findall(r"^#   (python -m experiments run [^#]*)\\\n#     (.*)$", comment, re.MULTILINE)
    for command in commands:
        load(path, shlex.split("".join(command))[5:])
