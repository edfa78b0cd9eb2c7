"""What an output may replace, where it may lie, and what is left where a process dies while it publishes."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from gradmatch import Task, merge
from gradmatch.estimators import Curvature
from gradmatch.merging import prepare
from gradmatch.output.writer import FolderSink, check_output


@pytest.fixture
def models(tmp_path):
    """base/, one/, and the curvature known.safetensors of one, in a folder."""
    folder = tmp_path / "models"
    for number, name in enumerate(("base", "one")):
        (folder / name).mkdir(parents=True)
        save_file({"w": torch.full((4,), float(number))}, folder / name / "model.safetensors")
    Curvature.from_dict({"w": torch.ones(4)}, 1).save(folder / "known.safetensors")
    return folder


def to(out, models, **options):
    """The merge of one/ into `out`."""
    return merge(models / "base", [Task(models / "one")], method="averaging", out=out, **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PLACES = ["base", "one", "", "base/inner", "known.safetensors", "known.safetensors/inner", "link"]


@pytest.mark.parametrize("place", PLACES)
def test_an_output_apart_from_every_input(models, place):
    (models / "link").symlink_to(models / "one")
    before = contents(models)
    task = Task(models / "one", models / "known.safetensors")
    said = "output folder .* and the input .* lie in one another; choose an output"
    with pytest.raises(ValueError, match=said):
        merge(models / "base", [task], base_curvature=1.0, out=models / place, overwrite=True)
    assert contents(models) == before
    assert not list(models.parent.glob("*.partial*"))


def test_overwrite_replaces_only_what_a_merge_wrote(models, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match=r"holds files but no gradmatch.json, so no merge wrote it"):
        to(tmp_path / "home", models, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "models"]


BESIDE = {
    "out.partial": "where .*out would be written first, and it is no unfinished merge",
    "out.replaced": "where the old .*out would wait, and it is no merge",
}


@pytest.mark.parametrize(("name", "text"), BESIDE.items())
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_stands_beside_the_output_and_is_not_ours(models, tmp_path, name, text, kind):
    mine = tmp_path / name / "mine.txt" if kind == "folder" else tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=text):
        to(tmp_path / "out", models)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out.partial.journal").exists()


@pytest.mark.parametrize("content", ["my diary", "\0" * 100])
def test_a_journal_that_is_none(models, tmp_path, content):
    (tmp_path / "out.partial.journal").write_text(content)
    with pytest.raises(FileExistsError, match=r"is damaged or no journal of a merge; remove it"):
        to(tmp_path / "out", models)
    assert (tmp_path / "out.partial.journal").read_text() == content


def test_the_working_directory_and_links(models, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for out in (".", "..", "/"):
        with pytest.raises(ValueError, match="is or holds the working directory"):
            to(out, models, overwrite=True)
    (tmp_path / "real").mkdir()
    for link, target in (("there", "real"), ("dangling", "absent")):
        (tmp_path / link).symlink_to(tmp_path / target)
        done = to(tmp_path / link, models)
        assert done.path == tmp_path / target
        assert any(
            "no config.json is written, as the base comes without one" in note for note in done.report.notes
        )
        assert (tmp_path / link / "model.safetensors").is_file()


def test_a_failed_check_keeps_the_old_output_and_publishes_nothing(models, tmp_path):
    to(tmp_path / "out", models)
    before = contents(tmp_path / "out")
    for out, options in ((tmp_path / "out", {"overwrite": True}), (tmp_path / "new", {})):
        with pytest.raises(ValueError, match=r"has no config.json"):
            to(out, models, verify="reload", **options)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out"]


class Killed(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("call", ["first rename", "second rename", "unlink", "rmtree"])
def test_killed_while_it_publishes(models, tmp_path, monkeypatch, call):
    out = tmp_path / "out"
    to(out, models)
    old = contents(out)
    renames = []

    def die(*_, **__):
        raise Killed

    def rename(source, target, plain=os.rename):
        renames.append(target)
        if len(renames) == (1 if call == "first rename" else 2):
            raise Killed
        plain(source, target)

    if "rename" in call:
        monkeypatch.setattr("gradmatch.output.publishing.os.rename", rename)
    elif call == "unlink":
        monkeypatch.setattr("gradmatch.output.publishing.Path.unlink", die)
    else:
        monkeypatch.setattr("gradmatch.output.publishing.shutil.rmtree", die)
    with pytest.raises(Killed):
        to(out, models, overwrite=True, dtype="float64")
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="pass overwrite"):  # and puts things right
        to(out, models, dtype="float64")
    if "rename" in call:
        assert contents(out) == old
        left = ["models", "out", "out.partial", "out.partial.journal"]
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        written = []
        monkeypatch.setattr(FolderSink, "write", lambda self, step, *_: written.append(step))
        to(out, models, overwrite=True, dtype="float64")
        assert not written  # nothing is computed again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out"]
    assert b"float64" in (out / "gradmatch.json").read_bytes()
    assert contents(out).keys() == old.keys()


def test_a_damaged_line_ends_the_journal(models, tmp_path):
    tensors = {f"layers.{i}.w": torch.ones(3) for i in range(4)}
    save_file(tensors, models / "base" / "model.safetensors")
    made = prepare(models / "base", [Task(models / "base")], method="averaging")
    sink = FolderSink(tmp_path / "out", made, "x")
    for step in made.steps[:3]:
        sink.finish(step, {})
    sink.close()
    journal = tmp_path / "out.partial.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"\0" * 20 + b"\n", lines[4]]))
    again = FolderSink(tmp_path / "out", made, "x")
    assert list(again.stats) == [made.steps[0].name]
    again.finish(made.steps[1], {})
    again.close()
    assert json.loads(journal.read_bytes().splitlines()[-1])["tensor"] == made.steps[1].name


def test_an_output_that_cannot_lie_there_is_found_in_the_dry_run_too(models, tmp_path, monkeypatch):
    made = prepare(models / "base", [Task(models / "one")], method="averaging")
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        for attempt in (lambda out=out: to(out, models), lambda out=out: check_output(out, made, False)):
            with pytest.raises(NotADirectoryError, match=r"file is a file, so the output .*out cannot lie"):
                attempt()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=r"nothing may be written in .*, where the output .* would lie"):
        to(tmp_path / "out", models)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "models"]
