"""Redundancy, orthogonality and analogies of task vectors, on the tiny world."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from experiments import redundancy
from experiments.config import ConfigError, load
from experiments.records import of_kind


@pytest.fixture
def redundancy_config(beside, tiny_config):
    """A config beside the tiny sentiment config."""
    spec = {"source": "texts", "a": "books", "b": "songs", "c": "books", "target": "songs"}
    given = {"shares": [0.0, 0.5], "weights": [0.0, 1.0], "analogies": {"books to songs": spec}}
    return beside("redundancy", sources={"texts": str(tiny_config)}, **given)


def test_a_run_agrees_with_the_models_it_reads(redundancy_config, tiny_config, run):
    found, out = run(redundancy_config)
    assert "cosines of task vectors" in out
    assert "books + w (songs - books) on songs" in out
    models = {record["model"]: record for record in of_kind(run(tiny_config)[0], "evaluation")}
    (matrix,) = of_kind(found, "cosines")
    assert matrix["tasks"] == ["books", "songs"]
    np.testing.assert_allclose(np.diag(matrix["cosines"]), 1)
    for point in of_kind(found, "redundancy"):
        if point["dropped"] == 0:  # the fine-tune itself
            expected = models[point["task"]]["metrics"][point["task"]]["accuracy"]
            assert point["plain"] == point["rescaled"] == pytest.approx(expected)
    (analogy,) = of_kind(found, "analogy")
    on_songs = {name: models[name]["metrics"]["songs"]["accuracy"] for name in ("base", "books", "songs")}
    assert analogy["alone"] == pytest.approx(
        {"base": on_songs["base"], "a": on_songs["books"], "b": on_songs["songs"], "c": on_songs["books"]}
    )
    accuracies = [point["accuracy"] for point in analogy["points"]]  # w = 0: c; w = 1, where a is c: b
    assert accuracies == pytest.approx([on_songs["books"], on_songs["songs"]])


def test_cosines_are_those_of_the_whole_vectors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folders, flat = {}, {}
    for name in ("base", "one", "two"):
        weights = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
        folders[name] = tmp_path / name
        (folders[name] / "model").mkdir(parents=True)
        save_file({**weights, "count": torch.tensor(3)}, folders[name] / "model" / "model.safetensors")
        flat[name] = torch.cat([value.flatten() for value in weights.values()]).double()
    tasks = {name: folders[name] for name in ("one", "two")}
    redundancy.compare_vectors(tmp_path, base=folders["base"], tasks=tasks)
    found = yaml.safe_load((tmp_path / "cosines.json").read_text())
    one, two = flat["one"] - flat["base"], flat["two"] - flat["base"]
    assert found["cosines"][0][1] == pytest.approx(float(one @ two / one.norm() / two.norm()), rel=1e-6)
    assert found["norms"]["two"] == pytest.approx(float(two.norm()), rel=1e-6)


def test_images_on_photographs_keep_their_shape_and_are_the_same_again():
    images = torch.randint(0, 256, (3, 1, 12, 12), dtype=torch.uint8)
    first = redundancy.on_photographs(images)
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert torch.equal(first, redundancy.on_photographs(images))
    assert not torch.equal(first, images)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("analogies.x.source", "text", r"analogy 'x': no source 'text' \(did you mean 'texts'"),
        ("analogies.x.a", "book", r"analogy 'x': no task 'book' \(did you mean 'books'"),
        ("analogies.x.target", "song", r"analogy 'x': no domain 'song' \(did you mean 'songs'"),
        ("analogies.x.target", "songs on photographs", "analogy 'x': no domain 'songs on photographs'"),
        ("seeds", "[0, 4]", r"tiny.yaml has no seed 4; it has 0"),
        ("shares", "[0.5, 1.5]", r"shares\.1: Input should be less than 1 \(found 1.5\)"),
        ("sources.other", "{config}", "redundancy.yaml is no config of the sentiment or vision experiment"),
    ],
)
def test_faults(redundancy_config, key, value, message):
    given = {"source": "texts", "a": "books", "b": "songs", "c": "books", "target": "songs"}
    simple = redundancy_config.with_name("theory.yaml")
    simple.write_text("experiment: theory\n")
    overrides = [f"analogies.x={given}", f"{key}={value.format(config=simple)}"]
    with pytest.raises(ConfigError, match=message.replace("redundancy.yaml", "theory.yaml")):
        load(redundancy_config, overrides)
