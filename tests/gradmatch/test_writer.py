"""The output folder: whole or absent, resumed to the same bytes, locked, and within the disk's room."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradmatch import Task, merge
from gradmatch.merging import prepare
from gradmatch.output import writer
from gradmatch.output.identity import identity
from gradmatch.output.verify import verify
from gradmatch.output.writer import FolderSink
from tests.gradmatch.tiny import gpt2

ROOT = Path(__file__).parents[2]
SCRIPT = """
import itertools, os, sys, time, traceback
import torch
import gradmatch.output.writer as writer
from gradmatch import Task, merge
writer.SYNC_BYTES = 1 << 16
plain = writer.FolderSink.write

def work(models, out, limit):
    numbers = itertools.count(1)
    def write(self, *args):
        number = next(numbers)
        if limit and number > limit:
            if number == limit + 1:
                print("waiting", flush=True)
            time.sleep(3600)
        plain(self, *args)
    writer.FolderSink.write = write
    tasks = [Task(f"{models}/m{i}", name=f"t{i}", weight=0.5) for i in (1, 2)]
    print("start", os.getpid(), flush=True)
    merge(f"{models}/m0", tasks, method="dare", density=0.5, out=out, shard_bytes=200_000)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            models, out, limit = line.split()
            work(models, out, int(limit))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print("exit", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of 40 tensors in files."""
    folder = tmp_path_factory.mktemp("models")
    for number in range(3):
        (folder / f"m{number}").mkdir()
        torch.manual_seed(number)
        tensors = {f"layers.{i}.w": torch.randn(60, 50) for i in range(40)}
        save_file(tensors, folder / f"m{number}" / "model.safetensors", metadata={"format": "pt"})
        (folder / f"m{number}" / "config.json").write_text(json.dumps({"model_type": "none"}))
    return folder


def tasks(models):
    return [Task(models / f"m{i}", name=f"t{i}", weight=0.5) for i in (1, 2)]


def digest(folder):
    """Names and bytes of everything that does not state a time or a path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def started(models):
    """Starts a merge in a process of its own, which waits before write number `limit` + 1 (0: never); returns its id."""
    server = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def start(out, limit=0):
        print(models, out, limit, file=server.stdin, flush=True)
        said, number = server.stdout.readline().split()
        assert said == "start"
        return int(number)

    start.says = server.stdout.readline
    yield start
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def expected(started, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    started(out)
    assert started.says() == "exit 0\n"
    return digest(out)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(started, expected, tmp_path, seed):
    """Twice after a random number of writes, where the process waits for it (so that load cannot let it escape), twice at any time."""
    chance = random.Random(seed)
    out, journal = tmp_path / "out", tmp_path / "out.partial.journal"
    kills = resumed = 0
    # Results are taken over in order: where one thread races ahead of the other, fewer writes than these leave no journal.
    for writes in (chance.randrange(20, 30), chance.randrange(1, 10), -1, -1, 0, 0):
        process = started(out, max(0, writes))
        if writes > 0:
            assert started.says() == "waiting\n"
            deadline = time.monotonic() + 300
            while not kills and not count(journal):  # the first time something is there to take over
                assert time.monotonic() < deadline, "nothing was committed"
                time.sleep(0.01)
        if writes:
            time.sleep(chance.uniform(0, 0.2))
            os.kill(process, signal.SIGKILL)
        finished = started.says() == "exit 0\n"
        kills += not finished
        resumed = max(resumed, count(journal))
        if out.exists():  # whole or not at all, also where the kill came right after
            break
        assert not finished
    assert kills >= 2
    assert resumed >= 1
    assert digest(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def count(journal):
    """Tensors that a journal holds."""
    try:
        return max(0, journal.read_text().count("\n") - 2)
    except FileNotFoundError:
        return 0


def test_a_resumed_run_does_not_compute_again_what_is_journalled(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    written = []
    plain = FolderSink.write

    def failing(self, step, first, values):
        if step.name == "layers.20.w":
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, step, first, values)

    monkeypatch.setattr(FolderSink, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        merge(models / "m0", tasks(models), method="averaging", out=out)
    assert not out.exists()
    done = {
        json.loads(line)["tensor"] for line in (tmp_path / "out.partial.journal").read_text().splitlines()[2:]
    }
    assert 5 <= len(done) < 40

    def counting(self, step, first, values):
        written.append(step.name)
        plain(self, step, first, values)

    monkeypatch.setattr(FolderSink, "write", counting)
    merged = merge(models / "m0", tasks(models), method="averaging", out=out)
    assert done.isdisjoint(written)
    assert done | set(written) == set(merged)
    monkeypatch.undo()
    plainly = merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "other")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "other" / "model.safetensors").read_bytes()
    assert merged.report.to_dict() == plainly.report.to_dict()


def test_what_a_kill_left_of_the_last_files_is_not_published(models, expected, tmp_path):
    """A process that dies between writing a small file aside and renaming it leaves it under a passing name."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = {"method": "dare", "density": 0.5, "shard_bytes": 200_000}
    sink = FolderSink(out, made := prepare(models / "m0", tasks(models), **arguments), identity(made))
    sink.close()
    (partial / ".gradmatch-078a48003bed").write_bytes(b"half an ind")
    (partial / "config.json").write_text("half a con")
    (partial / "folder").mkdir()
    merge(models / "m0", tasks(models), **arguments, out=out)
    assert digest(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_slow_merge_is_journalled_by_time_and_its_bar_goes_on(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer, "SYNC_SECONDS", 0.0)
    plain = FolderSink.finish

    def finish(self, step, stats):
        plain(self, step, stats)
        if step.name == "layers.9.w":
            raise KeyboardInterrupt

    journalled = []
    close = FolderSink.close

    def closing(self):
        deadline = time.monotonic() + 300
        while not self._queue.empty() and time.monotonic() < deadline:
            time.sleep(0.005)
        journalled.append(count(tmp_path / "out.partial.journal"))
        close(self)

    monkeypatch.setattr(FolderSink, "finish", finish)
    monkeypatch.setattr(FolderSink, "close", closing)
    with pytest.raises(KeyboardInterrupt):
        merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out")
    assert journalled[0] >= 8  # far below SYNC_BYTES
    monkeypatch.setattr(FolderSink, "finish", plain)
    merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out", progress=True)
    assert "averaging, resumed: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["nothing", "another merge", "a shard of another size"])
def test_what_a_journal_is_good_for(models, tmp_path, change):
    made = prepare(models / "m0", tasks(models), method="averaging")
    sink, step = FolderSink(tmp_path / "out", made, "first"), made.steps[0]
    sink.write(step, 0, torch.zeros(step.spec.numel))
    sink.finish(step, {})
    sink.close()
    if change == "a shard of another size":
        os.truncate(tmp_path / "out.partial" / "model.safetensors", 10)
    again = FolderSink(tmp_path / "out", made, "second" if change == "another merge" else "first")
    assert list(again.stats) == ([step.name] if change == "nothing" else [])
    again.abandon()
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused(models, tmp_path):
    made = prepare(models / "m0", tasks(models), method="averaging")
    sink = FolderSink(tmp_path / "out", made, "x")
    with pytest.raises(BlockingIOError, match="another process is writing"):
        merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out")
    sink.abandon()
    merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out")


def test_existing_outputs(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    merge(models / "m0", tasks(models), method="averaging", out=out)  # an empty folder is no output
    before = digest(out)
    with pytest.raises(FileExistsError, match=r"exists; pass overwrite \(--overwrite\)"):
        merge(models / "m0", tasks(models), method="task_arithmetic", out=out)
    assert digest(out) == before
    merge(models / "m0", tasks(models), method="task_arithmetic", out=out, overwrite=True)
    assert digest(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # neither journal nor lock nor the old one
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "file")


def test_no_room_is_said_before_anything_is_computed(models, tmp_path, monkeypatch):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 0.00 GB in .*nothing was written"):
        merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [20, 100, 180, 300, 400])
def test_disk_full_at_any_moment_leaves_nothing_half(models, tmp_path, limit, monkeypatch):
    """A disk that takes `limit` more KB: the output is absent, and the next run, with room, completes it."""
    room = [limit * 1000]
    plain = os.pwrite

    def pwrite(fd, data, offset):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    merged = merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out")
    memory = merge(models / "m0", tasks(models), method="averaging")
    assert all(torch.equal(merged[name], memory[name]) for name in memory)


def test_a_sync_that_fails_is_reported(models, tmp_path, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verification_notices_a_file_that_is_not_what_was_planned(models, tmp_path):
    made = prepare(models / "m0", tasks(models), method="averaging")
    done = merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"'layers.0.w' is BF16 \[60, 50\], planned was F32"):
        verify(done, made)


def test_reload_names_what_transformers_misses(tmp_path):
    gpt2(n_layer=1).save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "n_layer": 2}))
    options = {"method": "averaging", "out": tmp_path / "out", "verify": "reload"}
    with pytest.raises(ValueError, match="transformers reports"):
        merge(tmp_path / "base", [Task(tmp_path / "base")], **options)


def test_writers_stop_once_a_sync_has_failed(models, tmp_path):
    made = prepare(models / "m0", tasks(models), method="averaging")
    sink = FolderSink(tmp_path / "out", made, "x")
    sink._failure = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        sink.write(made.steps[0], 0, torch.zeros(3))
    with pytest.raises(OSError, match="Input/output"):
        sink.close()


def test_an_interrupted_call_keeps_what_it_has_done(models, tmp_path, monkeypatch):
    plain = FolderSink.write

    def interrupted(self, step, first, values):
        if step.name == "layers.30.w":
            raise KeyboardInterrupt
        plain(self, step, first, values)

    monkeypatch.setattr(FolderSink, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(models / "m0", tasks(models), method="averaging", out=tmp_path / "out")
    assert count(tmp_path / "out.partial.journal") >= 10


@pytest.fixture
def sentence_transformer(models, tmp_path):
    """A model with modules beside it, as sentence-transformers saves them, and what should not be carried along."""
    base = shutil.copytree(models / "m0", tmp_path / "base")
    paths = ["", "1_Pooling", "2_Dense"]
    (base / "modules.json").write_text(json.dumps([{"idx": i, "path": path} for i, path in enumerate(paths)]))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 50}')
    (base / "2_Dense").mkdir()
    save_file({"linear.weight": torch.eye(3)}, base / "2_Dense" / "model.safetensors")
    (base / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "1_Pooling" / "run.py").write_text("raise SystemExit")
    (tmp_path / "secret.json").write_text("{}")
    (base / "1_Pooling" / "linked.json").symlink_to(tmp_path / "secret.json")
    (base / "unlisted").mkdir()
    (base / "unlisted" / "config.json").write_text("{}")
    return base


def test_modules_beside_the_model_are_carried_along(models, sentence_transformer, tmp_path):
    done = merge(sentence_transformer, tasks(models), method="averaging", out=tmp_path / "out")
    held = {path.relative_to(done.path).as_posix() for path in done.path.rglob("*") if path.is_file()}
    assert held == {
        "1_Pooling/config.json", "2_Dense/model.safetensors", "README.md", "config.json", "gradmatch.json", "model.safetensors",
        "modules.json",
    }  # fmt: skip
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (done.path / name).read_bytes() == (sentence_transformer / name).read_bytes()
    said = "\n".join(done.report.notes)
    assert "2_Dense/model.safetensors: the base's, not merged" in said
    for name in ("2_Dense/pytorch_model.bin", "1_Pooling/run.py", "1_Pooling/linked.json"):
        assert f"{name}: not carried along" in said


LISTED = [
    ([{"path": "../m1"}], r"points outside its folder: '\.\./m1'"),
    ([{"path": "/etc"}], r"points outside its folder: '/etc'"),
    ([{"path": "link"}], r"points outside its folder: 'link'"),
    ([{"idx": 0}], r"is no list of modules with a path each"),
    ("1_Pooling", r"is no list of modules"),
]


@pytest.mark.parametrize(("listed", "text"), LISTED)
def test_modules_outside_the_folder_are_found_in_the_plan(models, sentence_transformer, listed, text):
    (sentence_transformer / "link").symlink_to(models)
    (sentence_transformer / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=text):
        prepare(sentence_transformer, tasks(models), method="averaging")


def test_modules_of_a_hub_snapshot_may_be_links_to_its_blobs(models, sentence_transformer, tmp_path):
    snapshot = tmp_path / "hub" / "snapshots" / "0a1b"
    shutil.copytree(sentence_transformer, snapshot)
    blob = tmp_path / "hub" / "blobs" / "x"
    blob.parent.mkdir()
    shutil.move(snapshot / "1_Pooling" / "config.json", blob)
    (snapshot / "1_Pooling" / "config.json").symlink_to(blob)
    done = merge(snapshot, tasks(models), method="averaging", out=tmp_path / "out")
    assert not (done.path / "1_Pooling" / "config.json").is_symlink()
    assert (done.path / "1_Pooling" / "config.json").read_bytes() == blob.read_bytes()
