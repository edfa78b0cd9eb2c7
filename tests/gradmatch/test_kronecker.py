"""Kronecker merging: against dense systems in float64, and as the cases that it contains."""

import pytest
import torch
from torch import nn

from gradmatch import Task, merge
from gradmatch.estimators import Curvature, estimate
from gradmatch.rules.beliefs import Known
from gradmatch.rules.kronecker import exact
from gradmatch.rules.regmean import regmean
from gradmatch.rules.structures import Product, Sum
from gradmatch.rules.system import Belief, solve
from tests.gradmatch import tiny

OUT, WIDTH = 5, 7
EXACT = {"tolerance": 1e-13, "iterations": 500}


def positive(size, seed, rank=None):
    """A random second-moment matrix, float64."""
    rows = torch.randn(rank or 3 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    return rows.T @ rows / len(rows)


def known(seed, num_examples, transposed=False, with_b=True, rank=None):
    """A KFAC curvature of {"w": matrix, "bias": vector}, and its dense H of the summed loss, on vec of W (out, in) by rows."""
    a, b = positive(WIDTH, seed, rank), positive(OUT, seed + 50, rank) if with_b else torch.eye(OUT).double()
    diagonal = torch.outer(b.diagonal(), a.diagonal())
    bias = torch.rand(OUT, generator=torch.Generator().manual_seed(seed)).double()
    curvature = Curvature.from_dict(
        {"w": diagonal.T.contiguous() if transposed else diagonal, "bias": bias}, num_examples,
        factor_a={"w": a}, factor_b={"w": b} if with_b else None,
    )  # fmt: skip
    return curvature, num_examples * torch.kron(b, a)


def models(count, transposed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (WIDTH, OUT) if transposed else (OUT, WIDTH)

    def draw():
        return {
            "w": torch.randn(shape, generator=generator, dtype=torch.float64),
            "bias": torch.randn(OUT, generator=generator, dtype=torch.float64),
        }

    base = draw()
    return base, [{name: base[name] + 0.1 * value for name, value in draw().items()} for _ in range(count)]


def dense(taus, alphas, h0, hs):
    """x of Eq. 12 with full matrices."""
    h_bar = h0 + sum(a * h for a, h in zip(alphas, hs, strict=True))
    right = sum(a * (h0 + h) @ t.reshape(-1) for a, h, t in zip(alphas, hs, taus, strict=True))
    return torch.linalg.solve(h_bar, right)


ALPHAS = [(1.0,), (0.3,), (1.0, 1.0, 1.0), (0.7, 0.2, 1.3), (1.0, -0.001, 0.5)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("base_kind", ["factors", "number", "diagonal"])
@pytest.mark.parametrize("alphas", ALPHAS, ids=str)
def test_merge_is_the_dense_solution(alphas, base_kind, transposed):
    base, tuned = models(len(alphas), transposed)
    curvatures, hs = zip(*(known(t, 10 + t, transposed) for t in range(len(alphas))), strict=True)
    size, delta0 = OUT * WIDTH, 0.01
    h0 = delta0 * torch.eye(size).double()
    if base_kind == "number":
        given, h0 = 0.4, h0 + 0.5 * 0.4 * torch.eye(size)
    else:
        given, full = known(99, 30, transposed)
        if base_kind == "diagonal":
            given = Curvature.from_dict({name: given.mean(name) for name in given}, 30)
            full = full.diagonal().diag()
        h0 = h0 + 0.5 * full
    tasks = [Task(m, c, a) for m, c, a in zip(tuned, curvatures, alphas, strict=True)]
    settings = {"base_curvature": given, "base_weight": 0.5, "delta0": delta0}
    found = merge(base, tasks, method="kronecker", **settings, **EXACT)
    side = (lambda w: w.T) if transposed else (lambda w: w)
    taus = [side(model["w"] - base["w"]) for model in tuned]
    expected = side(base["w"]) + dense(taus, alphas, h0, hs).reshape(OUT, WIDTH)
    torch.testing.assert_close(side(found["w"]), expected, rtol=1e-9, atol=1e-9)
    solve = found.report.solves["w"]
    assert solve["residual"] < 1e-12
    assert "1 matrices solved in up to" in found.report.summary()
    diagonal = merge(base, tasks, method="gradient_matching", **settings)
    torch.testing.assert_close(found["bias"], diagonal["bias"])
    if alphas not in ((1.0,), (0.3,)):
        assert float((found["w"] - diagonal["w"]).norm()) > 1e-3  # the diagonal is another merge


def test_one_model_at_weight_one_needs_no_iteration():
    base, tuned = models(1)
    found = merge(base, [Task(tuned[0], known(0, 10)[0])], method="kronecker", base_curvature=known(9, 30)[0])
    assert torch.equal(found["w"], tuned[0]["w"])
    assert found.report.solves["w"]["iterations"] == 0


def test_what_no_curvature_sees_is_task_arithmetic():
    base, tuned = models(2)
    zero = Curvature.from_dict(
        {"w": torch.zeros(OUT, WIDTH), "bias": torch.zeros(OUT)}, 10,
        factor_a={"w": torch.zeros(WIDTH, WIDTH)}, factor_b={"w": torch.zeros(OUT, OUT)},
    )  # fmt: skip
    tasks = [Task(model, zero, 0.7) for model in tuned]
    found = merge(base, tasks, method="kronecker", base_curvature=0.0)
    plain = merge(base, tasks, method="task_arithmetic")
    torch.testing.assert_close(found["w"], plain["w"])


def test_without_gradients_factors_and_a_base_it_is_regmean():
    base, tuned = models(3)
    alphas = (1.0, 0.5, 0.2)
    curvatures = [known(t, 10 + t, with_b=False)[0] for t in range(3)]
    tasks = [Task(m, c, a) for m, c, a in zip(tuned, curvatures, alphas, strict=True)]
    found = merge(base, tasks, method="kronecker", base_curvature=0.0, delta0=0.0, **EXACT)
    gram = torch.stack([curvature.factor_a("w") * curvature.num_examples for curvature in curvatures])
    alpha = torch.tensor(alphas, dtype=torch.float64).reshape(3, 1, 1)
    expected = regmean(torch.stack([model["w"] for model in tuned]), alpha, gram, 1.0, 0.0)
    torch.testing.assert_close(found["w"], expected, rtol=1e-9, atol=1e-9)


def test_linear_regression_with_several_outputs_is_solved_exactly():
    """Squared error of a linear layer has the curvature X'X (x) I, which factors: the merge is the joint solution."""
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(20, WIDTH + OUT, generator=generator).double().split((WIDTH, OUT), 1) for _ in "abc"]
    delta = 0.5  # H0 = delta I: the base is fine-tuned from 0 with weight decay delta
    base = torch.randn(OUT, WIDTH, generator=generator).double()

    def fit(parts):
        left = sum((x.T @ x for x, _ in parts), delta * torch.eye(WIDTH).double())
        right = sum((y.T @ x for x, y in parts), delta * base)
        return torch.linalg.solve(left, right.T).T

    tasks = []
    for x, y in sets:
        a = x.T @ x / 20
        mean = {"w": a.diagonal().expand(OUT, WIDTH).contiguous()}
        tasks.append(Task({"w": fit([(x, y)])}, Curvature.from_dict(mean, 20, factor_a={"w": a})))
    found = merge({"w": base}, tasks, method="kronecker", base_curvature=delta, delta0=0.0, **EXACT)
    joint = fit(sets)
    torch.testing.assert_close(found["w"], joint, rtol=1e-9, atol=1e-9)
    diagonal = merge({"w": base}, tasks, method="gradient_matching", base_curvature=delta, delta0=0.0)
    assert float((diagonal["w"] - joint).norm()) > 0.01 * float((base - joint).norm())


def test_a_single_product_is_solved_at_once():
    tau = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h, h0 = Product(100.0, positive(WIDTH, 0), positive(OUT, 1)), Product(diagonal=0.7)
    found = solve([Belief(0.3, h, tau), Belief(1.0, h0, 0.0)], tau)
    assert found.iterations == 0
    assert found.residual < 1e-13
    full = 30 * torch.kron(positive(OUT, 1), positive(WIDTH, 0))
    expected = torch.linalg.solve(full + 0.7 * torch.eye(len(full)).double(), full @ tau.reshape(-1))
    torch.testing.assert_close(found.update.reshape(-1), expected, rtol=1e-10, atol=1e-10)


def test_iterations_that_do_not_suffice_are_told():
    base, tuned = models(3)
    tasks = [Task(m, known(t, 10 + t, rank=2)[0]) for t, m in enumerate(tuned)]
    with pytest.warns(UserWarning, match="did not reach their tolerance in 1 of 1 matrices"):
        found = merge(base, tasks, method="kronecker", base_curvature=known(9, 30, rank=2)[0], iterations=1)
    assert found.report.solves["w"]["iterations"] == 1
    assert found.report.to_dict()["solved"].startswith("1 matrices solved in up to 1 iterations")


def test_an_eigenbasis_that_is_far_from_common_is_told():
    base, tuned = models(3)
    tasks = [Task(m, known(t, 10 + t, rank=2)[0]) for t, m in enumerate(tuned)]
    how = {"method": "kronecker", "base_curvature": known(9, 30, rank=2)[0], "delta0": 0.1}
    with pytest.warns(
        UserWarning, match=r"eigenbasis leaves more than 10 % .* in 1 of 1 matrices.*solver='fast' or 'exact'"
    ):
        merge(base, tasks, **how, solver="eigenbasis")
    for more in ({}, EXACT):
        assert not any("eigenbasis leaves" in note for note in merge(base, tasks, **how, **more).report.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base_kind", ["factors", "number", "diagonal", "nothing"])
def test_a_few_steps_leave_what_they_say_of_the_system(base_kind, dtype):
    """The default solver ends within its tolerance, in the models' precision, and what it tells is what is left."""
    base, tuned = models(3)
    known_of = [known(t, 10 + t) for t in range(3)]
    given, dense_h0 = known(9, 30)
    if base_kind != "factors":
        given = {
            "diagonal": Curvature.from_dict({n: given.mean(n) for n in given}, 30),
            "number": 2.0,
            "nothing": 0.0,
        }[base_kind]
        dense_h0 = {"diagonal": dense_h0.diagonal().diag()}.get(
            base_kind, 2.0 * (base_kind == "number") * torch.eye(len(dense_h0))
        )
    base, *tuned = ({n: v.to(dtype) for n, v in model.items()} for model in (base, *tuned))
    tasks = [Task(m, k[0]) for m, k in zip(tuned, known_of, strict=True)]
    found = merge(base, tasks, method="kronecker", base_curvature=given)
    hs, taus = [k[1] for k in known_of], [(m["w"] - base["w"]).double().flatten() for m in tuned]
    right = sum((dense_h0 + h) @ t for h, t in zip(hs, taus, strict=True))
    left = (dense_h0 + sum(hs)) @ (found["w"] - base["w"]).double().flatten() - right
    share = float(left.norm() / right.norm())
    told = found.report.solves["w"]
    assert share < 0.06
    assert 0.7 * share < told["residual"] < 1.4 * share
    assert 0 < told["iterations"] < 12
    if base_kind == "factors":
        start = sum(dense_h0 @ t for t in taus) + sum(hs) @ sum(taus) - right  # of task arithmetic
        assert share < 0.2 * float(start.norm() / right.norm())


def test_transforms_come_before_it(tmp_path):
    base, tuned = models(2)
    tasks = [Task(m, known(t, 10 + t)[0]) for t, m in enumerate(tuned)]
    edited = merge(base, [Task(m) for m in tuned[:1]], method="ties", density=0.3)
    options = {"method": "kronecker", "base_curvature": 1.0}
    one = merge(base, tasks[:1], transforms=[{"ties": {"density": 0.3}}], **options)
    torch.testing.assert_close(one["w"], edited["w"])
    out = merge(base, tasks, method="kronecker", base_curvature=1.0, out=tmp_path / "out")
    assert "1 matrices solved in" in (out.path / "README.md").read_text()


def test_a_network_with_estimated_factors():
    """Files of `estimate(method="kfac")`: merged by gradient_matching as diagonals, by kronecker with their factors."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    tuned = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)) for _ in range(2)]
    data = [(torch.randn(40, 6), torch.randint(0, 3, (40,)))]
    for model in tuned:
        model.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in base.state_dict().items()})
    h0, *h = (estimate(model, data, method="kfac", progress=False) for model in (base, *tuned))
    tasks = [Task(model, curvature) for model, curvature in zip(tuned, h, strict=True)]
    found = merge(base, tasks, method="kronecker", base_curvature=h0, solver="exact")
    assert set(found.report.solves) == {"0.weight", "3.weight"}
    assert all(solve["residual"] <= 2e-6 for solve in found.report.solves.values())
    assert found.report.tensors == {"solve": 2, "elementwise": 4}
    diagonal = merge(base, tasks, method="gradient_matching", base_curvature=h0)
    assert torch.equal(found["2.weight"], diagonal["2.weight"])
    assert not torch.equal(found["0.weight"], diagonal["0.weight"])
    means = [Curvature.from_dict(dict(curvature), curvature.num_examples) for curvature in (h0, *h)]
    plain = [Task(model, mean) for model, mean in zip(tuned, means[1:], strict=True)]
    expected = merge(base, plain, method="gradient_matching", base_curvature=means[0])
    assert all(torch.equal(diagonal[name], expected[name]) for name in expected)


def test_curvatures_without_factors_are_refused():
    base, tuned = models(1)
    mean = Curvature.from_dict({name: torch.ones_like(value) for name, value in base.items()}, 10)
    with pytest.raises(ValueError, match=r"kronecker needs curvatures with Kronecker factors.*method='kfac'"):
        merge(base, [Task(tuned[0], mean)], method="kronecker", base_curvature=1.0)


def test_factors_of_another_shape_are_refused():
    base, tuned = models(1)
    other = Curvature.from_dict(
        {name: torch.ones_like(value) for name, value in base.items()}, 10, factor_a={"w": torch.eye(4)}, factor_b={"w": torch.eye(5)}
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"factors \[4, 4\] and \[5, 5\] for 'w', whose shape is \[5, 7\]"):
        merge(base, [Task(tuned[0], other)], method="kronecker", base_curvature=1.0)


@pytest.mark.parametrize("estimator", ["kfac", None])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_of_another_layer_are_refused_in_an_estimate_and_told_in_what_was_put_together(
    transposed, estimator
):
    base, tuned = models(1, transposed)
    own, other = known(0, 10, transposed)[0], known(1, 10, transposed)[0]
    mixed = Curvature.from_dict(
        {name: own.mean(name) for name in own},
        10,
        {"estimator": estimator} if estimator else None,
        factor_a={"w": other.factor_a("w")},
        factor_b={"w": other.factor_b("w")},
    )
    text = "the factors of 'w' in a curvature are not those of its own diagonal"
    with pytest.raises(ValueError, match=text) if estimator else pytest.warns(UserWarning, match=text):
        merge(base, [Task(tuned[0], mixed)], method="kronecker", base_curvature=1.0)


def test_a_removal_that_leaves_what_its_base_knows_is_refused():
    """A share of no curvature is no guard: of factors of few examples the floor let a step go thousands of task vectors far."""
    base, tuned = models(1)
    task, prior = known(0, 10)[0], known(9, 30, rank=2)[0]
    how = {"method": "removal", "structure": "kronecker", "base_curvature": prior, "delta0": 1e-6}
    with pytest.raises(
        ValueError, match=r"'w': the removal goes .* times as far .* guard='scale', which bounds the step"
    ):
        merge(base, [Task(tuned[0], task)], **how)
    bounded = merge(base, [Task(tuned[0], task)], **how, guard="scale")["w"] - base["w"]
    assert float(bounded.norm()) < 20 * float((tuned[0]["w"] - base["w"]).norm())


@pytest.mark.parametrize("side", ["a", "b"])
def test_factors_that_are_no_second_moments_are_refused(side):
    base, tuned = models(1)
    mean = {name: torch.ones_like(value) for name, value in base.items()}
    a, b = (torch.ones(n, n).triu() if side == one else torch.eye(n) for one, n in (("a", WIDTH), ("b", OUT)))
    other = Curvature.from_dict(mean, 10, factor_a={"w": a}, factor_b={"w": b})
    with pytest.raises(ValueError, match=f"factor_{side}/w of a curvature is not symmetric"):
        merge(base, [Task(tuned[0], other)], method="kronecker", base_curvature=1.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"structure": "diagonal", "solver": "exact"}, "solver plays no role with structure='diagonal'"),
        ({"solver": "eigenbasis", "tolerance": 1e-3}, "tolerance plays no role with solver='eigenbasis'"),
        ({"solver": "fast", "iterations": 3}, "iterations plays no role with solver='fast'"),
    ],
)
def test_options_that_play_no_role_are_refused(options, text):
    base, tuned = models(1)
    with pytest.raises(ValueError, match=text):
        merge(base, [Task(tuned[0], known(0, 10)[0])], method="mats", **options)


def test_a_negative_weight_that_takes_too_much_is_named():
    base, tuned = models(2)
    with pytest.raises(ValueError, match=r"a weight of -0\.9 takes more away than the other tasks have"):
        merge(base, [Task(tuned[0]), Task(tuned[1], weight=-0.9)], method="wudi")


def test_a_system_that_is_not_positive_is_refused():
    base, tuned = models(1)
    with pytest.raises(ValueError, match="is not positive"):
        merge(
            base, [Task(tuned[0], known(0, 100)[0], -1.0)], method="kronecker", base_curvature=known(1, 10)[0]
        )
    with pytest.raises(
        ValueError, match=r"H0 - sum alpha_t H_t is not positive, and the exact solution has no guard"
    ):
        merge(
            base, [Task(tuned[0], known(0, 100)[0])], method="removal", base_curvature=known(1, 10)[0], structure="kronecker", solver="exact"
        )  # fmt: skip


def test_what_no_curvature_sees_goes_where_the_rule_takes_it():
    """Conjugate gradients leave it where they begin: a removal must begin at minus the task vector."""
    theta0, tau = torch.randn(2, OUT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = positive(WIDTH, 2, rank=2), positive(OUT, 3, rank=2)
    curved = [Product(n, a=a, b=b) for n in (4.0, 1.0)]
    known = Known(
        theta0,
        tau[None],
        [1.0],
        Sum((curved[0], Product(1.0, a=a, b=b))),
        curved[1:],
        None,
        None,
        0.0,
        0.0,
        {},
    )
    blind = [torch.linalg.svd(x)[0][:, 2:] for x in (b, a)]
    for name, expected in (("gradient_matching", 1.0), ("removal", -1.0), ("fisher_base", 0.0)):
        update = exact(name, known, {}) - theta0
        torch.testing.assert_close(
            blind[0].T @ update @ blind[1], expected * blind[0].T @ tau @ blind[1], rtol=1e-6, atol=1e-6
        )


def token_batches():
    ids = torch.randint(0, 50, (16, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]


def image_batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 6, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator))]


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 2), nn.Flatten(), nn.Linear(36, 3))


@pytest.mark.parametrize(
    ("make", "batches", "solved"),
    [
        (lambda: tiny.gpt2(n_layer=1), token_batches, 4),  # Conv1D, tied embeddings
        (
            lambda: tiny.llama(50, num_key_value_heads=1, tie_word_embeddings=True),
            token_batches,
            7,
        ),  # grouped queries
        (convolutional, image_batches, 3),
    ],
    ids=["conv1d, tied", "grouped queries, tied", "convolutions"],
)
def test_networks_of_every_kind_are_merged_by_a_few_steps(make, batches, solved):
    torch.manual_seed(0)
    base = make()
    models = [tiny.tuned(base, seed, 0.02) for seed in (1, 2)]
    h0, *h = (estimate(m, batches(), method="kfac", progress=False) for m in (base, *models))
    tasks = [Task(m, c) for m, c in zip(models, h, strict=True)]
    fast, exact, diagonal, whole = (
        merge(base, tasks, base_curvature=h0, delta0=1.0, **more)
        for more in ({"structure": "kronecker"}, {"structure": "kronecker", "solver": "exact"}, {}, {"structure": "diagonal"})
    )  # fmt: skip
    assert len(fast.report.solves) == len(exact.report.solves) == solved
    assert all(one["residual"] <= 2e-6 for one in exact.report.solves.values())
    for name in base.state_dict():
        assert torch.equal(diagonal[name], whole[name])
        if name not in fast.report.solves:
            assert torch.equal(fast[name], diagonal[name])
    assert all(one["residual"] <= 0.06 for one in fast.report.solves.values())
    near, far = (
        sum(float((one[n] - exact[n]).square().sum()) for n in fast.report.solves) for one in (fast, diagonal)
    )
    assert near < far
