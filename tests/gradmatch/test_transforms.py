"""Edits of task vectors against slow loops, and the search for what they ask of tensors and models against sorting."""

import math

import pytest
import torch

import gradmatch.engine.thresholds as search
from gradmatch import TRANSFORMS, Task, merge
from gradmatch.engine import compiled, context
from gradmatch.engine.context import Context
from gradmatch.engine.draws import GRID, uniform
from gradmatch.merging import prepare
from gradmatch.rules.block import Cut, Edit
from gradmatch.rules.edits import dare, della, ties
from gradmatch.rules.edits.breadcrumbs import ranks
from gradmatch.rules.edits.dare import l1_ratio
from gradmatch.rules.edits.della import keep_probability, widest
from gradmatch.rules.edits.ties import elect, kept_count, share, trim
from tests.gradmatch.cases import problem, state, tuned

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def stacked(count=3, shape=(6, 9), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *shape), generator=generator, dtype=torch.float64).to(dtype)


def exact_threshold(taus, density):
    values = sorted((abs(v) for t in taus for v in t.flatten().tolist()), reverse=True)
    return values[max(1, int(density * len(values))) - 1]


def ties_by_hand(taus, weights, densities, scope="global", normalize=True):
    """TIES of state dicts of task vectors, coordinate by coordinate; returns what is added to the base."""
    trimmed = []
    for tau, density in zip(taus, densities, strict=True):
        kept = {}
        for name, t in tau.items():
            least = exact_threshold(tau.values() if scope == "global" else [t], density)
            kept[name] = [v if abs(v) >= least else 0.0 for v in t.flatten().tolist()]
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
            pairs = zip(weights, values, strict=True)
            agree = [(w, v) for w, v in pairs if v and math.copysign(1, w * v) == (sign or majority)]
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


@pytest.mark.parametrize("extension", [True, False])
def test_entries_that_cancel_take_the_sign_that_was_asked_for(monkeypatch, extension):
    """The majority is negative here; mergekit elects the positive sign whatever it is."""
    if not extension:
        monkeypatch.setattr("gradmatch.engine.stream.kernels", lambda: None)
    base = {"w": torch.zeros(5)}
    models = [{"w": torch.tensor([1.0, -1, -1, -1, 0])}, {"w": torch.tensor([-1.0, 1, -1, -1, 0])}]
    for cancelled, sign in (("majority", -1.0), ("positive", 1.0)):
        found = merge(base, [Task(m) for m in models], method="ties", density=1.0, cancelled=cancelled)
        assert found["w"].tolist() == [sign, sign, -1, -1, 0]


@pytest.mark.parametrize("trim_scope", ["global", "tensor"])
@pytest.mark.parametrize("extension", [True, False])
def test_ties_says_where_equal_entries_make_it_keep_more(monkeypatch, trim_scope, extension):
    """Ten entries of one size and density 0.5: all ten stay; six of ten that differ are three."""
    if not extension:
        monkeypatch.setattr("gradmatch.engine.stream.kernels", lambda: None)
    base = {"a": torch.zeros(10), "b": torch.zeros(6)}
    equal = {"a": torch.tensor([1.0, -1.0] * 5), "b": torch.full((6,), -1.0)}
    apart = {"a": torch.arange(1.0, 11.0), "b": torch.arange(11.0, 17.0)}
    tasks = [Task(equal, name="equal"), Task(apart, name="apart")]
    report = merge(base, tasks, method="ties", density=0.5, trim=trim_scope).report
    assert report.kept_shares == {"equal": (0.5, 1.0), "apart": (0.5, 0.5)}
    assert [note for note in report.notes if "ties keeps 100 % of equal and not 50 %" in note]
    assert not any("apart" in note for note in report.notes)


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
    monkeypatch.setattr(search, "_tally_model", lambda *_: pytest.fail("a pass for no threshold"))
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
    own = {"a": {"density": 0.98}, "b": {"epsilon": 0.2}}
    tasks = [Task(m, name=n, options=o) for m, (n, o) in zip(models, own.items(), strict=True)]
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
    sign = elect((alpha * kept).sum(0), -1.0)
    assert sign.tolist() == [1.0, -1.0, -1.0, -1.0]
    assert share(kept, alpha, sign).tolist() == [[3.0, -0.5, 0.0, 0.0], [0.0, -1.0, 0.0, -2.0]]
    doubled = ties(tau, alpha, torch.tensor([[1.0], [2.0]]), -1.0, 2.0)
    assert doubled.sum(0).tolist() == [6.0, -3.0, 0.0, -4.0]


KEPT = [(0.2, 10, 2), (0.29, 100, 29), (0.2, 3, 1), (0.01, 7, 1), (1.0, 5, 5), (0.5, 0, 0)]
KEPT += [(0.7, 10**9, 7 * 10**8), (0.1 + 0.2, 10**10, 3 * 10**9), (1 - 0.9, 10**10, 10**9)]


@pytest.mark.parametrize(("density", "numel", "kept"), KEPT)
def test_kept_count(density, numel, kept):
    assert kept_count(density, numel) == kept


@pytest.mark.parametrize("density", [0.29, 0.35, 0.7, 0.9])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
@pytest.mark.parametrize("trim_scope", ["global", "tensor"])
def test_a_density_of_a_tasks_own_keeps_as_many(density, method, trim_scope):
    base = {"w": stacked(1, (60, 16), 1, torch.float32)[0]}
    model = {"w": base["w"] + stacked(1, (60, 16), 2, torch.float32)[0]}
    scope = {"trim": trim_scope} if method == "ties" else {}
    shared = merge(base, [Task(model)], method=method, density=density, **scope)
    own = merge(base, [Task(model, options={"density": density})], method=method, **scope)
    assert torch.equal(shared["w"], own["w"])
    assert int((own["w"] != base["w"]).sum()) == round(density * 960)


def test_dare_is_unbiased_and_zero_or_rescaled():
    tau = stacked(2, (400, 400))
    noise = torch.rand(tau.shape, generator=torch.Generator().manual_seed(1))
    found = dare(tau, noise, 0.25)
    kept = found != 0
    torch.testing.assert_close(found[kept], tau[kept] / 0.25)
    assert abs(float(kept.double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / tau.numel())


def test_dare_l1_restores_each_models_sum():
    base, options = {"w": torch.zeros(40, 40)}, {"method": "dare", "density": 0.25, "rescale": "l1"}
    for tau in stacked(2, (40, 40), dtype=torch.float32):
        edited = merge(base, [Task({"w": tau}, name="a")], **options)["w"]
        torch.testing.assert_close(edited.abs().sum(), tau.abs().sum())
    ratio = l1_ratio(torch.tensor([2.0, 3.0]), torch.tensor([4.0, 0.0]))
    assert ratio.tolist() == [0.5, 0.0]  # nothing kept: zero, not NaN


def test_noise_does_not_depend_on_how_a_tensor_is_cut():
    whole = uniform(3, "task", "w", 0, 3 * GRID + 7, torch.float32)
    part = uniform(3, "task", "w", GRID - 5, GRID + 10, torch.float32)
    assert torch.equal(whole[GRID - 5 : 2 * GRID + 5], part)
    for other in ((4, "task", "w"), (3, "tusk", "w"), (3, "task", "v")):
        assert not torch.equal(whole[:100], uniform(*other, 0, 100, torch.float32))
    assert abs(float(whole.double().mean()) - 0.5) < 5 / math.sqrt(12 * whole.numel())


def test_della_probabilities_grow_with_the_rank_and_average_to_the_density():
    tau = stacked(2, (3, 50))
    probability = keep_probability(tau, 0.4, 0.2)
    torch.testing.assert_close(probability.mean(-1), torch.full((2, 3), 0.4, dtype=torch.float64))
    assert (probability.gather(-1, tau.abs().argsort(-1)).diff(dim=-1) > 0).all()
    assert 0.3 <= float(probability.min()) < float(probability.max()) <= 0.5
    rows_of_one = keep_probability(stacked(2, (5, 1)), 0.4, 0.2)
    assert rows_of_one.unique().tolist() == pytest.approx([0.4])


def test_della_divides_by_the_probability():
    tau = stacked(1, (1, 6))
    noise = torch.tensor([[[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]]])
    found = della(tau, noise, 0.5, 0.2)
    probability = keep_probability(tau, 0.5, 0.2)
    torch.testing.assert_close(found, torch.where(noise == 0, tau / probability, 0.0))


def crumbs_by_sorting(tau, density, gamma):
    """Breadcrumbs of one task vector, by sorting all of it."""
    flat = tau.flatten()
    kept = kept_count(density, len(flat))
    outliers = min(math.floor(gamma * len(flat) + 1e-9), len(flat) - kept)
    order = flat.abs().argsort(descending=True, stable=True)[outliers : outliers + kept]
    return torch.zeros_like(flat).index_copy(0, order, flat[order]).reshape(tau.shape)


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [(0.4, 0.1, (1, 5)), (1.0, 0.3, (0, 10)), (0.9, 0.3, (1, 10)), (0.01, 0.0, (0, 1))],
)
def test_ranks_of_breadcrumbs(density, gamma, kept):
    assert ranks(density, gamma, 10) == kept


@pytest.mark.parametrize("kind", ["smooth", "repeated", "equal", "mostly zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [GRID, 64])
def test_breadcrumbs_keep_an_exact_count_among_equals(kind, dtype, block, monkeypatch):
    monkeypatch.setattr(context, "BLOCK", block)
    tau = stacked(1, (30, 10), dtype=dtype)[0]
    tau = {"smooth": tau, "repeated": tau.round(), "equal": tau.sign(), "mostly zero": tau * (tau > 2)}[kind]
    for density, gamma in ((0.5, 0.1), (0.14, 0.01), (0.9, 0.3)):
        base = {"w": torch.zeros_like(tau)}
        found = merge(base, [Task({"w": tau})], method="breadcrumbs", density=density, gamma=gamma)
        assert torch.equal(found["w"], crumbs_by_sorting(tau, density, gamma))


@pytest.mark.parametrize("option", ["density", "gamma"])
def test_breadcrumbs_options_of_one_task(option):
    base, _, models, _ = problem(2)
    tasks = [Task(models[0], options={option: 0.3}), Task(models[1])]
    found = merge(base, tasks, method="breadcrumbs", density=0.6, gamma=0.1)
    expected = {name: base[name].clone() for name in base}
    for model, own in ((models[0], {option: 0.3}), (models[1], {})):
        settings = {"density": 0.6, "gamma": 0.1, **own}
        for name in base:
            expected[name] += crumbs_by_sorting(model[name] - base[name], **settings)
    assert all(torch.allclose(found[name], expected[name], atol=1e-12) for name in base)


def test_large_tensors_are_edited_as_whole_rows_and_tensors():
    base = state(0, torch.float32, shapes={"w": (500, 700)})
    model = tuned(base, 1)
    options = {"method": "della_linear", "density": 0.5, "epsilon": 0.2, "dtype": "float32"}
    della_found = merge(base, [Task(model, name="a")], **options)
    tau = (model["w"] - base["w"])[None]
    noise = uniform(0, "a", "w", 0, tau.numel(), torch.float32).reshape(tau.shape)
    torch.testing.assert_close(della_found["w"], base["w"] + della(tau, noise, 0.5, 0.2)[0])
    crumbs = merge(base, [Task(model)], method="breadcrumbs", density=0.5, gamma=0.1)
    torch.testing.assert_close(crumbs["w"], base["w"] + crumbs_by_sorting(tau[0], 0.5, 0.1))


@pytest.mark.parametrize("kind", ["smooth", "repeated", "mostly zero", "one scale a tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("asked", ["0", "1"])
def test_thresholds_are_exact_order_statistics(kind, dtype, asked, monkeypatch):
    monkeypatch.setenv("GRADMATCH_KERNEL", asked)
    shapes = {"a": (300, 700), "b": (40, 30), "c": (7,)}
    base = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    model = state(3, dtype, shapes=shapes)
    if kind == "repeated":
        model = {name: (t * 4).round() / 4 for name, t in model.items()}
    elif kind == "mostly zero":
        model = {name: t * (t.abs() > 2.2) for name, t in model.items()}
    elif kind == "one scale a tensor":
        model = {name: t * 10.0**i for i, (name, t) in enumerate(model.items())}
    seen = Context(prepare(base, [Task(model)], method="ties", density=0.1), kernels=compiled.kernels())
    search.look_over_model(seen)
    found = {name: found.cuts[0][0][0] for (_, name), found in seen.found.items()}
    assert found == dict.fromkeys(shapes, exact_threshold(model.values(), 0.1))


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
    everything = Cut(torch.full((2, 1, 1), -1.0), torch.zeros(2, 1, 1, dtype=torch.long))
    for transform in TRANSFORMS.values():
        cuts = [everything for _ in (transform.ranks(transform.options, 12) if transform.ranks else ())]
        edit = Edit(tau, torch.ones(2, 1, 1), lambda: torch.rand(2, 3, 4), cuts=cuts, theta0=tau[0])
        edit.sums = transform.sums and transform.sums(edit, transform.options)
        found = transform.apply(edit, transform.options)
        assert found.shape == tau.shape
        assert not found.any()
