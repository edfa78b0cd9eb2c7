"""Products from curvature files against dense matrices; the stored file."""

import numpy as np
import pytest
import torch

from gradmatch.estimators import Curvature
from gradmatch.measure.forecast import Products
from gradmatch.measure.products import (
    curvature_products,
    kronecker_times,
    load_products,
    preconditioned_vectors,
    save_products,
    split_by_group,
    stored_gradient,
    task_vector,
)


def test_diagonal_products_equal_the_dense_form():
    torch.manual_seed(0)
    h = {"a": torch.rand(3, 2).double(), "b": torch.rand(4).double()}
    g = {name: torch.randn_like(value) for name, value in h.items()}
    curvature = Curvature.from_dict(h, 50, gradient=g)
    directions = {k: {name: torch.randn_like(value) for name, value in h.items()} for k in ("u", "v")}
    found = curvature_products("t", curvature, directions, {"u": 1.0})
    dense = 50 * torch.diag(torch.cat([h["a"].flatten(), h["b"]]))
    u = torch.stack([torch.cat([d["a"].flatten(), d["b"]]) for d in directions.values()])
    np.testing.assert_allclose(found.curvature, (u @ dense @ u.T).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.slope, (u @ torch.cat([g["a"].flatten(), g["b"]])).numpy(), rtol=1e-12)
    assert found.kind == "diagonal"
    assert found.position.tolist() == [1.0, 0.0]
    assert stored_gradient(curvature).keys() == h.keys()


@pytest.mark.parametrize("transposed", [False, True])
def test_kronecker_times_equals_the_dense_product(transposed):
    torch.manual_seed(1)
    a, b = torch.randn(3, 3).double(), torch.randn(2, 2).double()
    a, b = a @ a.T, b @ b.T
    u = torch.randn(2, 3).double()
    dense = 7 * torch.kron(b, a) @ u.flatten()  # row-major vec of (out, in): B (x) A
    found = kronecker_times(a, b, u.T if transposed else u, 7)
    torch.testing.assert_close(found.T.flatten() if transposed else found.flatten(), dense)


def test_preconditioned_vectors_sum_to_the_merge_of_eq_12():
    from gradmatch import Task, merge

    torch.manual_seed(2)
    base = {"w": torch.randn(4, 3), "frozen": torch.randn(2)}
    tasks = {t: {name: value + 0.1 * torch.randn_like(value) for name, value in base.items()} for t in "ab"}
    curvatures = {t: Curvature.from_dict({"w": torch.rand(4, 3)}, 20) for t in "ab"}
    h0 = Curvature.from_dict({"w": torch.rand(4, 3)}, 30)
    alpha = {"a": 0.7, "b": 1.2}
    taus = {t: task_vector(base, theta) for t, theta in tasks.items()}
    terms = preconditioned_vectors(taus, curvatures, h0, alpha, base_weight=0.5, delta0=1e-3)
    given = [Task(tasks[t], curvatures[t], alpha[t], t) for t in "ab"]
    options = {"base_weight": 0.5, "delta0": 1e-3, "missing_curvature": "zero"}
    merged = merge(base, given, base_curvature=h0, **options)
    total = base["w"] + sum(alpha[t] * terms[t]["w"] for t in "ab")
    torch.testing.assert_close(merged["w"], total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["a"]["frozen"], taus["a"]["frozen"])


def test_task_vector_leaves_out_integers_and_other_shapes():
    base = {"w": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor(1), "head": torch.zeros(3)}
    tau = task_vector(
        base, {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(2), "head": torch.zeros(4)}
    )
    assert list(tau) == ["w"]
    assert tau["w"].dtype == torch.float32


def test_split_by_group():
    parts = split_by_group({"l.0.w": torch.ones(1), "l.1.w": torch.ones(1)}, ["l.1"])
    assert {group: list(part) for group, part in parts.items()} == {"l.1": ["l.1.w"], "rest": ["l.0.w"]}


def test_products_file_round_trip(tmp_path):
    place, slope = np.array([1.0, 0.0]), np.array([0.5, -2.0])
    made = [Products("t", ("u", "v"), place, slope, np.eye(2), 3.5, 10, 4, "ggn", 0.7)]
    made.append(Products("s", ("u", "v"), np.array([0.0, 1.0]), np.zeros(2), np.eye(2)))
    path = tmp_path / "deep" / "products.json"
    save_products(made, path, {"base": "abc"})
    assert not list(path.parent.glob(".*"))
    again = load_products(path, {"base": "abc", "unknown": "x"})
    for old, new in zip(made, again, strict=True):
        np.testing.assert_array_equal(old.curvature, new.curvature)
        np.testing.assert_array_equal(old.slope, new.slope)
        for name in ("task", "kind", "num_examples", "limit"):
            assert getattr(old, name) == getattr(new, name)
    assert again[0].loss == 3.5
    assert np.isnan(again[1].loss)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="gradmatch forecast --data"):
        load_products(tmp_path / "none.json")
    bad = tmp_path / "bad.json"
    for content, text in (
        ("{}", "no products file"),
        ('{"format_version": 9, "products": []}', "format version 9"),
    ):
        bad.write_text(content)
        with pytest.raises(ValueError, match=text):
            load_products(bad)
    save_products([], bad, {"base": "0123456789abcdef"})
    with pytest.raises(ValueError, match="other weights of 'base'"):
        load_products(bad, {"base": "ffff"})
    tau = {"a": {"w": torch.ones(1)}}
    with pytest.raises(ValueError, match="'a' has no curvature"):
        preconditioned_vectors(tau, {}, 1.0, {"a": 1.0})
    with pytest.raises(ValueError, match="delta0 must be positive"):
        preconditioned_vectors(tau, {}, 1.0, {"a": 1.0}, delta0=0.0)
