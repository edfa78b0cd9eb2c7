"""The optional compiled kernel: exact where it works, and not missed where it does not."""

import pytest
import torch

from gradmatch.estimators import estimate, kernel, native
from gradmatch.estimators.products import Workspace
from tests import oracle
from tests.estimators.architectures import as_batches, make

BUILT = pytest.mark.skipif(
    native.load(kernel.SOURCE) is None, reason="the extension is not built here: pip install -e ."
)


@pytest.fixture
def asked_for(monkeypatch):
    monkeypatch.setenv("GRADMATCH_KERNEL", "1")


@BUILT
@pytest.mark.parametrize("examples", [1, 5])
@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (6, 32), (7, 33), (40, 75), (96, 64)])
def test_squares_are_exact(asked_for, examples, positions, outputs, inputs):
    torch.manual_seed(0)
    left, right = torch.randn(examples, positions, outputs), torch.randn(examples, positions, inputs)
    squares = torch.rand(outputs, inputs)
    expected = squares.double() + torch.einsum("bto,bti->boi", left.double(), right.double()).square().sum(0)
    assert kernel.add_squares(left, right, squares, Workspace())
    torch.testing.assert_close(squares.double(), expected, rtol=1e-5, atol=1e-6)


@BUILT
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_gives_the_same_bytes(asked_for, threads):
    torch.manual_seed(0)
    left, right = torch.randn(9, 5, 100), torch.randn(9, 5, 130)
    one, other = torch.zeros(100, 130), torch.zeros(100, 130)
    before = torch.get_num_threads()
    try:
        kernel.add_squares(left, right, one, Workspace())
        torch.set_num_threads(threads)
        kernel.add_squares(left, right, other, Workspace())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, other)


@BUILT
@pytest.mark.parametrize("name", ["mlp on positions", "bert", "gpt2", "t5", "windows"])
def test_estimates_with_the_kernel(asked_for, name):
    model, batch, loss = make(name)
    expected = oracle.mean_of_squares(oracle.per_example_gradients(model, batch, loss))
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    found = estimate(model.float(), as_batches(batch, 3), method="empirical_fisher", progress=False)
    assert kernel.loaded() is not None
    assert oracle.relative_l1(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["double", "half", "strided sums"])
def test_what_it_cannot_do_is_left_to_torch(asked_for, kind):
    left, right, squares = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.zeros(4, 5)
    if kind == "strided sums":
        squares = torch.zeros(5, 4).t()
    else:
        left, right = (
            value.to(torch.float64 if kind == "double" else torch.bfloat16) for value in (left, right)
        )
    assert not kernel.add_squares(left, right, squares, Workspace())
    assert float(squares.abs().max()) == 0


def test_it_is_not_used_unasked(monkeypatch):
    monkeypatch.delenv("GRADMATCH_KERNEL", raising=False)
    assert kernel.loaded() is None
    monkeypatch.setenv("GRADMATCH_KERNEL", "0")
    assert kernel.loaded() is None


def test_without_it_torch_does_the_work(asked_for, monkeypatch):
    model, batch, _ = make("bert")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    native.load.cache_clear()
    try:
        found = estimate(model.float(), as_batches(batch), labels="sampled", progress=False)
    finally:
        native.load.cache_clear()
    monkeypatch.setenv("GRADMATCH_KERNEL", "0")
    expected = estimate(model, as_batches(batch), labels="sampled", progress=False)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
