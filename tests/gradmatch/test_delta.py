"""Outputs that hold merged - base in float32, and what opens them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradmatch import Task, merge, open_checkpoint
from gradmatch.cli import main
from gradmatch.output.writer import FolderSink
from tests.gradmatch.cases import state

SHAPES = {"layers.0.w": (40, 30), "layers.1.w": (30, 40), "norm.weight": (30,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base/ in bfloat16 with an integer buffer, and two fine-tunes a/ and b/ whose updates are below its steps."""
    folder = tmp_path_factory.mktemp("delta")
    start = state(0, torch.float32, shapes=SHAPES)
    for number, name in enumerate(("base", "a", "b")):
        (folder / name).mkdir()
        moved = state(number, torch.float32, shapes=SHAPES)
        tensors = {n: (v + (1e-3 * moved[n] if number else 0)).bfloat16() for n, v in start.items()}
        save_file({**tensors, "positions": torch.arange(4)}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "none"}))
    return folder


def tasks(models):
    return [Task(models / name, weight=0.3, name=name) for name in "ab"]


def exact(models):
    """The merge in float64."""
    base, a, b = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b"))
    wide = {n: [x[n].double() for x in (base, a, b)] for n in SHAPES}
    return {n: start + 0.3 * (one - start) + 0.3 * (two - start) for n, (start, one, two) in wide.items()}


def test_base_plus_delta_is_the_merge_that_bfloat16_loses(models, tmp_path):
    with pytest.warns(UserWarning, match=r"rounding kept .* form='delta'"):
        rounded = merge(models / "base", tasks(models), method="task_arithmetic", out=tmp_path / "rounded")
    delta = merge(
        models / "base", tasks(models), method="task_arithmetic", out=tmp_path / "out", form="delta"
    )
    stored = load_file(tmp_path / "out" / "delta.safetensors")
    start = load_file(models / "base" / "model.safetensors")
    assert set(stored) == set(SHAPES)  # what is the base's is not written
    assert sorted(delta) == sorted(start)
    assert torch.equal(delta["positions"], start["positions"])
    for name, wanted in exact(models).items():
        update = (wanted - start[name].double()).norm()
        assert stored[name].dtype == delta[name].dtype == torch.float32
        assert (delta[name].double() - wanted).norm() < 1e-3 * update  # float32 against float64
        assert (rounded[name].double() - wanted).norm() > 0.1 * update
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "delta.safetensors",
        "gradmatch.json",
    ]
    assert "holds merged - base" in (tmp_path / "out" / "README.md").read_text()
    assert delta.report.kept_update is None


def test_float64_arithmetic_gives_a_float64_delta(models, tmp_path):
    delta = merge(
        models / "base",
        tasks(models),
        method="averaging",
        precision="float64",
        out=tmp_path / "out",
        form="delta",
    )
    wanted = merge(models / "base", tasks(models), method="averaging", precision="float64", dtype="float64")
    assert all(torch.equal(delta[name], wanted[name]) for name in SHAPES)


def test_a_delta_is_a_model_to_merge_and_to_write_out(models, tmp_path):
    made = merge(
        models / "base",
        tasks(models),
        method="task_arithmetic",
        out=tmp_path / "out",
        form="delta",
        shard_bytes=6000,
    )
    assert (tmp_path / "out" / "delta.safetensors.index.json").is_file()
    whole = merge(
        models / "base",
        [Task(tmp_path / "out")],
        method="passthrough",
        dtype="float32",
        out=tmp_path / "whole",
    )
    assert all(torch.equal(whole[name], made[name]) for name in made)
    assert (tmp_path / "whole" / "config.json").is_file()
    again = merge(
        tmp_path / "out", [Task(models / "a", weight=0.5)], method="task_arithmetic"
    )  # on the base that its card names
    start = made["norm.weight"]
    torch.testing.assert_close(
        again["norm.weight"], start + 0.5 * (open_checkpoint(models / "a")["norm.weight"].float() - start)
    )


def test_an_interrupted_delta_resumes_to_the_same_bytes(models, tmp_path, monkeypatch):
    plain = FolderSink.write
    written = []

    def interrupted(self, step, first, values):
        if step.name == "norm.weight":
            raise KeyboardInterrupt
        plain(self, step, first, values)

    def counting(self, step, first, values):
        written.append(step.name)
        plain(self, step, first, values)

    call = {"method": "task_arithmetic", "form": "delta"}
    monkeypatch.setattr(FolderSink, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(models / "base", tasks(models), out=tmp_path / "out", **call)
    monkeypatch.setattr(FolderSink, "write", counting)
    merge(models / "base", tasks(models), out=tmp_path / "out", **call)
    assert "norm.weight" in written
    assert len(set(written)) < len(SHAPES)
    monkeypatch.undo()
    merge(models / "base", tasks(models), out=tmp_path / "other", **call)
    for name in ("delta.safetensors", "gradmatch.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "bfloat16"}, r"form='delta' does not go with dtype='bfloat16': a delta is float32"),
        ({"verify": "reload"}, r"does not go with verify='reload'"),
        ({"batchnorm": "recalibrate"}, r"does not go with batchnorm='recalibrate'"),
        ({"form": "dleta"}, r"form is 'dleta' \(did you mean 'delta'\?\)"),
        ({"out": None}, r"form='delta' is a form of files: pass out"),
    ],
)
def test_what_a_delta_cannot_be(models, tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        merge(
            models / "base",
            tasks(models),
            method="averaging",
            **{"out": tmp_path / "out", "form": "delta", **options},
        )
    assert not list(tmp_path.iterdir())


def test_other_layers_than_the_bases_have_no_difference(models, tmp_path):
    from gradmatch.inputs.slices import Slice, stack

    cut = stack([Slice(models / "base", 0, 1)])
    with pytest.raises(ValueError, match="has other layers or another vocabulary than the base"):
        merge(cut, [Task(cut)], method="passthrough", out=tmp_path / "out", form="delta")


def test_a_delta_finds_no_other_base(models, tmp_path):
    out = tmp_path / "out"
    merge(models / "base", tasks(models), method="averaging", out=out, form="delta")
    with pytest.raises(
        ValueError, match=r"delta on another base than .*/a: the weights differ; it was taken from .*/base"
    ):
        open_checkpoint(out, base=open_checkpoint(models / "a"))
    with pytest.raises(ValueError, match=r"it has no 'layers.0.w'"):
        open_checkpoint(out, base=open_checkpoint({"w": torch.ones(2)}))
    moved = shutil.copytree(out, tmp_path / "moved")
    card = json.loads((moved / "gradmatch.json").read_text())
    (moved / "gradmatch.json").write_text(
        json.dumps({**card, "delta": {**card["delta"], "base": str(tmp_path / "gone")}})
    )
    with pytest.raises(
        FileNotFoundError, match=r"is a delta on .*gone, which is not there; open it with base="
    ):
        open_checkpoint(moved)
    assert len(open_checkpoint(moved, base=open_checkpoint(models / "base"))) == 4
    (moved / "gradmatch.json").unlink()
    with pytest.raises(ValueError, match=r"holds a delta without its gradmatch\.json"):
        open_checkpoint(moved)


def test_a_delta_on_a_base_in_memory_is_opened_with_it(models, tmp_path):
    base = load_file(models / "base" / "model.safetensors")
    made = merge(base, tasks(models), method="averaging", out=tmp_path / "out", form="delta")
    assert torch.equal(
        open_checkpoint(tmp_path / "out", base=open_checkpoint(base))["norm.weight"], made["norm.weight"]
    )
    with pytest.raises(ValueError, match="on a base that was in memory; open it with base="):
        open_checkpoint(tmp_path / "out")


def test_a_soup_scores_whole_models_and_writes_a_delta(models, tmp_path):
    call = {
        "method": "greedy_soup",
        "form": "delta",
        "score": lambda state: -float(state["norm.weight"].norm()),
    }
    done = merge(models / "base", tasks(models), out=tmp_path / "out", **call)
    assert (done.path / "delta.safetensors").is_file()
    with pytest.raises(ValueError, match="pass out"):
        merge(models / "base", tasks(models), **{**call, "score": pytest.fail})


def test_by_command(models, tmp_path, capsys):
    words = [
        "merge",
        "--base",
        str(models / "base"),
        "--method",
        "averaging",
        "--form",
        "delta",
        "-o",
        str(tmp_path / "out"),
    ]
    words += ["--task", str(models / "a"), "--task", str(models / "b")]
    assert main([*words, "--dry-run"]) == 0
    assert "positions" not in capsys.readouterr().out
    assert main([*words, "--quiet"]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "delta of" in capsys.readouterr().out
