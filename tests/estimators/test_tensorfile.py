"""The safetensors reader: what it reads equals what was written; what is broken is refused by name."""

import copy
import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from gradmatch.estimators.header import HEADER_LIMIT, TORCH_NAME
from gradmatch.estimators.tensorfile import TensorFile

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.half": torch.randn(5).to(torch.bfloat16),
    "c.steps": torch.tensor(7),
    "d.empty": torch.zeros(0, 3),
    "e.mask": torch.tensor([True, False]),
    "f.double": torch.randn(2, 2, dtype=torch.float64),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"made": "here"})
    return tmp_path / "x.safetensors"


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(start=0, stop=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_reads_what_was_written(path):
    file = TensorFile(path)
    assert set(file) == set(TENSORS)
    assert len(file) == len(TENSORS)
    assert file.metadata == {"made": "here"}
    for name, tensor in TENSORS.items():
        assert file[name].shape == tuple(tensor.shape)
        assert file[name].numel == tensor.numel()
        assert file[name].nbytes == tensor.numel() * tensor.element_size()
        assert getattr(torch, TORCH_NAME[file[name].dtype]) == tensor.dtype
        assert torch.equal(file.read(name), tensor)


def test_reads_a_range_of_elements(path):
    raw = TensorFile(path).read_bytes("a.weight", first=5, count=3)
    assert torch.frombuffer(raw, dtype=torch.float32).tolist() == [5.0, 6.0, 7.0]


def test_reads_again_after_close(path):
    file = TensorFile(path)
    file.read("a.weight")
    file.close()
    assert torch.equal(file.read("a.weight"), TENSORS["a.weight"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TensorFile(tmp_path / "nowhere.safetensors")


def test_a_file_cut_after_its_header_was_read(path):
    file = TensorFile(path)
    file.fileno()
    with path.open("rb+") as handle:
        handle.truncate(file["f.double"].start + 4)
    with pytest.raises(ValueError, match=r"'f\.double' ends after .* of 32 bytes"):
        file.read("f.double")


def test_a_file_replaced_after_its_header_was_read(path):
    """Its byte ranges are another file's: without the check other tensors' values came out."""
    file = TensorFile(path)
    save_file({"a.weight": torch.full((50,), 7.0), "z": torch.ones(60)}, path)
    with pytest.raises(ValueError, match="changed since its header was read; open it again"):
        file.read("a.weight")
    assert torch.equal(TensorFile(path).read("z"), torch.ones(60))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda file: pickle.loads(pickle.dumps(file))])
def test_a_copy_has_a_descriptor_of_its_own(path, copied):
    file = TensorFile(path)
    file.read("a.weight")
    file.block("b.half")
    other = copied(file)
    assert torch.equal(other.read("a.weight"), TENSORS["a.weight"])
    del other
    assert torch.equal(file.read("a.weight"), TENSORS["a.weight"])


BROKEN = {
    "empty file": (lambda p: p.write_bytes(b""), "header of -1 bytes"),
    "short prefix": (lambda p: p.write_bytes(b"1234"), "header of -1 bytes in a file of 4"),
    "header longer than the file": (lambda p: p.write_bytes(struct.pack("<Q", 99) + b"{}"), "header of 99 bytes"),
    "header over the limit": (lambda p: p.write_bytes(struct.pack("<Q", HEADER_LIMIT + 1)), "not a safetensors"),
    "not json": (lambda p: write(p, b"{nonsense"), "not JSON"),
    "not a table": (lambda p: write(p, [1, 2]), "header is list"),
    "metadata not strings": (lambda p: write(p, {"__metadata__": {"n": 3}}), "__metadata__ must map strings"),
    "a name twice": (
        lambda p: write(p, f'{{"w": {json.dumps(entry())}, "w": {json.dumps(entry())}}}'.encode(), bytes(8)),
        r"\['w'\] more than once",
    ),
    "overlapping tensors": (lambda p: write(p, {"v": entry(), "w": entry(4, 12)}, bytes(12)), "'w' starts at byte"),
    "entry without shape": (lambda p: write(p, {"w": {"dtype": "F32"}}), "'w' lacks a dtype, shape or data_offsets"),
    "unknown dtype": (lambda p: write(p, {"w": entry(dtype="F3")}, bytes(8)), "dtype 'F3'"),
    "negative extent": (lambda p: write(p, {"w": entry(shape=(-2,))}, bytes(8)), "no whole number"),
    "shape against offsets": (lambda p: write(p, {"w": entry(shape=(3,))}, bytes(8)), "needs 12 bytes, its offsets hold 8"),
    "truncated data": (lambda p: write(p, {"w": entry()}, bytes(5)), "cut short: tensor 'w' ends"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_name(case, tmp_path):
    build, message = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    build(path)
    with pytest.raises(ValueError, match=message) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(str(path))
    assert caught.value.code != "refused"
