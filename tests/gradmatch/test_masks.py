"""Consensus and Localize-and-Stitch against loops over entries."""

import pytest
import torch

from gradmatch import Task, merge
from tests.gradmatch.cases import problem, scalars

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def told(base, models, weights, **how):
    tasks = [
        Task(model, weight=weight, name=str(t))
        for t, (model, weight) in enumerate(zip(models, weights, strict=True))
    ]
    return merge(base, tasks, **how)


@pytest.mark.parametrize(("threshold", "agree"), [(0.4, 2), (1.0, 3), (0.0, 1), (2.0, 2)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.2, -0.3)])
def test_consensus_keeps_what_serves_several_tasks(threshold, agree, weights):
    base, _, models, _ = problem(3)
    found = told(base, models, weights, method="consensus", threshold=threshold, agree=agree, scale=0.7)
    dropped = 0
    for name, theta0 in base.items():
        expected = []
        for start, *thetas in scalars([theta0, *(model[name] for model in models)]):
            taus = [theta - start for theta in thetas]
            merged = sum(a * tau for a, tau in zip(weights, taus, strict=True))
            served = sum(abs(tau) >= threshold * abs(merged - tau) for tau in taus)
            dropped += served < agree
            expected.append(start + 0.7 * merged * (served >= agree))
        torch.testing.assert_close(
            found[name].flatten(), torch.tensor(expected, dtype=torch.float64), **CLOSE
        )
    assert bool(dropped) is (threshold > 0)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -0.25)])
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_stitched_regions_are_means_of_those_who_claim_them(density, weights):
    base, _, models, _ = problem(3)
    models[2]["layers.0.w"] = base["layers.0.w"].clone()  # not trained: claims nothing
    found = told(base, models, weights, method="localize_stitch", density=density, scale=0.7)
    taus = [{name: model[name] - base[name] for name in base} for model in models]
    least = []
    for tau in taus:
        sizes = sorted((abs(v) for value in tau.values() for v in value.flatten().tolist()), reverse=True)
        least.append(sizes[max(1, int(density * len(sizes))) - 1])
    for name, theta0 in base.items():
        expected = []
        for start, *values in scalars([theta0, *(tau[name] for tau in taus)]):
            claims = [
                (w, v) for w, v, size in zip(weights, values, least, strict=True) if v and abs(v) >= size
            ]
            stitched = sum(w * v for w, v in claims) / sum(abs(w) for w, _ in claims) if claims else 0.0
            expected.append(start + 0.7 * stitched)
        torch.testing.assert_close(
            found[name].flatten(), torch.tensor(expected, dtype=torch.float64), **CLOSE
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"agree": 4}, r"agree is 4, and 3 tasks are merged"),
        ({"agree": 0}, r"agree is 0, it must lie in \[1, inf\]"),
        ({"threshold": -1.0}, r"threshold is -1"),
        ({"method": "localize_stitch", "density": 0.0}, r"density is 0.0; it is the share kept"),
    ],
)
def test_what_is_refused(options, text):
    base, _, models, _ = problem(3)
    with pytest.raises(ValueError, match=text):
        told(base, models, (1.0, 1.0, 1.0), **{"method": "consensus", **options})
