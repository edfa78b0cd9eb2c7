"""Image sets: read safely, split by content, of one size; faults named."""

import gzip
import io
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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
    x, y = sets.read("mine", str(idx_folder))
    np.testing.assert_array_equal(x[:200], images(200)[0])
    np.testing.assert_array_equal(y[:4], [0, 1, 0, 1])
    other = tmp_path / "npz"
    other.mkdir()
    np.savez(other / "a.npz", x=x, y=y)
    assert sets.read("mine", str(other))[0].shape == (250, 4, 4)
    np.savez(other / "a.npz", x=x, z=y)
    with pytest.raises(ValueError, match=r"a\.npz: no y \(found x, z\)"):
        sets.read_folder(other)
    (other / "a.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no images in .*neither"):
        sets.read_folder(other)


def test_equal_images_lie_on_one_side_once(idx_folder):
    found = sets.in_splits("mine", sets.read_folder(idx_folder), seed=0)
    together = np.concatenate(list(found.values()))
    assert len(together) == 200
    assert len(set(together.tolist())) == 200
    assert len(found["train"]) > len(found["test"]) > len(found["validation"])
    with pytest.raises(ValueError, match=r"set 'few' leaves . images for validation; 10 are needed"):
        sets.in_splits("few", images(20), 0)


def test_prepare_writes_splits_of_one_size_and_a_common_head(idx_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    where = {"a": str(idx_folder), "b": str(idx_folder)}
    sets.prepare(out, domains=["a", "b"], sets=where, pixels=6, limits={"train": 30}, split_seed=0)
    card = json.loads((out / "sets.json").read_text())
    assert (card["a"]["first"], card["b"]["first"], card["b"]["classes"]) == (0, 2, 2)
    assert card["a"]["train"] == 30
    saved = load_file(out / "a" / "train.safetensors")
    assert saved["images"].shape == (30, 1, 6, 6)
    assert saved["images"].dtype == torch.uint8


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
    found = {name: sets.read(name, None) for name in sets.PACKAGED}
    np.testing.assert_array_equal(found["animals"][0], x)
    np.testing.assert_array_equal(found["mnist"][0], x[::2])
    assert found["photos"][0].shape == (5, 28, 28)
    np.testing.assert_array_equal(found["photos"][1], y[1::2])
    assert found["digits"][0].shape == (1797, 8, 8)
    assert found["digits"][0].max() == 255
    again = sets.read_photos()[0]
    np.testing.assert_array_equal(again, found["photos"][0])


class Hub:
    """Stands in for `datasets.load_dataset`."""

    def __init__(self, columns):
        self.columns = columns

    def __call__(self, source, subset):
        from datasets import Dataset

        return {"train": Dataset.from_dict(self.columns), "test": Dataset.from_dict(self.columns)}


def test_hub_sets(monkeypatch):
    import datasets
    from PIL import Image

    grey = [Image.fromarray(np.full((5, 5), 10 * i, np.uint8)) for i in range(2)]
    monkeypatch.setattr(datasets, "load_dataset", Hub({"image": grey, "label": [0, 1]}))
    x, y = sets.read("cars", "owner/cars:full")
    assert x.shape == (4, 224, 224, 3)
    assert y.tolist() == [0, 1, 0, 1]
    monkeypatch.setattr(datasets, "load_dataset", Hub({"img": [1], "label": [0]}))
    with pytest.raises(ValueError, match=r"owner/cars: no column image \(found img, label\)"):
        sets.read_hub("owner/cars")

    def offline(source, subset):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        FileNotFoundError, match=r"no hub that has it is within reach; animals, mnist, .* stand in"
    ):
        sets.read("cars", "owner/cars")
