"""Curvature as `estimate` makes it, merged: files and objects, every kind, fingerprints that fit."""

import pytest
import torch
from torch import nn

from gradmatch import Task, merge
from gradmatch.estimators import estimate
from tests.gradmatch.tiny import tuned

KINDS = ("fisher", "empirical_fisher", "ggn", "kfac", "gram")


@pytest.fixture(scope="module")
def trained():
    """(base, two perturbed copies, their batches)."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [[(torch.randn(16, 5), torch.randint(3, (16,))) for _ in range(3)] for _ in range(2)]
    return base, [tuned(base, seed) for seed in (1, 2)], data


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_merge_from_objects_and_files(trained, tmp_path, kind):
    base, models, data = trained
    curvatures = [estimate(m, b, method=kind, progress=False) for m, b in zip(models, data, strict=True)]
    options = {"method": "regmean"} if kind == "gram" else {"base_curvature": 1.0}
    found = merge(base, [Task(m, c) for m, c in zip(models, curvatures, strict=True)], **options)
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 1)]
    for path, curvature in zip(paths, curvatures, strict=True):
        curvature.save(path)
    again = merge(base, [Task(m, p) for m, p in zip(models, paths, strict=True)], **options)
    for name in found:
        torch.testing.assert_close(found[name], again[name])
    for other in (curvatures[0], paths[0]):
        with pytest.raises(ValueError, match="taken at other weights"):
            merge(base, [Task(models[1], other)], **options)


def test_regmean_of_real_inputs(trained):
    base, models, data = trained
    curvatures = [estimate(m, b, method="gram", progress=False) for m, b in zip(models, data, strict=True)]
    tasks = [Task(m, c) for m, c in zip(models, curvatures, strict=True)]
    found = merge(base, tasks, method="regmean", off_diagonal=1.0, ridge=0.0)["0.weight"]
    grams = [(x := torch.cat([a for a, _ in b])).T @ x for b in data]
    right = sum(g @ m[0].weight.T for g, m in zip(grams, models, strict=True))
    torch.testing.assert_close(found, torch.linalg.solve(sum(grams), right).T, rtol=1e-4, atol=1e-5)
