"""Curvature from task vectors: its blocks, as a source for the rules, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradmatch import Task, merge, open_checkpoint
from gradmatch.estimators import Curvature, from_task_vectors

SHAPES = {"lin.weight": (9, 4), "conv.weight": (12, 2, 2, 2), "lin.bias": (4,), "scale": ()}


def models(count=2, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    states = [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(count + 1)
    ]
    return states[0], states[1:]


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_blocks_are_the_second_moments_of_the_task_vector(normalize, centre, tmp_path):
    base, (model, _) = models()
    found = from_task_vectors(base, model, normalize=normalize, centre=centre)
    found.save(tmp_path / "c.safetensors")
    found = Curvature.load(tmp_path / "c.safetensors", model=model)
    for name, shape in SHAPES.items():
        tau = (model[name] - base[name]).numpy()
        size = (tau**2).sum()
        if len(shape) < 2:
            assert found.factor_a(name) is None
            np.testing.assert_allclose(
                found.mean(name), np.full(shape, (1 if normalize else size) / max(1, tau.size))
            )
            continue
        rows = tau.reshape(shape[0], -1)
        rows = rows - rows.mean(0) if centre else rows
        a = sum(np.outer(row, row) for row in rows)
        a = a / np.trace(a) if normalize else a
        np.testing.assert_allclose(found.factor_a(name), a, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            found.mean(name).reshape(shape[0], -1), np.tile(np.diag(a), (shape[0], 1)), rtol=1e-12
        )
    assert found.num_examples == 1


@pytest.mark.parametrize(("rule", "normalize"), [("actmat", False), ("wudi", True)])
def test_any_rule_takes_it_as_a_source(rule, normalize):
    base, tuned = models()
    plain = merge(
        base, [Task(m, weight=w) for m, w in zip(tuned, (0.7, 1.2), strict=True)], method=rule, ridge=0.0
    )
    known = [from_task_vectors(base, m, normalize=normalize) for m in tuned]
    tasks = [Task(m, c, w) for m, c, w in zip(tuned, known, (0.7, 1.2), strict=True)]
    for method, more in (("mats", {}), ("fisher", {"structure": "kronecker"}), ("gradient_matching", {"structure": "kronecker", "base_curvature": 0.0})):  # fmt: skip
        found = merge(base, tasks, method=method, solver="exact", delta0=1e-13, **more)
        for name in ("lin.weight", "conv.weight"):
            torch.testing.assert_close(found[name], plain[name], rtol=1e-8, atol=1e-8)


def test_modules_folders_and_checkpoints_tell_how_they_are_stored(tmp_path):
    torch.manual_seed(0)
    one, two = (nn.Sequential(Conv1D(3, 5), nn.Linear(3, 5)) for _ in range(2))
    found = from_task_vectors(one, two)
    assert found.factor_a("0.weight").shape == (5, 5)  # stored (5, 3), [in, out]
    assert found.factor_a("1.weight").shape == (3, 3)
    tau = two[0].weight - one[0].weight
    torch.testing.assert_close(found.factor_a("0.weight"), (tau @ tau.T / tau.square().sum()).detach())
    told = from_task_vectors(one.state_dict(), two.state_dict(), conv1d=["0.weight"])
    assert all(torch.equal(told.factor_a(f"{i}.weight"), found.factor_a(f"{i}.weight")) for i in range(2))
    for name, model in (("a", one), ("b", two)):
        merge(model.state_dict(), [Task(model.state_dict())], method="averaging", out=tmp_path / name)
    for where in (
        (tmp_path / "a", tmp_path / "b"),
        (open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")),
    ):
        assert torch.equal(from_task_vectors(*where).factor_a("1.weight"), found.factor_a("1.weight"))


@pytest.mark.parametrize(
    ("base", "model", "options", "error", "text"),
    [
        ({}, {"w": torch.ones(2, 2)}, {}, ValueError, r"'w' has shape \[2, 2\] in the model and none in the base"),
        ({"w": torch.ones(3)}, {"w": torch.ones(2)}, {}, ValueError, r"'w' has shape \[2\] in the model and \[3\] in the base"),
        ({"n": torch.ones(2).long()}, {"n": torch.ones(2).long()}, {}, ValueError, "no floating-point parameters"),
        ("nowhere", {"w": torch.ones(2)}, {}, FileNotFoundError, "no safetensors files at nowhere"),
        ({"h.c_fc.weight": torch.ones(2, 3)}, {"h.c_fc.weight": torch.ones(2, 3)}, {}, ValueError, r"'h.c_fc.weight' is stored \[in, out\]"),
        ({"w": torch.ones(2, 3)}, {"w": torch.ones(2, 3)}, {"conv1d": ["v"]}, ValueError, "conv1d names 'v', which the model lacks"),
    ],
)  # fmt: skip
def test_what_is_no_task_vector_is_refused(base, model, options, error, text):
    with pytest.raises(error, match=text):
        from_task_vectors(base, model, **options)


def test_a_task_that_trained_nothing_has_no_curvature():
    base, _ = models(1)
    found = from_task_vectors(base, base)
    assert not any(found.mean(name).any() for name in found)
