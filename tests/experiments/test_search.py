"""Searches shared through Optuna's storage: by two processes, one killed; and a whole search on the tiny world."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import search
from experiments.config import ConfigError, load
from experiments.records import of_kind
from experiments.studies.search import stages

WORKER = Path(__file__).with_name("search_worker.py")
PATIENCE = 300  # seconds for a process that loads libraries on a machine with other work
SPACE = {"x": {"values": [-2.0, -1.0, 0.5, 1.0, 3.0]}}


def start(url, sampler, trials, seed, seconds, log):
    command = [sys.executable, str(WORKER), url, sampler, str(trials), str(seed), str(seconds), str(log)]
    path = os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})


def square(chosen):
    return chosen["x"] ** 2


# With a server at hand: GRADMATCH_TEST_STORAGE=postgresql://user:password@host/base (an empty one) tries that as well.
SERVERS = [os.environ["GRADMATCH_TEST_STORAGE"]] if "GRADMATCH_TEST_STORAGE" in os.environ else []


@pytest.mark.parametrize("kind", ["sqlite:///{}/study.db", "journal:{}/study.log", *SERVERS])
def test_two_workers_share_a_grid_and_one_is_killed(tmp_path, kind):
    url, log = kind.format(tmp_path), [tmp_path / "a", tmp_path / "b"]
    search.run_trials(url, "shared", square, SPACE, "grid", 1, 0)  # the tables are there
    hanging = start(url, "grid", 5, 1, 600, log[0])
    try:
        deadline = time.monotonic() + PATIENCE
        while not (log[0].exists() and log[0].read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        taken = float(log[0].read_text())
        hanging.send_signal(signal.SIGKILL)
    finally:
        hanging.kill()
        hanging.wait()
    other = start(url, "grid", 5, 2, 0.01, log[1])
    assert other.wait(PATIENCE) == 0
    study = search.run_trials(url, "shared", square, SPACE, "grid", 5, 3)
    assert {trial.params["x"] for trial in search.complete(study)} == {-2.0, -1.0, 0.5, 1.0, 3.0}
    assert study.best_value == 0.25
    mine = [float(line) for line in log[1].read_text().split()]
    assert mine[-1] == taken  # what the dead one had is run last
    assert len(mine) == 4  # and nothing twice


def test_two_living_workers_do_each_point_once_and_see_the_same_study(tmp_path):
    url, log = f"sqlite:///{tmp_path}/study.db", tmp_path / "log"
    search.run_trials(url, "shared", square, SPACE, "tpe", 1, 0)
    workers = [start(url, "tpe", 7, seed, 0.01, log) for seed in (1, 2)]
    assert [worker.wait(PATIENCE) for worker in workers] == [0, 0]
    study = search.run_trials(url, "shared", square, SPACE, "tpe", 7, 3)
    assert 7 <= len(search.complete(study)) <= 8  # both may finish the last one at once; seven count
    assert len(search.counted(study, 7)) == 7
    assert len(log.read_text().split()) == len(search.complete(study)) - 1


def test_a_storage_out_of_reach_is_one_sentence_without_the_password():
    with pytest.raises(ConnectionError, match="cannot open the postgresql storage") as caught:
        search.open_storage("postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)


@pytest.fixture
def search_config(beside, tiny_config):
    """A search on the models of the tiny sentiment config."""
    space = {"base_weight": {"values": [0.1, 1.0]}, "alpha": {"values": [0.5, 1.0]}}
    given = {"method": "gradient_matching", "space": space, "sampler": "grid", "trials": 4, "workers": 2}
    return beside("search", source=str(tiny_config), **given)


def test_a_search_finds_what_the_grid_of_the_config_finds(search_config, tiny_config, run, monkeypatch):
    monkeypatch.delenv(search.STORAGE, raising=False)
    found, out = run(search_config, options=("--workers", "1"))
    assert "The best of 4 trials of gradient_matching" in out
    nll = {(t["params"]["base_weight"], t["params"]["alpha"]): t["nll"] for t in of_kind(found, "trial")}
    assert set(nll) == {(0.1, 0.5), (0.1, 1.0), (1.0, 0.5), (1.0, 1.0)}
    (best,) = of_kind(found, "best")
    assert best["nll"] == min(nll.values())
    chosen = next(record["choice"] for record in run(tiny_config)[0] if record.get("model") == "GM*")
    for tried in chosen["tried"]:  # the choose stage's values, at alpha = 1
        assert nll[tried["value"], 1.0] == pytest.approx(tried["nll"])


def test_the_study_is_one_for_all_workers_and_another_where_the_numbers_would_be(search_config, tiny_config):
    def names(*overrides):
        return {stage.settings["study"] for stage in stages(load(search_config, overrides))}

    assert len(names()) == 1
    for same in ("trials=9", "workers=3", "name=other"):  # more trials go on with it
        assert names(same) == names()
    other = tiny_config.with_name("other.yaml")
    other.write_text(tiny_config.read_text() + "delta0: 1.0e-3\n")
    changed = [names("options.hbar_weight=2.0"), names("sampler=tpe"), names(f"source={other}"), names()]
    assert len(set.union(*changed)) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.base_weight={}", "give either `values` or both `low` and `high`"),
        ("space.base_weight={low: 1.0, high: 0.5}", "`low` must be below `high`"),
        ("space.base_weight={low: 0.0, high: 0.5, log: true}", "positive where `log`"),
        ("space.base_weight={low: 0.1, high: 0.5}", r"space\.base_weight: a grid needs `values`"),
        ("space={base_wight: {values: [1.0]}}", "has no option 'base_wight'"),
        ("space={alhpa: {values: [1.0]}}", r"no option 'alhpa' \(did you mean 'alpha'"),
        ("method=regmean", "method: regmean needs Gram matrices"),
        ("options={scale: 2}", "gradient_matching has no option 'scale'"),
        ("seed=7", "has no seed 7; it has 0"),
        ("sampler=cma", r"sampler: Input should be 'tpe' or 'grid'"),
    ],
)
def test_faults(search_config, override, message):
    with pytest.raises(ConfigError, match=message):
        load(search_config, [override])


def test_a_source_without_fine_tunes(search_config):
    other = search_config.with_name("theory.yaml")
    other.write_text("experiment: theory\n")
    with pytest.raises(ConfigError, match="is no config of the sentiment or vision experiment"):
        load(search_config, [f"source={other}"])
