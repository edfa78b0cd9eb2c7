"""Edits of task vectors against slow loops; the in-place kernels and the threshold search against the readable functions."""

import math

import pytest
import torch

import gradmatch.engine.thresholds as search
from gradmatch import TRANSFORMS, Task, merge
from gradmatch.engine.context import Context
from gradmatch.engine.draws import GRID, uniform
from gradmatch.engine.electing import ties
from gradmatch.engine.kernels import Buffers, eq12, linear_combination
from gradmatch.merging import prepare
from gradmatch.rules import gradient_matching, removal
from gradmatch.rules.edits import breadcrumbs, dare, della
from gradmatch.rules.edits import ties as readable_ties
from gradmatch.rules.edits.della import keep_probability, widest
from gradmatch.rules.edits.ties import elect, kept_count, share, trim
from tests.gradmatch.cases import problem, state, tuned

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def stacked(count=3, shape=(6, 9), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *shape), generator=generator, dtype=torch.float64).to(dtype)


def ties_by_hand(taus, weights, densities, scope="global", normalize=True):
    """TIES of state dicts of task vectors, coordinate by coordinate; returns what is added to the base."""
    trimmed = []
    for tau, density in zip(taus, densities, strict=True):
        whole = sorted((abs(v) for t in tau.values() for v in t.flatten().tolist()), reverse=True)
        kept = {}
        for name, t in tau.items():
            pool = (
                whole if scope == "global" else sorted((abs(v) for v in t.flatten().tolist()), reverse=True)
            )
            threshold = pool[max(1, int(density * len(pool))) - 1]
            kept[name] = [v if abs(v) >= threshold else 0.0 for v in t.flatten().tolist()]
        trimmed.append(kept)
    signs = {
        name: [
            math.copysign(1, s) if (s := sum(w * v for w, v in zip(weights, values, strict=True))) else 0
            for values in zip(*(t[name] for t in trimmed), strict=True)
        ]
        for name in taus[0]
    }
    majority = 1.0 if sum(sum(row) for row in signs.values()) >= 0 else -1.0
    result = {}
    for name in taus[0]:
        merged = []
        for sign, values in zip(signs[name], zip(*(t[name] for t in trimmed), strict=True), strict=True):
            elected = sign or majority
            agree = [
                (w, v)
                for w, v in zip(weights, values, strict=True)
                if v and math.copysign(1, w * v) == elected
            ]
            total = sum(abs(w) for w, _ in agree) if normalize else 1.0
            merged.append(sum(w * v for w, v in agree) / total if agree else 0.0)
        result[name] = torch.tensor(merged, dtype=torch.float64).reshape(taus[0][name].shape)
    return result


@pytest.mark.parametrize("trim_scope", ["global", "tensor"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -0.25)])
@pytest.mark.parametrize("own", [False, True])
def test_ties(trim_scope, normalize, weights, own):
    base, _, models, _ = problem(3)
    densities = (0.3, 0.6, 1.0) if own else (0.3, 0.3, 0.3)
    tasks = [
        Task(m, weight=w, options={"density": d} if own else {})
        for m, w, d in zip(models, weights, densities, strict=True)
    ]
    edit = {"ties": {"density": 0.3, "trim": trim_scope, "normalize": normalize}}
    found = merge(base, tasks, method="task_arithmetic", transforms=[edit], scale=0.7)
    taus = [{name: m[name] - base[name] for name in base} for m in models]
    expected = ties_by_hand(taus, weights, densities, trim_scope, normalize)
    for name in base:
        torch.testing.assert_close(found[name], base[name] + 0.7 * expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties"])
@pytest.mark.parametrize("normalize", [None, True, False])
def test_normalize_of_a_method_with_ties_is_that_of_ties(method, normalize):
    base, _, models, _ = problem(3)
    weights = (0.5, 2.0, 0.25)
    tasks = [Task(m, weight=w) for m, w in zip(models, weights, strict=True)]
    options = {} if normalize is None else {"normalize": normalize}
    options |= {"gamma": 0.0} if method == "breadcrumbs_ties" else {}
    found = merge(base, tasks, method=method, density=1.0, **options)
    taus = [{name: m[name] - base[name] for name in base} for m in models]
    expected = ties_by_hand(taus, weights, (1.0, 1.0, 1.0), normalize=normalize is not False)
    for name in base:
        torch.testing.assert_close(found[name], base[name] + expected[name], rtol=1e-9, atol=1e-9)


def test_two_trims_over_the_model_follow_one_another():
    base, _, models, _ = problem(1)
    chain = [{"ties": {"density": 0.6}}, {"ties": {"density": 0.3}}]
    found = merge(base, [Task(models[0])], method="task_arithmetic", transforms=chain)
    expected = ties_by_hand([{name: models[0][name] - base[name] for name in base}], (1.0,), (0.3,))
    for name in base:
        torch.testing.assert_close(found[name], base[name] + expected[name], **CLOSE)


@pytest.mark.parametrize("method", ["dare_ties", "della", "breadcrumbs_ties"])
def test_a_trim_that_drops_nothing_takes_no_pass(method, monkeypatch):
    base, _, models, _ = problem(2)
    monkeypatch.setattr(search, "select", lambda *_: pytest.fail("a pass over the model for no threshold"))
    assert set(merge(base, [Task(m) for m in models], method=method)) == set(base)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.5, 0.97, 1.0])
def test_dellas_own_epsilon_fits_every_density(density):
    probability = keep_probability(torch.arange(1.0, 8.0)[None], density, widest(density))
    assert 0 < probability.min() <= probability.max() <= 1
    assert torch.isclose(probability.mean(), torch.tensor(density))
    base, _, models, _ = problem(2)
    tasks = [Task(model, name=str(n)) for n, model in enumerate(models)]
    assert set(merge(base, tasks, method="della", density=density)) == set(base)


def test_della_drops_nothing_at_density_one_whatever_its_epsilon():
    base, _, (model,), _ = problem(1)
    for options in ({}, {"epsilon": 0.2}):
        found = merge(base, [Task(model)], method="della_linear", density=1.0, **options)
        assert all(torch.allclose(found[name], model[name], atol=1e-12) for name in base)


def test_dellas_epsilon_of_tasks_with_densities_of_their_own():
    base, _, models, _ = problem(2)
    tasks = [
        Task(models[0], name="a", options={"density": 0.98}),
        Task(models[1], name="b", options={"epsilon": 0.2}),
    ]
    made = prepare(base, tasks, method="della_linear", density=0.5)
    assert made.steps[0].edits[0][1]["epsilon"] == (pytest.approx(0.04), 0.2)


def test_one_transform_needs_no_list():
    base, _, models, _ = problem(2)
    one = merge(base, [Task(m) for m in models], method="task_arithmetic", transforms="ties", density=0.4)
    other = merge(base, [Task(m) for m in models], method="task_arithmetic", transforms=["ties"], density=0.4)
    assert all(torch.equal(one[name], other[name]) for name in base)


def test_dare_can_leave_what_stays_as_it_is():
    base, _, (model,), _ = problem(1)
    found = merge(base, [Task(model)], method="dare", density=0.5, rescale="none")
    for name in base:
        assert ((found[name] == base[name]) | torch.isclose(found[name], model[name])).all()


def test_della_ranks_within_a_model_however_small_the_tensor():
    probability = keep_probability(torch.tensor([3.0, 1.0, 2.0]), 0.5, 0.4)  # three models, no axes
    assert probability.tolist() == [0.5, 0.5, 0.5]
    assert keep_probability(torch.tensor([[3.0], [1.0]]), 0.5, 0.4).tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_entries_that_cancel_exactly_take_the_models_majority(sign):
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    one = {"a": torch.tensor([1.0, 0.0]), "b": sign * torch.ones(3)}
    two = {"a": torch.tensor([-1.0, 0.0]), "b": sign * torch.ones(3)}
    found = merge(base, [Task(one), Task(two)], method="ties", density=1.0)
    assert found["a"].tolist() == [sign, 0.0]
    assert found["b"].tolist() == [sign] * 3


def test_steps_of_ties_on_a_hand_worked_example():
    tau = torch.tensor([[3.0, -1.0, 0.5, 2.0], [-1.0, -2.0, 0.0, -2.0]])
    alpha = torch.ones(2, 1)
    kept = trim(tau, torch.tensor([[1.0], [2.0]]))
    assert kept.tolist() == [[3.0, -1.0, 0.0, 2.0], [0.0, -2.0, 0.0, -2.0]]
    sign = elect(kept, alpha, -1.0)
    assert sign.tolist() == [1.0, -1.0, -1.0, -1.0]
    assert share(kept, alpha, sign).tolist() == [[3.0, -0.5, 0.0, 0.0], [0.0, -1.0, 0.0, -2.0]]
    assert readable_ties(tau, alpha, torch.tensor([[1.0], [2.0]]), -1.0, 2.0).sum(0).tolist() == [
        6.0,
        -3.0,
        0.0,
        -4.0,
    ]


@pytest.mark.parametrize(
    ("density", "numel", "kept"),
    [(0.2, 10, 2), (0.29, 100, 29), (0.2, 3, 1), (0.01, 7, 1), (1.0, 5, 5), (0.5, 0, 0)],
)
def test_kept_count(density, numel, kept):
    assert kept_count(density, numel) == kept


def test_dare_is_unbiased_and_zero_or_rescaled():
    tau = stacked(2, (400, 400))
    noise = torch.rand(tau.shape, generator=torch.Generator().manual_seed(1))
    found = dare(tau, noise, 0.25)
    kept = found != 0
    torch.testing.assert_close(found[kept], tau[kept] / 0.25)
    assert abs(float(kept.double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / tau.numel())


def test_dare_l1_restores_each_models_sum():
    tau = stacked(2, (40, 40))
    noise = torch.rand(tau.shape, generator=torch.Generator().manual_seed(1))
    found = dare(tau, noise, torch.tensor([0.25, 0.5]).reshape(2, 1, 1), "l1")
    torch.testing.assert_close(found.abs().sum((1, 2)), tau.abs().sum((1, 2)))
    assert not dare(tau, torch.ones_like(tau), 0.5, "l1").any()  # nothing kept: zero, not NaN
    assert torch.isfinite(dare(torch.ones(2), torch.tensor([0.1, 0.9]), 0.5, "l1")).all()  # 0-dim tensors


def test_noise_does_not_depend_on_how_a_tensor_is_cut():
    whole = uniform(3, "task", "w", 0, 3 * GRID + 7, torch.float32)
    assert torch.equal(
        whole[GRID - 5 : 2 * GRID + 5], uniform(3, "task", "w", GRID - 5, GRID + 10, torch.float32)
    )
    for other in ((4, "task", "w"), (3, "tusk", "w"), (3, "task", "v")):
        assert not torch.equal(whole[:100], uniform(*other, 0, 100, torch.float32))
    assert abs(float(whole.double().mean()) - 0.5) < 5 / math.sqrt(12 * whole.numel())


def test_della_probabilities_grow_with_the_rank_and_average_to_the_density():
    tau = stacked(2, (3, 50))
    probability = keep_probability(tau, 0.4, 0.2)
    torch.testing.assert_close(probability.mean(-1), torch.full((2, 3), 0.4, dtype=torch.float64))
    order = tau.abs().argsort(-1)
    assert (probability.gather(-1, order).diff(dim=-1) > 0).all()
    assert float(probability.min()) >= 0.3
    assert float(probability.max()) <= 0.5
    assert keep_probability(stacked(2, (5, 1)), 0.4, 0.2).unique().tolist() == pytest.approx(
        [0.4]
    )  # rows of length one


def test_della_divides_by_the_probability():
    tau = stacked(1, (1, 6))
    noise = torch.tensor([[[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]]])
    found = della(tau, noise, 0.5, 0.2)
    probability = keep_probability(tau, 0.5, 0.2)
    torch.testing.assert_close(found, torch.where(noise == 0, tau / probability, 0.0))


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [(0.4, 0.1, [8, 7, 6, 5]), (1.0, 0.3, list(range(9, -1, -1))), (0.9, 0.3, list(range(8, -1, -1))), (0.01, 0.0, [9])],
)  # fmt: skip
def test_breadcrumbs(density, gamma, kept):
    tau = torch.arange(10.0).reshape(1, 2, 5) * torch.tensor([1.0, -1.0]).reshape(1, 2, 1) + 0.0
    found = breadcrumbs(tau, density, gamma).flatten().abs()
    expected = torch.zeros(10)
    expected[kept] = torch.tensor(kept, dtype=torch.float32)
    assert torch.equal(found, expected)


def test_breadcrumbs_keeps_an_exact_count_among_equals():
    assert int((breadcrumbs(torch.ones(1, 10), 0.5, 0.1) != 0).sum()) == 5


@pytest.mark.parametrize("option", ["density", "gamma"])
def test_breadcrumbs_options_of_one_task(option):
    base, _, models, _ = problem(2)
    tasks = [Task(models[0], options={option: 0.3}), Task(models[1])]
    found = merge(base, tasks, method="breadcrumbs", density=0.6, gamma=0.1)
    expected = {name: base[name].clone() for name in base}
    for model, own in ((models[0], {option: 0.3}), (models[1], {})):
        settings = {"density": 0.6, "gamma": 0.1, **own}
        for name in base:
            expected[name] += breadcrumbs((model[name] - base[name])[None], **settings)[0]
    assert all(torch.allclose(found[name], expected[name], atol=1e-12) for name in base)


def test_large_tensors_are_edited_as_whole_rows_and_tensors():
    base = state(0, torch.float32, shapes={"w": (500, 700)})
    model = tuned(base, 1)
    della_found = merge(
        base, [Task(model, name="a")], method="della_linear", density=0.5, epsilon=0.2, dtype="float32"
    )
    tau = (model["w"] - base["w"])[None]
    noise = uniform(0, "a", "w", 0, tau.numel(), torch.float32).reshape(tau.shape)
    torch.testing.assert_close(della_found["w"], base["w"] + della(tau, noise, 0.5, 0.2)[0])
    crumbs = merge(base, [Task(model)], method="breadcrumbs", density=0.5, gamma=0.1)
    torch.testing.assert_close(crumbs["w"], base["w"] + breadcrumbs(tau, 0.5, 0.1)[0])


@pytest.mark.parametrize(("keep", "guard"), [(None, "floor"), (0.3, "floor"), (0.3, "scale")])
@pytest.mark.parametrize("h0", ["tensor", 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq12_kernel_is_the_readable_rule(keep, guard, h0, dtype):
    count, tasks = 1000, 3
    theta0, theta = stacked(1, (count,), 1, dtype)[0], stacked(tasks, (count,), 2, dtype)
    mean, prior = stacked(tasks, (count,), 3, dtype).abs(), stacked(1, (count,), 4, dtype)[0].abs()
    mean[1] = 0
    alphas, counts, delta0 = [0.5, 1.2, 0.3], [10.0, 20.0, 30.0], 1e-2
    sign = 1.0 if keep is None else -1.0
    known = [mean[0], None, mean[2]]  # one is flat
    given = [(sign * a, n, t, f) for a, n, t, f in zip(alphas, counts, theta, known, strict=True)]
    found = torch.empty_like(theta0)
    health = eq12(Buffers(), found, theta0, prior if h0 == "tensor" else h0, 2.0, delta0, given, keep, guard)
    full = 2.0 * (prior if h0 == "tensor" else torch.full_like(theta0, h0)) + delta0
    alpha = torch.tensor(alphas, dtype=dtype).reshape(-1, 1)
    h = torch.tensor(counts, dtype=dtype).reshape(-1, 1) * mean
    if keep is None:
        expected = gradient_matching(theta0, theta - theta0, alpha, full, h)
        assert health.floored == int((full + (alpha * h).sum(0) < 2 * delta0).sum())
    else:
        expected = removal(theta0, theta - theta0, alpha, full, h, keep, guard)
        assert health.clamped == int((full - (alpha * h).sum(0) < keep * full).sum())
        assert health.update_h0 == pytest.approx(float((full * (expected - theta0) ** 2).sum()), rel=1e-3)
    assert health.update == pytest.approx(float(((expected - theta0) ** 2).sum()), rel=1e-3)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("alphas", [(1.0, 1.0, 1.0), (0.5, -1.5, 0.0)])
@pytest.mark.parametrize("majority", [1.0, -1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_kernel_is_the_readable_transform(alphas, majority, normalize):
    count = 600
    theta0 = torch.zeros(count, dtype=torch.float64)
    tau = (stacked(3, (count,), 5) * 2).round() / 2  # many equal values, many exact cancellations
    thresholds = [1.0, 0.5, 0.0]
    alpha = torch.tensor(alphas, dtype=torch.float64).reshape(3, 1)
    found = torch.empty_like(theta0)
    health = ties(Buffers(), found, theta0, tau, thresholds, alphas, 0.7, majority, normalize=normalize)
    column = torch.tensor(thresholds, dtype=torch.float64).reshape(3, 1)
    expected = 0.7 * (alpha * readable_ties(tau, alpha, column, majority, 1.0, normalize)).sum(0)
    torch.testing.assert_close(found, expected, **CLOSE)
    weighted = alpha * trim(tau, column)
    opposed = (weighted > 0).any(0) & (weighted < 0).any(0)
    assert health.conflicts == int(opposed.sum())
    assert health.cancelled == int((opposed & (weighted.sum(0) == 0)).sum())
    assert health.signs == float(weighted.sum(0).sign().sum())


def test_linear_combination():
    out, ones = torch.empty(3), torch.ones(3, dtype=torch.bfloat16)
    assert linear_combination(out, out.clone(), [2.0, -0.5], [ones, ones]).tolist() == [1.5] * 3
    assert linear_combination(out, out.clone(), [], []).tolist() == [0.0] * 3


def exact_threshold(taus, density):
    values = sorted((abs(v) for t in taus for v in t.flatten().tolist()), reverse=True)
    return values[max(1, int(density * len(values))) - 1]


@pytest.mark.parametrize("kind", ["smooth", "repeated", "mostly zero", "one scale a tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", ["predicted", "radix"])
def test_thresholds_are_exact_order_statistics(kind, dtype, path, monkeypatch):
    shapes = {"a": (300, 700), "b": (40, 30), "c": (7,)}
    base = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    model = state(3, dtype, shapes=shapes)
    if kind == "repeated":
        model = {name: (t * 4).round() / 4 for name, t in model.items()}
    elif kind == "mostly zero":
        model = {name: t * (t.abs() > 2.2) for name, t in model.items()}
    elif kind == "one scale a tensor":
        model = {name: t * 10.0**i for i, (name, t) in enumerate(model.items())}
    if path == "radix":
        monkeypatch.setattr(search, "predicted", lambda *_: {})
    made = prepare(base, [Task(model)], method="ties", density=0.1)
    found = search.global_thresholds(Context(made))
    assert float(found[0, 0.1][0]) == exact_threshold(model.values(), 0.1)


def test_thresholds_after_another_edit():
    base, _, models, _ = problem(2)
    chain = [{"dare": {"density": 0.7}}, {"ties": {"density": 0.4}}]
    tasks = [Task(m, name=n) for m, n in zip(models, "ab", strict=True)]
    found = merge(base, tasks, method="task_arithmetic", transforms=chain)
    taus = []
    for model, name in zip(models, "ab", strict=True):
        noise = {k: uniform(0, name, k, 0, t.numel(), t.dtype).reshape(t.shape) for k, t in base.items()}
        taus.append({k: dare((model[k] - base[k])[None], noise[k][None], 0.7)[0] for k in base})
    expected = ties_by_hand(taus, (1.0, 1.0), (0.4, 0.4))
    for name in base:
        torch.testing.assert_close(found[name], base[name] + expected[name], rtol=1e-9, atol=1e-9)


def test_every_transform_keeps_shapes_and_zero():
    tau = torch.zeros(2, 3, 4)
    for transform in TRANSFORMS.values():
        from gradmatch.rules.block import Edit

        edit = Edit(tau, torch.ones(2, 1, 1), lambda: torch.rand(2, 3, 4))
        found = transform.apply(edit, transform.options)
        assert found.shape == tau.shape
        assert not found.any()
