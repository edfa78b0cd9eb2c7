"""Image sets: read safely, split by content, of one size; faults named."""

import gzip
import io
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.tasks.views import view
from experiments.vision import sets


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return gzip.compress(header + array.tobytes())


def images(count, seed=0, side=4):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, side, side), dtype=np.uint8), np.arange(count) % 2


@pytest.fixture
def idx_folder(tmp_path):
    """A folder as MNIST's, with images twice."""
    x, y = images(200)
    x, y = np.concatenate([x, x[:50]]), np.concatenate([y, y[:50]])
    (tmp_path / "t-images-idx3-ubyte.gz").write_bytes(idx(x))
    (tmp_path / "t-labels-idx1-ubyte.gz").write_bytes(idx(y.astype(np.uint8)))
    return tmp_path


def test_idx_and_npz_folders(idx_folder, tmp_path):
    found = sets.read("mine", {"path": str(idx_folder)}, 4)
    np.testing.assert_array_equal(found.images[:200], images(200)[0])
    assert (found.labels[:4].tolist(), found.names) == ([0, 1, 0, 1], ["0", "1"])
    other = tmp_path / "npz"
    other.mkdir()
    np.savez(other / "a.npz", x=found.images, y=found.labels)
    assert sets.read("mine", {"path": str(other)}, 4).images.shape == (250, 4, 4)
    np.savez(other / "a.npz", x=found.images, z=found.labels)
    with pytest.raises(ValueError, match=r"a\.npz: no y \(found x, z\)"):
        sets.read_arrays(other)
    (other / "a.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no images in .*no folder a class"):
        sets.read_arrays(other)


def test_prepare_writes_a_common_head_and_equal_images_once(idx_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    where = {name: {"path": str(idx_folder)} for name in ("a", "b")}
    sets.prepare(out, domains=["a", "b"], sets=where, pixels=6, split_seed=0)
    card = json.loads((out / "data.json").read_text())
    assert [card["domains"][name]["first"] for name in ("a", "b")] == [0, 2]
    assert card["notes"] == [
        "a: 50 images that stand twice are left out",
        "b: 50 images that stand twice are left out",
    ]
    sizes = {"train": 30, "validation": None, "test": 50}
    for split, count in (("train", 30), ("validation", 20), ("test", 50)):
        viewed = tmp_path / split
        view(viewed, data=out, split=split, sizes=dict.fromkeys(where, sizes), seed=0)
        saved = load_file(viewed / "a" / f"{split}.safetensors")
        assert saved["images"].shape == (count, 1, 6, 6)
        assert saved["images"].dtype == torch.uint8


def pictures(folder, count=12):
    """A folder a class, of coloured images."""
    from PIL import Image

    for number in range(count):
        name = ("dog", "cat", "ant")[number % 3]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 7, 3), 20 * number, np.uint8)).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_a_class_and_parquet(tmp_path):
    spec = {"path": str(pictures(tmp_path / "own")), "train": "train", "image": "image", "label": "label"}
    found = sets.read("own", spec, 4)
    assert found.images.shape == (12, 4, 4, 3)
    assert found.names == ["ant", "cat", "dog"]
    assert sorted(found.names[label] for label in found.labels) == sorted(["ant", "cat", "dog"] * 4)
    from datasets import load_dataset

    load_dataset(str(tmp_path / "own"), split="train").to_parquet(tmp_path / "own.parquet")
    again = sets.read("own", {**spec, "path": str(tmp_path / "own.parquet")}, 4)
    np.testing.assert_array_equal(again.images, found.images)
    assert again.names == found.names
    apart = sets.read("own", {**spec, "test": str(tmp_path / "own.parquet")}, 4)
    assert apart.split == ["train"] * 12 + ["test"] * 12
    with pytest.raises(ValueError, match=r"no column kind \(found image, label\).*data\.sets\.own\.label"):
        sets.read("own", {**spec, "label": "kind"}, 4)
    with pytest.raises(ValueError, match="row 1: no picture but"):
        sets.read("own", {**spec, "image": "label"}, 4)


def test_colour_images_keep_their_channels():
    assert sets.resized(np.zeros((2, 8, 8, 3), np.uint8), 4).shape == (2, 3, 4, 4)


def test_a_pickle_may_hold_arrays_alone():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(sets.ArraysOnly(io.BytesIO(pickle.dumps(array))).load(), array)
    with pytest.raises(ValueError, match=r"a pickle of images asks for .*: refused"):
        sets.ArraysOnly(io.BytesIO(pickle.dumps(json.JSONDecoder))).load()


def test_the_packaged_sets(tmp_path, monkeypatch):
    x, y = images(10, side=28)
    rows = np.concatenate([x.reshape(10, -1), y[:, None]], 1)
    text = "\n".join(",".join(map(str, row)) for row in rows)
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(text.encode()))
    for kind, array in (("data", x), ("label", y)):
        (tmp_path / f"animal_{kind}_version_3.gz").write_bytes(gzip.compress(pickle.dumps(array)))
    monkeypatch.setattr(sets.assets, "folder", lambda name: tmp_path)
    found = {name: sets.read(name, None, 28) for name in sets.PACKAGED}
    np.testing.assert_array_equal(found["animals"][0], x)
    np.testing.assert_array_equal(found["mnist"][0], x[::2])
    assert found["photos"][0].shape == (5, 28, 28)
    np.testing.assert_array_equal(found["photos"][1], y[1::2])
    assert found["digits"][0].shape == (1797, 8, 8)
    assert found["digits"][0].max() == 255
    again = sets.read_photos()[0]
    np.testing.assert_array_equal(again, found["photos"][0])


def test_without_a_hub_it_is_said_what_stands_in():
    spec = {"path": "owner/cars", "train": "train", "image": "image", "label": "label"}
    with pytest.raises(
        FileNotFoundError, match=r"cannot load images from owner/cars: .*animals, mnist, .* stand in"
    ):
        sets.read("cars", spec, 4)
