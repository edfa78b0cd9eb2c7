"""Stages: cached by content, whole or absent, shared by workers, failing alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import running
from experiments.__main__ import main
from experiments.pipeline import Stage, in_order, is_done, plan
from experiments.running import run

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The stages' functions lie beside this file; worker processes find them as well."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parent.parent}")


@pytest.fixture
def log(tmp_path):
    """A file that says which stages ran."""
    path = tmp_path / "log"
    path.touch()
    return path


def stage(function, name, log, inputs=None, **settings):
    """One of `stage_functions`."""
    own = {} if function in ("fail", "interrupt", "add") else {"name": name}
    return Stage(name, f"stage_functions:{function}", {"log": str(log), **own, **settings}, inputs or {})


def chain(log, values=(1, 2, 3)):
    """a -> b -> c, each adding its value; d adds up b and c."""
    a = stage("count", "a", log, value=values[0])
    b = stage("count", "b", log, {"parent": a}, value=values[1])
    c = stage("count", "c", log, {"parent": a}, value=values[2])
    return stage("add", "add", log, {"parents": {"b": b, "c": c}})


def ran(log):
    """Names in the log, and a log that is empty again."""
    names = log.read_text().split()
    log.write_text("")
    return sorted(names)


def test_a_second_run_does_nothing(tmp_path, log):
    target = chain(log)
    outcome = run([target], tmp_path / "store")
    assert (outcome.ran, outcome.failed, outcome.skipped) == (["a", "b", "c", "add"], {}, [])
    assert (target.folder(tmp_path / "store") / "number").read_text() == "7"
    assert ran(log) == ["a", "add", "b", "c"]
    assert run([chain(log)], tmp_path / "store").ran == []
    assert ran(log) == []


def test_a_change_runs_just_what_depends_on_it(tmp_path, log):
    run([chain(log)], tmp_path)
    ran(log)
    assert run([chain(log, (1, 2, 30))], tmp_path).ran == ["c", "add"]
    assert ran(log) == ["add", "c"]


def test_the_card_says_where_a_result_comes_from(tmp_path, log):
    target = chain(log)
    run([target], tmp_path)
    card = json.loads((target.folder(tmp_path) / "stage.json").read_text())
    assert set(card) >= {"key", "settings", "seconds", "commit", "versions", "machine", "peak_memory_mb"}
    assert card["inputs"]["parents"]["b"].startswith("b-")


def test_a_failure_loses_only_what_needs_it(tmp_path, log, capsys):
    bad = stage("fail", "bad", log)
    child = stage("count", "child", log, {"parent": bad})
    outcome = run([child, chain(log)], tmp_path)
    assert outcome.ran == ["a", "b", "c", "add"]
    assert list(outcome.failed) == ["bad"]
    assert outcome.skipped == ["child"]
    assert "stage bad failed: no number today" in outcome.message()
    assert "bad: failed (ArithmeticError)" in capsys.readouterr().err
    assert not bad.folder(tmp_path).exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_stage_is_tried_again_by_the_next_run(tmp_path, log):
    bad = stage("fail", "bad", log)
    assert list(run([bad], tmp_path).failed) == ["bad"]
    assert list(run([bad], tmp_path).failed) == ["bad"]
    assert len(list(tmp_path.glob("bad-*.failed"))) == 1


def test_an_interrupted_stage_leaves_nothing(tmp_path, log):
    with pytest.raises(KeyboardInterrupt):
        run([stage("interrupt", "stop", log)], tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("stop")] == []


def start(stages, store, workers=1, **options):
    """A process that runs the stages."""
    made = ", ".join(f"Stage({one.name!r}, {one.function!r}, {one.settings!r})" for one in stages)
    code = (
        "from experiments.pipeline import Stage; from experiments.running import run; from pathlib import Path; "
        f"run([{made}], Path({str(store)!r}), {workers})"
    )
    return subprocess.Popen([sys.executable, "-c", code], **options)


def wait_for(condition, seconds=300):
    """Until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_run_is_taken_up_by_the_next(tmp_path, log):
    target = stage("slow", "slow", log, seconds=60.0)
    process = start([target], tmp_path)
    wait_for(log.read_text)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_done(target, tmp_path)
    assert list(tmp_path.glob("slow-*.partial"))  # what the kill left
    again = stage("slow", "slow", log, seconds=60.0)
    assert again.key == target.key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        assert run([again], tmp_path).ran == ["slow"]
    assert (again.folder(tmp_path) / "number").read_text() == "1"
    assert not list(tmp_path.glob("slow-*.partial"))


def test_helpers_that_show_progress_leave_nothing_behind(tmp_path, log):
    targets = [stage("progress", f"bar {number}", log) for number in range(6)]
    process = start(targets, tmp_path, workers=3, stderr=subprocess.PIPE, text=True)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0
    assert all(is_done(target, tmp_path) for target in targets)
    assert "20/20" in told
    assert "leaked" not in told


def test_a_killed_run_takes_its_helpers_along(tmp_path, log):
    targets = [stage("wait", name, log, stop=str(tmp_path / "stop")) for name in ("one", "two")]
    process = start(targets, tmp_path, workers=2)

    def is_free(target):
        with running._lock(target, tmp_path) as mine:
            return mine

    try:
        wait_for(lambda: len(log.read_text().split()) == 2)
        assert not any(map(is_free, targets))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: all(map(is_free, targets)))
    finally:
        (tmp_path / "stop").touch()


def test_what_a_killed_machine_ran_is_taken_up_by_another_on_the_same_folder(tmp_path, log):
    targets = [stage("wait", "long", log, stop=str(tmp_path / "stop")), stage("count", "short", log)]
    first = start(targets, tmp_path)
    wait_for(lambda: "long" in log.read_text())
    second = start(targets, tmp_path)
    try:
        wait_for(lambda: is_done(targets[1], tmp_path))  # the second works beside the first
        assert ran(log) == ["long", "short"]
        first.kill()
        wait_for(lambda: ran(log) == ["long"])  # and takes up what it had
    finally:
        (tmp_path / "stop").touch()
        assert second.wait(timeout=60) == 0
    assert all(is_done(target, tmp_path) for target in targets)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("words", "workers"), [((), 3), (("--workers", "1"), 1)])
def test_the_config_says_how_many_workers_and_the_command_overrides_it(tmp_path, monkeypatch, words, workers):
    path = tmp_path / "some.yaml"
    path.write_text("{experiment: theory, seeds: 2, workers: 3}")
    asked = []
    monkeypatch.setattr(
        running, "run", lambda stages, store, count: asked.append(count) or run(stages, store)
    )
    assert main(["run", str(path), "--results", str(tmp_path), *words]) == 0
    assert asked == [workers]
    with pytest.raises(SystemExit):
        main(["run", str(path), "--workers", "0"])


def test_two_workers_run_each_stage_once(tmp_path, log):
    stages = [stage("slow", f"cell{i}", log, seconds=0.3) for i in range(6)]
    outcome = run([*stages, chain(log)], tmp_path, workers=2)
    assert not outcome.failed
    assert ran(log) == ["a", "add", "b", "c", *(f"cell{i}" for i in range(6))]


def test_stages_come_after_what_they_read_and_once(log):
    target = chain(log)
    assert [item.name for item in in_order([target, target, chain(log)])] == ["a", "b", "c", "add"]


def test_the_plan_says_what_is_cached(tmp_path, log):
    stages = in_order([chain(log)])
    running.execute(stages[0], tmp_path)
    listing = plan(stages, tmp_path)
    assert f"cached        a-{stages[0].key}" in listing
    assert "4 stages, 3 to run, about 0.1 minutes" in listing
