"""Evolutionary searches: what a trial stands for, starts, storages that are shared and survive kills, failures that are never the best."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch

from gradmatch import GradmatchError, Task, merge, zoo
from gradmatch.zoo import storage
from gradmatch.zoo.space import Space
from tests.gradmatch.cases import curvature, state, tuned

pytestmark = pytest.mark.filterwarnings("ignore:a candidate is refused")
BASE = state(0, torch.float32)
MODELS = {name: tuned(BASE, seed) for seed, name in enumerate("abc", 1)}
GOAL = {key: 0.6 * MODELS["a"][key] + 0.4 * MODELS["b"][key] for key in BASE}


def near(merged):
    return -(sum(float((merged[key] - GOAL[key]).square().sum()) for key in GOAL) ** 0.5)


def evolve(**changed):
    return zoo.evolve(
        **{"base": BASE, "tasks": MODELS, "score": near, "trials": 12, "start": "uniform", **changed}
    )


def points(found):
    return [line["weights"] for line in found.history]


def test_the_best_of_the_log_is_the_merge_bit_by_bit_and_the_same_seed_gives_the_same_trials():
    found = evolve(groups=2, trials=30)
    best = max((line for line in found.history if line["score"]), key=lambda line: line["score"])
    assert best["score"] == [found.score]
    assert best["weights"] == found.weights
    rebuilt = merge(
        BASE, [Task(MODELS[n], weight=w, name=n) for n, w in best["weights"].items()], method="linear"
    )
    assert all(torch.equal(rebuilt[key], value) for key, value in found.merge().items())
    assert near(found.merge()) == found.score
    assert found.score > found.history[0]["score"][0]  # of the start
    assert points(evolve(groups=2, trials=30)) == points(found)
    assert points(evolve(groups=2, trials=30, seed=1))[1:] != points(found)[1:]
    assert json.loads(json.dumps(found.to_dict()))["trials"] == 30


def test_it_starts_from_the_heuristic_and_samples_around_it():
    chosen = zoo.select(BASE, MODELS, near)
    found = evolve(start="average", trials=20, sigma0=1e-4)
    assert found.history[0]["weights"] == pytest.approx(chosen.weights)
    assert found.notes == (f"{chosen.evaluations} evaluations for the start",)
    for weights in points(found):  # not at random, as where a sampler falls back
        zeros = dict.fromkeys(MODELS, 0.0)
        assert {**zeros, **weights} == pytest.approx({**zeros, **chosen.weights}, abs=0.02)
    for start in (chosen, chosen.weights):
        assert evolve(start=start, trials=1).score == pytest.approx(chosen.score)
    assert evolve(start="random", trials=2).trials == 2


@pytest.mark.parametrize("smooth", [False, True])
def test_every_tensor_is_reached_by_one_number_of_the_space(smooth):
    names = ["embed.w", "layers.0.w", "layers.1.norm.w", "layers.2.mlp.w", "norm.w", "head.w"]
    base = {name: torch.zeros(1) for name in names}
    ones = {name: torch.ones(1) for name in names}
    space = Space(("m",), "task_arithmetic", (0, 1, 2), 3, ("mlp",), smooth=smooth)
    point = {name: n / 100 for n, name in enumerate(space.bounds(), 1)}
    candidate = space.candidate(point)
    merged = merge(base, [Task(ones, weight=candidate.weights["m"], name="m")], method="task_arithmetic")
    place = {key.split("|")[0]: value for key, value in point.items()}
    wanted = {"layers.0.w": "layers 0-0", "layers.1.norm.w": "layers 1-1", "layers.2.mlp.w": "layers 2-2 mlp"}
    wanted |= {} if smooth else {"embed.w": "embeddings", "norm.w": "norm", "head.w": "head"}
    for name, where in wanted.items():
        assert float(merged[name]) == pytest.approx(place[where]), name


def test_options_of_the_rule_and_of_each_model_are_searched():
    found = evolve(merge_method="ties", search={"density": (0.2, 0.9)}, trials=6)
    densities = [line["options"]["density"] for line in found.history]
    assert all(0.2 <= density <= 0.9 for density in densities)
    assert found.options["density"] in densities
    space = Space.of(zoo.finding.open_checkpoint(BASE), list(MODELS), "ties", per_model=("density",))
    own = evolve(space=space, trials=4)
    assert all(set(task.options) == {"density"} for task in own.tasks)
    assert near(own.merge()) == pytest.approx(own.score)


def both(merged):
    return [-float((merged["norm.bias"] - MODELS[name]["norm.bias"]).norm()) for name in "ab"]


def test_several_scores_give_a_front_and_a_figure(tmp_path):
    found = evolve(score=both, method="nsga2", trials=40, merge_method="task_arithmetic")
    assert list(found.scores) == ["score 1", "score 2"]
    ends = [tuple(one["scores"].values()) for one in found.front]
    assert ends
    for one in ends:
        assert not any(other[0] > one[0] and other[1] > one[1] for other in ends)
    assert found.score == pytest.approx(max(sum(one) for one in ends))
    found.figure(tmp_path / "front.svg")
    assert "Pareto front" in (tmp_path / "front.svg").read_text()
    with pytest.raises(GradmatchError, match="a Pareto front needs two objectives"):
        evolve(trials=1).figure(tmp_path / "x.svg")


def spoilt(what):
    calls = []

    def score(merged):
        calls.append(1)
        if len(calls) % 2 == 0:
            return what(merged) if callable(what) else what
        return near(merged)

    return score


def crash(_):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("what", [float("nan"), float("inf"), None, [1.0, 2.0], crash])
@pytest.mark.parametrize("sign", [1, -1])
def test_trials_without_a_score_are_kept_with_their_reason_and_are_never_the_best(what, sign):
    inner = spoilt(what)

    def score(merged):
        value = inner(merged)
        return value if value is None or isinstance(value, list) else sign * value

    found = evolve(score=score, trials=8)
    failed = [line for line in found.history if line["state"] == "fail"]
    assert len(failed) == 4
    assert all(line["why"] and line["score"] is None for line in failed)
    assert found.trials == 8
    assert found.score in [line["score"][0] for line in found.history if line["score"]]


def test_a_search_without_any_score_says_so():
    for method, score in (("cmaes", lambda _: float("nan")), ("nsga2", lambda _: (float("nan"), 0.0))):
        with pytest.raises(
            GradmatchError, match=r"none of 3 trials has a score .the first: its score is NaN"
        ):
            evolve(score=score, method=method, trials=3)


@pytest.mark.parametrize("kind", ["s.journal", "sqlite:///{}/s.sqlite"])
def test_a_search_goes_on_and_another_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    place = kind.format(tmp_path)
    first = evolve(storage=place, trials=5)
    assert first.trials == 5
    more = evolve(storage=place, trials=9)
    assert [line["number"] for line in more.history] == list(range(9))
    assert points(more)[:5] == points(first)
    assert len({json.dumps(p) for p in points(more)}) == 9  # nothing twice
    for change, what in (
        ({"score": lambda merged: 0.0}, "score"),
        ({"tasks": {**MODELS, "a": BASE}}, "models"),
        ({"groups": 1}, "bounds"),
        ({"method": "nsga2", "score": both}, "score|search|objectives"),
        ({"merge_method": "task_arithmetic"}, "method"),
    ):
        with pytest.raises(GradmatchError, match=f"is of another search: its ({what}) is"):
            evolve(storage=place, **change)
    assert evolve(storage=place, name="other", trials=2).trials == 2


WORKER = """
import sys, time, warnings, os
warnings.simplefilter("ignore")
import torch
sys.path.insert(0, {root!r})
from tests.gradmatch.test_zoo_evolving import *
place, trials, log, hang = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "hang"
class Score:
    label = "tests.gradmatch.test_zoo_evolving.near"
    def __call__(self, merged):
        with open(log, "a") as file: file.write("x\\n")
        if hang: time.sleep(600)
        return near(merged)
evolve(score=Score(), storage=place, trials=trials, seed=3)
"""


def started(tmp_path, place, trials, log, hang=""):
    code = WORKER.format(root=str(Path(__file__).parents[2]))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, place, str(trials), str(log), hang], env=env, cwd=tmp_path
    )


SERVERS = [os.environ["GRADMATCH_TEST_STORAGE"]] if "GRADMATCH_TEST_STORAGE" in os.environ else []


@pytest.mark.parametrize("kind", ["journal:{}/s", *SERVERS])
def test_workers_share_a_search_and_one_that_is_killed_loses_nothing(tmp_path, kind):
    place = kind.format(tmp_path)
    first = evolve(storage=place, trials=2)
    hanging = started(tmp_path, place, 8, tmp_path / "hanging", "hang")
    deadline = time.monotonic() + 120
    while not (tmp_path / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    hanging.send_signal(signal.SIGKILL)
    hanging.wait()
    if kind.startswith("journal"):
        with (tmp_path / "s").open("ab") as file:
            file.write(b'{"op_code": 4, "worker_id')
        lock = tmp_path / "s.lock"
        lock.symlink_to(tmp_path / "s")
        os.utime(lock, (0, 0), follow_symlinks=False)
        with pytest.warns(UserWarning, match="(is removed|is cut off)") as told:
            storage.open_storage(place)
        assert len(told) == 2
    other = started(tmp_path, place, 8, tmp_path / "other")
    mine = evolve(storage=place, trials=8)
    assert other.wait(timeout=240) == 0
    done = evolve(storage=place, trials=8)
    assert (mine.trials, done.trials) == (8, 8)
    assert len({json.dumps(p) for p in points(done)}) == 8
    study = optuna.load_study(storage=storage.open_storage(place), study_name="zoo")
    stale = [trial for trial in study.trials if trial.user_attrs.get("why") == "its worker is gone"]
    assert len(stale) == 1
    again = [trial.params for trial in study.trials if trial.number != stale[0].number]
    assert stale[0].params in again  # what the dead one had was tried by another
    assert points(done)[:2] == points(first)


def test_an_interrupted_search_goes_on_in_the_same_process(tmp_path):
    class Score:
        label, calls = "a score", 0

        def __call__(self, merged):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return near(merged)

    with pytest.raises(KeyboardInterrupt):
        evolve(score=Score(), storage=tmp_path / "s", trials=5)
    calm = Score()
    calm.calls = 3
    done = evolve(score=calm, storage=tmp_path / "s", trials=5)
    assert (done.trials, len({json.dumps(p) for p in points(done)})) == (5, 5)


def test_who_is_gone_is_told_by_process_and_by_signs_of_life():
    me = storage.worker()
    assert not storage.lost(me, 0.0)
    assert storage.lost({**me, "began": "1"}, time.time())  # the number came again
    assert storage.lost({**me, "pid": 2**22 + 1}, time.time())
    assert not storage.lost({**me, "host": "elsewhere"}, time.time())  # slow, and alive
    assert storage.lost({**me, "host": "elsewhere"}, time.time() - storage.SILENT - 1)


def test_a_server_out_of_reach_is_told_without_its_password_and_a_network_disk_is_warned_of(
    tmp_path, monkeypatch
):
    with pytest.raises(ConnectionError, match="cannot open the postgresql storage") as caught:
        evolve(storage="postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)
    monkeypatch.setattr(storage, "filesystem", lambda path: "nfs4")
    with pytest.warns(UserWarning, match="network disk"):
        storage.open_storage(tmp_path / "s.db")
    monkeypatch.undo()
    assert storage.filesystem(tmp_path)


def test_forecasts_spare_candidates():
    base = {key: value.double() for key, value in BASE.items()}
    tasks = {}
    for seed, name in enumerate("abd", 1):
        model = tuned(base, seed, 0.05 if name != "d" else 3.0)
        tasks[name] = Task(model, curvature(model, 1, 1000))
    calls = []

    def score(merged):
        calls.append(1)
        return -float(merged["norm.bias"].norm())

    found = evolve(base=base, tasks=tasks, score=score, start={"a": 0.5, "b": 0.5}, trials=15)
    pruned = [line for line in found.history if line["state"] == "pruned"]
    assert pruned
    assert all("forecast to cost" in line["why"] and line["weights"]["d"] > 0.01 for line in pruned)
    assert len(calls) == found.evaluations == 15 - len(pruned)
    assert f"{len(pruned)} of 15 trials were not evaluated" in found.summary()


def test_a_changed_folder_is_read_again(tmp_path):
    from safetensors.torch import save_file

    for name, model in MODELS.items():
        (tmp_path / name).mkdir()
        save_file(model, tmp_path / name / "model.safetensors")
    first = evolve(tasks=tmp_path, trials=3, storage=tmp_path / "s")
    save_file(GOAL, tmp_path / "c" / "model.safetensors")
    assert evolve(tasks=tmp_path, trials=3).score != first.score
    with pytest.raises(GradmatchError, match="another search: its models"):
        evolve(tasks=tmp_path, trials=3, storage=tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "cma"}, "method is 'cma' .did you mean 'cmaes'"),
        ({"trials": 0}, "trials is 0; a search needs at least one"),
        ({"tasks": {"a": MODELS["a"]}}, "CMA-ES needs at least two numbers to search"),
        ({"groups": 5}, "groups is 5, and the base has 2 layers"),
        (
            {"search": {"densty": (0, 1)}, "merge_method": "ties"},
            "no option 'densty' to search .did you mean 'density'",
        ),
        ({"search": {"density": (1, 0.5)}, "merge_method": "ties"}, "density is searched from 1 to 0.5"),
        ({"start": "averag"}, "start is 'averag' .did you mean 'average'"),
        ({"start": {"z": 1.0}}, "start names 'z'"),
        ({"population": 1}, "population is 1; a generation needs at least 2"),
        ({"forecast": True}, "a has no curvature file"),
        ({"forecast": True, "groups": 1}, "a forecast is of one weight a model"),
        ({"method": "nsga2"}, "the score is one number; return several"),
        ({"score": 3}, "score must be a function"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        evolve(**change)
