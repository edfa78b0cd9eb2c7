"""Task vectors, conflicts, redundancy, barriers and health: each measure against a slow or closed form."""

import math

import pytest
import torch
from torch import nn

from gradmatch.diagnosis.moved import find_moved_rows
from gradmatch.diagnosis.scan import scan_tensor
from gradmatch.diagnosis.source import Source
from gradmatch.estimators import Curvature
from gradmatch.measure import conflict, health, similarity
from gradmatch.measure.barrier import barrier_height, interpolate
from gradmatch.measure.redundancy import drop, redundancy_curve
from gradmatch.models.batchnorm import batchnorm_statistics
from gradmatch.models.opening import open_checkpoint


def test_cosines_from_a_gram_matrix():
    vectors = torch.randn(3, 50)
    vectors[2] = 0
    found = similarity.cosines(vectors.double() @ vectors.double().T)
    expected = torch.nn.functional.cosine_similarity(vectors[0].double(), vectors[1].double(), dim=0)
    torch.testing.assert_close(found[0, 1], expected)
    assert found[0, 0] == pytest.approx(1)
    assert found[2].abs().max() == 0


def test_projection_finds_coordinates_and_what_is_left():
    u = torch.randn(2, 40).double()
    outside = torch.randn(40).double()
    outside -= torch.linalg.lstsq(u.T, outside[:, None]).solution[:, 0] @ u
    d = 0.5 * u[0] - 2 * u[1] + outside
    c, residual = similarity.projection(u @ u.T, u @ d, float(d @ d))
    torch.testing.assert_close(c, torch.tensor([0.5, -2.0]).double())
    assert residual == pytest.approx(float(outside @ outside / (d @ d)))
    c, residual = similarity.projection(u @ u.T, u @ (0 * d), 0.0)
    assert residual == 0
    assert c.abs().max() == 0


def test_effective_rank():
    assert similarity.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert similarity.effective_rank(torch.outer(torch.randn(9), torch.randn(5))) == pytest.approx(
        1, rel=1e-4
    )
    assert similarity.effective_rank(torch.zeros(3, 3)) == 0
    matrix = torch.randn(1200, 1100)
    s = torch.linalg.svdvals(matrix.double()).square()
    assert similarity.effective_rank(matrix) == pytest.approx(float(s.sum() ** 2 / s.square().sum()), rel=0.1)


def source(tensor):
    return Source(open_checkpoint({"w": tensor}), "w")


def moved_rows(before, after):
    return find_moved_rows(source(before), source(after), torch.cosine_similarity(before, after, 1))


@pytest.mark.parametrize(("shift", "permuted"), [(1, False), (0, True), (0, False)])
def test_moved_rows(shift, permuted):
    before = torch.randn(40, 16)
    after = before + 0.1 * torch.randn(40, 16)
    if shift:
        after = after.roll(shift, 0)
    if permuted:
        after = after[torch.randperm(40)]
    found = moved_rows(before, after)
    if not shift and not permuted:
        assert found is None
        return
    assert found.elsewhere > 0.9
    assert found.suspects > 30
    assert (found.offset_share > 0.9 and found.offset == 40 - shift) if shift else found.offset_share < 0.5


def test_rows_of_an_unrelated_matrix_match_nothing():
    found = moved_rows(torch.randn(40, 64), torch.randn(40, 64))
    assert found.suspects == 40
    assert found.elsewhere == 0


def test_sign_conflict_against_a_slow_loop():
    s, t, w = torch.randn(30), torch.randn(30), torch.rand(30)
    s[:3] = 0
    slow = [(a * b < 0, a * b != 0, c) for a, b, c in zip(s.tolist(), t.tolist(), w.tolist(), strict=True)]
    assert conflict.sign_conflict(s, t) == (sum(x for x, _, _ in slow), sum(y for _, y, _ in slow))
    weighted = conflict.sign_conflict(s, t, w)
    assert weighted[0] == pytest.approx(sum(c for x, _, c in slow if x), rel=1e-5)
    assert weighted[1] == pytest.approx(sum(c for _, y, c in slow if y), rel=1e-5)


def test_curvature_overlap_is_one_for_equal_and_zero_for_disjoint():
    h = torch.rand(20)
    both, s, t = conflict.curvature_overlap(h, 3 * h)
    assert both / math.sqrt(s * t) == pytest.approx(1)
    assert conflict.curvature_overlap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))[0] == 0


def test_outside_hull():
    taus = torch.randn(2, 100)
    inside = 0.5 * taus[0] + 0.9 * taus[1]
    alpha = torch.tensor([0.5, 0.5])
    assert conflict.outside_hull(inside, taus, alpha) == 0
    other = 10 * torch.randn(100)
    assert conflict.outside_hull(other, taus, alpha) > 0.5 * float(other.square().sum())


def test_drop_is_unbiased_seeded_and_independent_of_order():
    tau = {"a": torch.ones(20_000), "b": torch.ones(5)}
    rescaled = drop(tau, 0.9, rescale=True, seed=3)
    assert float(rescaled["a"].mean()) == pytest.approx(1, abs=0.1)
    assert float((rescaled["a"] == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
    plain = drop(dict(reversed(tau.items())), 0.9, rescale=False, seed=3)
    assert torch.equal(plain["a"] != 0, rescaled["a"] != 0)
    assert set(plain["a"].unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        drop(tau, 1.0, rescale=True)


def test_redundancy_curve_starts_at_the_fine_tune():
    base, tau = {"w": torch.zeros(1000)}, {"w": torch.ones(1000)}
    curve = redundancy_curve(base, tau, lambda w: float(w["w"].mean()), (0.0, 0.5))
    assert (curve[0].plain, curve[0].rescaled) == (1.0, 1.0)
    assert curve[1].plain == pytest.approx(0.5, abs=0.06)
    assert curve[1].rescaled == pytest.approx(1.0, abs=0.12)


def test_paths_and_barriers():
    start, end = {"w": torch.zeros(2), "n": torch.tensor(3)}, {"w": torch.ones(2), "n": torch.tensor(4)}
    assert interpolate(start, end, 0.25)["w"].tolist() == [0.25, 0.25]
    assert interpolate(start, end, 0.25)["n"] == 4
    path = [(0.0, 1.0), (0.5, 1.25), (1.0, 1.0)]
    assert barrier_height(path) == 0.25
    with pytest.raises(ValueError, match="got 1 points"):
        barrier_height(path[:1])


def test_finite_and_grid():
    assert health.count_nonfinite(torch.tensor([1.0, math.nan, math.inf])) == 2
    assert health.count_nonfinite(torch.tensor([1])) == 0
    x = torch.randn(100)
    assert health.on_grid(x.bfloat16().float(), torch.bfloat16)
    assert not health.on_grid(x, torch.bfloat16)


def test_rounding_energy_forecasts_the_rounding_errors():
    x = torch.randn(200_000) * 0.05
    errors = (x.bfloat16().double() - x.double()).square().sum()
    assert health.rounding_energy(x, torch.bfloat16) == pytest.approx(float(errors), rel=0.05)
    assert health.rounding_energy(torch.zeros(3), torch.bfloat16) < 1e-12


def test_floor_share_and_fisher_noise():
    assert health.floor_share(torch.tensor([0.0, 1.0, 5.0]), 2.0) == (2, 3)
    known = Curvature.from_dict(
        {"w": torch.tensor([3.0, 4.0])}, 10, standard_error={"w": torch.tensor([0.0, 1.0])}
    )
    assert health.fisher_noise(known) == pytest.approx(0.2)
    counted = Curvature.from_dict({"w": torch.ones(2)}, 10, {"examples_seen": "8"})
    assert health.fisher_noise(counted) == pytest.approx(0.5)
    assert health.fisher_noise(Curvature.from_dict({"w": torch.ones(2)}, 10)) is None


def test_batchnorm_statistics_equal_those_of_all_inputs_at_once():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2)
    ).train()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    x = 3 * torch.randn(64, 3) + 1
    runs = [((part,), {}) for part in x.split(16)]
    found = batchnorm_statistics(net, weights, runs)
    inputs = net[0](x).double()
    torch.testing.assert_close(found["1.running_mean"].double(), inputs.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["1.running_var"].double(), inputs.var(0), rtol=1e-4, atol=1e-5)
    assert all(layer.training for layer in net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])  # the module itself is left as it was
    stored = {**weights, **found}
    assert health.batchnorm_shift(stored, found)["1"] == pytest.approx(0)
    assert health.batchnorm_shift(weights, found)["1"] > 0.5


@pytest.mark.parametrize("piece", [4, 13, 2**17])
def test_a_scan_sums_over_pieces_what_whole_tensors_give(monkeypatch, piece):
    for module in ("scan", "source"):
        monkeypatch.setattr(f"gradmatch.diagnosis.{module}.PIECE", piece)
    torch.manual_seed(0)
    base = torch.randn(10, 6)
    tasks = [base + 0.1 * torch.randn(10, 6) * (torch.rand(10, 6) < 0.7) for _ in range(3)]
    merged = (base + sum(0.4 * (theta - base) for theta in tasks)).bfloat16()
    found = scan_tensor(source(base), [source(theta) for theta in tasks], source(merged), [0.05, 0.05, 0.05])
    taus = torch.stack([(theta - base).flatten() for theta in tasks]).double()
    delta = (merged.float() - base).flatten().double()
    torch.testing.assert_close(found.gram, taus @ taus.T)
    torch.testing.assert_close(found.base_dots, taus @ base.flatten().double())
    assert found.base_square == pytest.approx(float(base.double().square().sum()))
    torch.testing.assert_close(found.products, taus @ delta)
    assert found.delta_square == pytest.approx(float(delta @ delta))
    expected = torch.cosine_similarity(base.flatten()[None].double(), taus + base.flatten().double())
    torch.testing.assert_close(found.cosine, expected, rtol=1e-6, atol=1e-6)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        product = taus[i] * taus[j]
        assert found.conflicts[i, j] == found.conflicts[j, i] == int((product < 0).sum())
        assert found.moved_both[i, j] == int((product != 0).sum())
    assert found.outside == pytest.approx(
        conflict.outside_hull(delta.float(), taus.float(), torch.full((3,), 0.05)), rel=1e-5
    )
    assert found.grid == "bfloat16"
    assert found.rounding == found.storage == pytest.approx(health.rounding_energy(merged, torch.bfloat16))
