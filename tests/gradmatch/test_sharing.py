"""Publishing on the hub: curvature beside the weights, and models whole, against a hub on this machine."""

import shutil

import pytest
import torch
import yaml

import gradmatch
from gradmatch import Curvature, GradmatchError, Task, push
from gradmatch.cli import main
from tests.gradmatch.hub import hub  # noqa: F401
from tests.gradmatch.tiny import llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's folder with what a training leaves beside it, and the curvature of its weights."""
    folder = tmp_path_factory.mktemp("models") / "amazon"
    torch.manual_seed(0)
    module = llama(12, tie_word_embeddings=False)
    module.save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "model.safetensors").write_bytes(b"old")
    (folder / "README.md").write_text("---\ntags: [sentiment]\nlicense: mit\n---\n# Amazon\n")
    batches = [torch.randint(12, (4, 5))]
    known = gradmatch.estimators.estimate(
        module, [{"input_ids": b, "labels": b} for b in batches], progress=False
    )
    return folder, known


def test_curvature_goes_to_the_hub_and_comes_back(hub, model, tmp_path):  # noqa: F811
    folder, known = model
    told = known.push_to_hub("me/amazon")
    assert told.startswith(f"{hub.url}/me/amazon/commit/")
    assert hub.commits == [["curvature.safetensors"]]
    found = Curvature.from_pretrained("me/amazon", model=gradmatch.open_checkpoint(folder))
    assert found.num_examples == known.num_examples
    assert all(torch.equal(found[name], known[name]) for name in known)
    known.save(tmp_path / "held.safetensors")
    Curvature.load(tmp_path / "held.safetensors").push_to_hub("me/amazon", filename="held.safetensors")
    assert hub.repos["me/amazon"]["held.safetensors"] == (tmp_path / "held.safetensors").read_bytes()
    merged = gradmatch.merge(folder, [Task(folder, "me/amazon")], base_curvature="me/amazon")
    assert all(
        torch.allclose(merged[name], value) for name, value in gradmatch.open_checkpoint(folder).items()
    )


def test_a_model_goes_whole_and_in_one_commit(hub, model, tmp_path):  # noqa: F811
    folder, known = model
    (tmp_path / "why.html").write_text("<p>why</p>")
    push(
        folder, "me/amazon", curvature=known, diagnosis=tmp_path / "why.html", license="apache-2.0", datasets=["me/reviews"],
        private=True,
    )  # fmt: skip
    assert hub.made[0].get("visibility") == "private" or hub.made[0].get("private")
    assert hub.commits == [
        ["README.md", "config.json", "curvature.safetensors", "diagnosis.html", "generation_config.json", "model.safetensors"]
    ]  # fmt: skip
    held = hub.repos["me/amazon"]
    assert held["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = held["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"tags": ["sentiment", "gradmatch"], "license": "apache-2.0", "datasets": ["me/reviews"]}
    assert "--task me/amazon,curvature=me/amazon" in card
    assert "[diagnosis.html](diagnosis.html)" in card
    assert (folder / "README.md").read_text().endswith("# Amazon\n")
    again = push(folder, "me/amazon", curvature=known)
    assert again != ""
    assert hub.repos["me/amazon"]["README.md"].decode().count("## Curvature") == 1


def test_the_command(hub, model, tmp_path, capsys):  # noqa: F811
    folder, known = model
    known.save(tmp_path / "c.safetensors")
    words = ["push", str(folder), "me/amazon", "--curvature", str(tmp_path / "c.safetensors")]
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "curvature.safetensors" in told
    assert "not sent: checkpoint-2/, optimizer.pt" in told
    assert hub.commits == []
    assert main(words) == 0
    assert f"pushed: {hub.url}/me/amazon/commit/" in capsys.readouterr().out


def test_of_other_weights_nothing_is_sent(hub, model, tmp_path):  # noqa: F811
    folder, known = model
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    torch.manual_seed(1)
    llama(12, tie_word_embeddings=False).save_pretrained(other)
    with pytest.raises(GradmatchError, match="was taken at other weights than the model in"):
        push(other, "me/other", curvature=known)
    known.save(other / "curvature.safetensors")
    with pytest.raises(GradmatchError, match="was taken at other weights"):
        push(other, "me/other")
    assert not hub.made
    push(other, "me/other", allow_mismatch=True)
    assert "curvature.safetensors" in hub.commits[0]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"repo_id": "amazon"}, GradmatchError, "'amazon' is no hub id; write owner/name"),
        ({"repo_id": "me/amazon@v2"}, GradmatchError, "a branch as revision="),
        ({"folder": "nowhere"}, FileNotFoundError, "is not there"),
        ({"folder": "amazon/config.json"}, FileNotFoundError, "is a file; name the folder"),
        ({"diagnosis": "why.json"}, GradmatchError, "is no page"),
        ({"curvature": "amazon"}, FileNotFoundError, r"no curvature file .*; it holds model\.safetensors"),
    ],
)
def test_what_cannot_be_pushed(model, monkeypatch, given, error, said):
    monkeypatch.chdir(model[0].parent)
    with pytest.raises(error, match=said):
        push(**{"folder": "amazon", "repo_id": "me/amazon", **given})


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("me/nothing", {}, FileNotFoundError, "curvature.safetensors of a hub repository me/nothing could not be fetched"),
        ("me/x@v1", {"revision": "v2"}, GradmatchError, "names revision 'v1', revision= says 'v2'"),
        ("amazon", {"revision": "v2"}, GradmatchError, "is a local path and has none"),
        ("amazon", {}, FileNotFoundError, "it holds model.safetensors; name another with filename="),
        ("amazn", {}, FileNotFoundError, r"no curvature file amazn \(did you mean 'amazon'\?\)"),
    ],
)  # fmt: skip
def test_what_is_no_published_curvature(model, monkeypatch, name, options, error, said):
    monkeypatch.chdir(model[0].parent)
    with pytest.raises(error, match=said):
        Curvature.from_pretrained(name, **options)


def test_a_name_without_its_ending_is_refused(model):
    with pytest.raises(GradmatchError, match=r"name it curvature\.safetensors"):
        model[1].push_to_hub("me/amazon", filename="curvature.bin")


def test_a_hub_that_refuses_is_told(hub, model, capsys):  # noqa: F811
    hub.refused = True
    assert main(["push", str(model[0]), "me/amazon"]) == 2
    assert "403" in capsys.readouterr().err
