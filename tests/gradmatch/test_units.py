"""Curvatures of one merge are compared: what the numbers of examples do not explain is said, or refused."""

import warnings

import pytest
import torch

from gradmatch import Task, merge
from gradmatch.estimators import Curvature
from gradmatch.models.units import compare_units, sampled_traces

SHAPES = {"layers.0.weight": (30, 40), "layers.1.weight": (400, 300), "head.bias": (5,)}


def curvature(scale=1.0, estimator="fisher", examples=100, seed=0, **info):
    generator = torch.Generator().manual_seed(seed)
    mean = {n: scale * torch.rand(s, generator=generator).square() for n, s in SHAPES.items()}
    return Curvature.from_dict(mean, examples, {"estimator": estimator, **info})


@pytest.mark.parametrize("stored", [False, True])
def test_traces_of_large_tensors_come_from_a_sample(tmp_path, stored):
    given = curvature()
    given.save(tmp_path / "c.safetensors")
    found = sampled_traces(Curvature.load(tmp_path / "c.safetensors") if stored else given)
    for name in SHAPES:
        exact = float(given.mean(name).sum())
        assert found[name] == pytest.approx(exact, rel=0.1 if name == "layers.1.weight" else 1e-6)


TABLE = [  # (scale, estimator, N) of three curvatures -> (smaller, hopeless) of what is told
    ([(1, "fisher", 10), (6, "fisher", 10**6), (0.2, "fisher", 10)], []),
    ([(1, "fisher", 10), (1, "fisher", 10), (1 / 17, "adam", 10)], []),  # Adam's own bias
    ([(1, "fisher", 10), (1, "fisher", 10), (1 / 40, "adam", 10)], [("c", False)]),
    ([(1, "fisher", 10), (1, "fisher", 10), (1 / 40, "fisher", 10)], []),
    ([(1, "fisher", 10), (1, "fisher", 10), (1e-4, "fisher", 10)], [("c", False)]),
    ([(1, "fisher", 10), (1, "fisher", 10), (1 / 33_000, "adam", 10)], [("c", True)]),
    ([(33_000, "ivon", 10), (1, "fisher", 10), (1, "fisher", 10)], [("b", True)]),
    ([(1, "fisher", 10), (1, "fisher", 10), (0, "adam", 10)], []),  # knows nothing, and says so
    ([(1, "fisher", 10), (1e-4, "adam", 10)], [("b", True)]),
]


@pytest.mark.parametrize(("given", "expected"), TABLE)
def test_what_is_told(given, expected):
    curvatures = {
        name: curvature(*one, seed=i) for i, (name, one) in enumerate(zip("abc", given, strict=False))
    }
    found = compare_units(curvatures)
    assert [(apart.smaller, apart.hopeless) for apart in found] == expected
    for apart in found:
        for who in (apart.larger, apart.smaller):
            trace = sum(sampled_traces(curvatures[who]).values())
            assert f"{who}'s is {trace:.3g} ({curvatures[who].info['estimator']}" in apart.text


def test_a_few_uneven_tensors_do_not_decide():
    uneven = curvature()
    mean = {**uneven, "head.bias": uneven["head.bias"] * 1e6}
    assert compare_units({"a": curvature(), "b": Curvature.from_dict(mean, 10, uneven.info)}) == []
    other = Curvature.from_dict({"elsewhere": torch.ones(3)}, 10)
    assert compare_units({"a": curvature(), "b": other}) == []


def merged(b, base=None, **options):
    generator = torch.Generator().manual_seed(1)
    models = [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(3)]
    tasks = [Task(models[1], curvature(), name="a"), Task(models[2], b, name="b")]
    return merge(models[0], tasks, **({"base_curvature": base} if base else {}), **options)


def test_a_merge_refuses_warns_or_takes_it():
    adam = curvature(1 / 33_000, "adam")
    said = r"(a|the base)'s is .*fisher.* and b's is .*adam.*times apart.*allow_mismatch=True"
    for options in ({"method": "fisher"}, {"base": curvature(seed=3)}):
        with pytest.raises(ValueError, match=said):
            merged(adam, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = merged(adam, allow_mismatch=True, **options).report
        assert any("times apart" in note for note in report.notes)
    with pytest.warns(
        UserWarning, match=r"the curvatures are not in the same units.*estimate both in the same way"
    ):
        report = merged(curvature(1 / 50, "adam"), method="fisher").report
    assert any("50" in note or "times apart" in note for note in report.notes)
    with pytest.raises(ValueError, match="the base's is"):
        merged(curvature(), base=curvature(1e6, "ivon"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged(adam, method="averaging")
        merged(adam, method="matena_raffel", normalize_fishers=True)
