"""The Curvature noun: units, file round trip, provenance, fingerprints, errors."""

import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.fingerprint import fingerprint, model_sampler, sample_file, sample_tensor
from gradmatch.estimators.tensorfile import TensorFile


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3))


@pytest.fixture
def curvature(model):
    mean = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    return Curvature.from_dict(
        mean,
        1000,
        {"fingerprint": fingerprint(mean, model_sampler(model)), "seed": "3"},
        standard_error={name: value / 10 for name, value in mean.items()},
        gradient={name: -value for name, value in mean.items()},
    )


def test_total_is_num_examples_times_mean(curvature):
    for name in curvature.keys():  # noqa: SIM118 - keys() is part of the public contract
        assert torch.equal(curvature.total(name), 1000 * curvature.mean(name))
        assert torch.equal(curvature[name], curvature.mean(name))


def test_round_trip_through_a_file(curvature, tmp_path):
    curvature.save(tmp_path / "deep" / "c.safetensors")
    loaded = Curvature.load(tmp_path / "deep" / "c.safetensors")
    assert loaded.num_examples == curvature.num_examples
    assert loaded.info == curvature.info
    assert set(loaded) == set(curvature)
    assert len(loaded) == len(curvature) == 4
    for name in curvature:
        assert torch.equal(loaded.mean(name), curvature.mean(name))
        assert torch.equal(loaded.standard_error(name), curvature.standard_error(name))
        assert torch.equal(loaded.gradient(name), curvature.gradient(name))


def test_a_loaded_curvature_saves_again(curvature, tmp_path):
    curvature.save(tmp_path / "a.safetensors")
    Curvature.load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors")
    again = Curvature.load(tmp_path / "b.safetensors")
    assert torch.equal(again.mean("0.bias"), curvature.mean("0.bias"))


def test_loading_reads_only_the_header(curvature, tmp_path):
    path = tmp_path / "c.safetensors"
    curvature.save(path)
    loaded = Curvature.load(path)
    loaded.mean("0.bias")
    assert "0.weight" in loaded
    assert "nonsense" not in loaded
    with path.open("rb+") as file:  # every value is gone: only a read of a block can notice
        file.truncate(TensorFile(path)["mean/0.bias"].start)
    with pytest.raises(ValueError, match="ends after"):
        loaded.mean("0.weight")


def test_what_was_not_asked_for_is_none(model):
    bare = Curvature.from_dict({"w": torch.ones(2)}, 5)
    assert bare.standard_error("w") is None
    assert bare.gradient("w") is None
    assert not bare.has_gradient
    assert bare.info["estimator"] == "given"
    with pytest.raises(KeyError, match="v"):
        bare.mean("v")


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_dtypes(given, kept):
    assert Curvature.from_dict({"w": torch.ones(2, dtype=given)}, 5).mean("w").dtype == kept


def test_repr_says_what_it_is(curvature):
    assert repr(curvature) == "Curvature(given, 4 tensors, N = 1000, examples seen = ?)"


BAD_DICTS = {
    "empty": (lambda: Curvature.from_dict({}, 5), ValueError, "at least one parameter"),
    "no examples": (lambda: Curvature.from_dict({"w": torch.ones(2)}, 0), ValueError, "at least 1, got 0"),
    "half an example": (lambda: Curvature.from_dict({"w": torch.ones(2)}, 1.5), TypeError, "whole number, got 1.5"),
    "nan": (lambda: Curvature.from_dict({"w": torch.tensor([1.0, math.nan])}, 5), ValueError, "mean/w: 1 of 2 values"),
    "shape": (
        lambda: Curvature.from_dict({"w": torch.ones(2)}, 5, gradient={"w": torch.ones(3)}),
        ValueError,
        r"gradient/w has shape \[3\], its mean has \[2\]",
    ),
    "array": (lambda: Curvature.from_dict({"w": np.ones(2)}, 5), TypeError, "mean/w is a ndarray, it must be a dense"),
    "complex": (
        lambda: Curvature.from_dict({"w": torch.ones(2, dtype=torch.complex64)}, 5), TypeError, "is a torch.strided torch.complex64",
    ),
    "sparse": (lambda: Curvature.from_dict({"w": torch.eye(2).to_sparse()}, 5), TypeError, "mean/w is a torch.sparse_coo"),
    "number as a name": (lambda: Curvature.from_dict({3: torch.ones(2)}, 5), TypeError, "names of parameters, got 3"),
    "stray": (
        lambda: Curvature.from_dict({"w": torch.ones(2)}, 5, standard_error={"v": torch.ones(2)}),
        ValueError,
        "standard_error/v has shape .* no mean at all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DICTS)
def test_bad_values_are_refused(case):
    build, kind, message = BAD_DICTS[case]
    with pytest.raises(kind, match=message):
        build()


GOOD = {"format_version": "1", "num_examples": "5"}
MEAN = {"mean/w": torch.ones(2)}
BAD_FILES = {  # metadata, tensors, what is said
    "a checkpoint": (None, MEAN, "not a curvature file"),
    "from the future": ({**GOOD, "format_version": "99"}, MEAN, "format version 99"),
    "no number": ({**GOOD, "num_examples": "many"}, MEAN, "num_examples is 'many'"),
    "zero": ({**GOOD, "num_examples": "0"}, MEAN, "num_examples is '0'"),
    "no mean": (GOOD, {"w": torch.ones(2)}, "without a single mean: its names begin with 'mean/'"),
    "integers": (GOOD, {"mean/w": torch.arange(2)}, "mean/w is I64, a curvature is of floating-point numbers"),
    "shape": (GOOD, {**MEAN, "gradient/w": torch.ones(3)}, r"gradient/w has shape \[3\], its mean has \[2\]"),
    "no mean of it": (GOOD, {**MEAN, "standard_error/v": torch.ones(2)}, "its mean has no mean at all"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_on_opening(case, tmp_path):
    metadata, tensors, message = BAD_FILES[case]
    save_file(tensors, tmp_path / "c.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        Curvature.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_other_writers_is_widened(dtype, tmp_path):
    """A total of 60,000 examples is beyond float16."""
    stored = torch.tensor([3.0, 5.0], dtype=dtype)
    save_file({"mean/w": stored}, tmp_path / "c.safetensors", metadata={**GOOD, "num_examples": "60000"})
    total = Curvature.load(tmp_path / "c.safetensors").total("w")
    assert total.dtype == torch.float32
    assert total.tolist() == [180000.0, 300000.0]


def test_blocks_that_share_memory_are_saved(tmp_path):
    """A tied weight under both its names, and slices of one vector that overlap."""
    one, flat = torch.rand(3, 4), torch.rand(6)
    mean = {"a": one, "b": one, "c": flat[:4], "d": flat[2:]}
    Curvature.from_dict(mean, 5).save(tmp_path / "c.safetensors")
    loaded = Curvature.load(tmp_path / "c.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in mean.items())


def test_provenance_that_is_no_text_becomes_text(tmp_path):
    Curvature.from_dict({"w": torch.ones(2)}, 5, {"seed": 3}).save(tmp_path / "c.safetensors")
    assert Curvature.load(tmp_path / "c.safetensors").info["seed"] == "3"


def test_paths_of_a_home_a_link_and_a_folder(curvature, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    curvature.save("~/c.safetensors")
    assert len(Curvature.load("~/c.safetensors")) == 4
    (tmp_path / "link").symlink_to(tmp_path / "c.safetensors")
    Curvature.from_dict({"w": torch.ones(2)}, 5).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert list(Curvature.load(tmp_path / "c.safetensors")) == ["w"]
    with pytest.raises(IsADirectoryError, match="is a folder; name the file to write in it"):
        curvature.save(tmp_path)
    for path, text in (
        (tmp_path, "it is a folder: name the file in it"),
        ("some/set", "no curvature file some/set; it must be a local file"),
    ):
        with pytest.raises(FileNotFoundError, match=text):
            Curvature.load(path)
    longest = tmp_path / ("x" * 255)
    curvature.save(longest)
    assert len(Curvature.load(longest)) == 4


def test_another_models_curvature_is_refused_with_an_override(curvature, model, tmp_path):
    path = tmp_path / "c.safetensors"
    curvature.save(path)
    assert len(Curvature.load(path, model=model)) == 4
    assert len(Curvature.load(path, model=model.state_dict())) == 4
    with torch.no_grad():
        model[0].weight[0, 0] += 0.5
    with pytest.raises(ValueError, match="taken at other weights than the given model"):
        Curvature.load(path, model=model)
    with pytest.raises(ValueError, match=r"holds parameter '0\.bias', which the given model lacks"):
        Curvature.load(path, model={"1.weight": torch.ones(2)})
    assert len(Curvature.load(path, model=model, allow_mismatch=True)) == 4


def test_a_curvature_without_a_fingerprint_passes(model):
    bare = Curvature.from_dict({"0.bias": torch.ones(20)}, 5)
    bare.check_model(model_sampler(model), "the given model")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (7,), (192,), (193,), (40, 50)])
def test_file_and_memory_sample_alike(dtype, shape, tmp_path):
    tensor = (torch.randn(shape) * 100).to(dtype)
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    expected = sample_tensor(tensor)
    shape_read, values = sample_file(TensorFile(tmp_path / "w.safetensors"), "w")
    assert shape_read == expected[0]
    if dtype.is_floating_point:
        assert values == expected[1]


def test_a_bfloat16_copy_has_the_same_fingerprint(model):
    full = model.state_dict()
    half = {name: value.to(torch.bfloat16) for name, value in full.items()}
    assert fingerprint(full, model_sampler(full)) == fingerprint(full, model_sampler(half))


def test_a_failed_save_leaves_the_old_file(curvature, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    curvature.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        curvature.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_trace_is_its_own_wherever_info_came_from(tmp_path):
    one = Curvature.from_dict({"w": torch.tensor([1.0, 3.0]), "b": torch.tensor([0.5])}, 10)
    assert one.trace() == 4.5
    small = Curvature.from_dict({name: one[name] / 1000 for name in one}, 10, one.info)
    small.save(tmp_path / "c.safetensors")
    found = Curvature.load(tmp_path / "c.safetensors")
    assert found.trace() == pytest.approx(0.0045)
    for stated in ("", "nan", "text"):  # of others' files, and of older ones
        assert Curvature({"mean/w": torch.ones(3)}, 1, {"trace": stated}).trace() == 3
    assert Curvature({"mean/w": torch.ones(3)}, 1, {}).trace() == 3


def test_a_linear_operator_is_no_mapping_of_blocks():
    operator = torch.nn.Linear(3, 3)
    with pytest.raises(
        TypeError,
        match=r"a Linear does not: of a linear operator \(curvlinops, say\) use Curvature.from_operator",
    ):
        Curvature.from_dict(operator, 5)
